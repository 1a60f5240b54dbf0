"""Logged metrics of rollouts: a healthy run, and one for each diagnosis of the PPO doctor."""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, float]]


def healthy(count: int) -> Rows:
    """A run that learns: the score rises, KL and explained variance too, entropy falls a little."""
    return [
        {
            "objective/kl": 0.1 + 6 * i / count + 0.1 * (-1) ** i,
            "objective/scores": 2 * i / count + 0.2 * (-1) ** i,
            "objective/scores_std": 1.0 - 0.3 * i / count,
            "policy/approxkl_avg": 0.004,
            "policy/clipfrac_avg": 0.08,
            "policy/entropy_avg": 1.5 - 0.5 * i / count,
            "val/ratio": 1.01,
            "val/explained_variance": -0.5 + min(i, 8) * 0.1,
            "completions/eos_rate": 0.6 + 0.2 * i / count,
            "completions/mean_length": 30 - 5 * i / count,
            "rewards/length_correlation": 0.3,
            "rewards/ensemble_std": 0.2 + 0.05 * i / count,
        }
        for i in range(count)
    ]


def changed(count: int = 40, last: int | None = None, **values: Any) -> Rows:
    """A healthy run with metrics (`__` for `/`) changed in its last rollouts, by number or by function of the index."""
    rows = healthy(count)
    begin = 0 if last is None else count - last
    for i in range(begin, count):
        for name, value in values.items():
            rows[i][name.replace("__", "/")] = value(i) if callable(value) else value
    return rows


# Name of the diagnosis: a history that shows it, and one that nearly does.
CASES: dict[str, tuple[Rows, Rows]] = {
    "negative KL": (changed(last=3, objective__kl=-0.5), changed(last=2, objective__kl=-0.5)),
    "KL blow-up": (changed(last=2, objective__kl=31.0), changed(last=1, objective__kl=12.0)),
    "updates too large": (changed(last=2, policy__approxkl_avg=0.11), changed(last=1, policy__approxkl_avg=0.5)),
    "clip fraction too high": (changed(last=3, policy__clipfrac_avg=0.4), changed(last=2, policy__clipfrac_avg=0.4)),
    "standstill": (
        changed(12, last=5, policy__clipfrac_avg=0.0, policy__approxkl_avg=0.0, objective__kl=0.001),
        changed(12, policy__clipfrac_avg=0.0, policy__approxkl_avg=0.0),  # one step per rollout, and it learns
    ),
    "dead critic": (changed(10, last=5, val__explained_variance=-0.1), changed(9, val__explained_variance=-0.1)),
    "entropy collapse": (changed(last=3, policy__entropy_avg=0.3), changed(last=3, policy__entropy_avg=0.6)),
    "completions do not end": (changed(last=3, completions__eos_rate=0.0), changed(last=2, completions__eos_rate=0.0)),
    "empty answers": (
        changed(last=3, completions__eos_rate=1.0, completions__mean_length=1.0),
        changed(completions__eos_rate=1.0, completions__mean_length=1.0),  # one token was the task from the start
    ),
    "length hacking": (
        changed(completions__mean_length=lambda i: 20 + i, rewards__length_correlation=0.7),
        changed(completions__mean_length=lambda i: 20 + i),  # it grows, and is not paid for
    ),
    "reward spread gone": (changed(last=3, objective__scores_std=0.05), changed(last=3, objective__scores_std=0.3)),
    "reward hacking": (
        changed(rewards__ensemble_std=lambda i: 0.2 + 0.02 * i),
        changed(rewards__ensemble_std=lambda i: 0.2 + 0.02 * i, objective__scores=lambda i: 0.1 * (-1) ** i)[:20],
    ),
    "no learning": (
        changed(30, objective__scores=lambda i: 0.1 * (-1) ** i),
        changed(29, objective__scores=lambda i: 0.1 * (-1) ** i),
    ),
}
OTHER_SIGNS = {
    "a sudden KL": ("KL blow-up", changed(last=1, objective__kl=26.0)),
    "a ratio far from 1": ("updates too large", changed(last=2, val__ratio=0.85)),
    "a ratio far from 1, above": ("updates too large", changed(last=2, val__ratio=1.15)),
}
