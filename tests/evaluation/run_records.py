"""Run records as trainers and evaluations leave them, small and made up."""

from __future__ import annotations

import math
from typing import Any

from alignkit.hub.record import RunRecord
from alignkit.hub.wording import HELD_OUT_PREFERENCES

PREPARATION: dict[str, Any] = {
    "rows_in": 1600,
    "rows_kept": 1592,
    "drops": {"empty": {"count": 8, "row_ids": [86, 516, 925, 1103, 1200, 1201, 1300, 1400]}},
    "truncated_completions": 1,
    "eos_lost": {"count": 0, "row_ids": []},
    "token_lengths": {"prompt": {"min": 33, "median": 121, "p95": 371, "max": 880}},
}
BASE = {"name": "tiny-chat", "hub_id": "someone/tiny-chat", "license": "apache-2.0", "parameters": 134515008}


def estimate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def dpo_log(steps: int = 20) -> list[dict[str, Any]]:
    """A run that goes well: the loss falls, both rewards stay near 0, and held-out rows are measured twice."""
    log: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        share = step / steps
        log.append(
            {
                "step": step,
                "epoch": share,
                "loss": 0.69 - 0.1 * share,
                "grad_norm": 1.0 + 0.2 * math.sin(step),
                "learning_rate": 1e-4 * (1 - share),
                "rewards/accuracies": 0.5 + 0.15 * share,
                "rewards/margins": 0.4 * share,
                "rewards/chosen": 0.1 * share,
                "rewards/rejected": -0.3 * share,
                "logps/chosen": -100.0,
                "logps/rejected": -130.0,
                "tokens_per_second": 345.0,
            }
        )
    for step in (steps // 2, steps):
        log.append({"step": step, "eval_loss": 0.66, "eval_rewards/accuracies": 0.6, "eval_runtime": 1.0})
    return [*log, {"step": steps, "train_runtime": 1054.6, "train_loss": 0.66, "total_flos": 1.0}]


def dpo_record(**changes: Any) -> RunRecord:
    """A DPO run with nothing to say against it; `changes` are fields."""
    record = RunRecord(
        method="dpo",
        alignkit="0.1.0",
        created="2026-01-02T03:04:05+00:00",
        finished="2026-01-02T03:24:05+00:00",
        base=dict(BASE),
        adapter={"kind": "LORA", "r": 16, "alpha": 32, "trainable_parameters": 4884480},
        data=[
            {"name": "train", "source": "pairs.jsonl", "rows": 1592, "sha256": "ab" * 32, "preparation": PREPARATION},
            {"name": "eval", "source": "pairs.jsonl", "rows": 298, "sha256": "cd" * 32, "preparation": None},
        ],
        settings={"learning_rate": 1e-4, "beta": 0.1, "max_length": 1024, "report_to": []},
        changed=["learning_rate"],
        versions={"python": "3.11.7", "torch": "2.13.0"},
        hardware={"device": "cuda", "device_name": "a card", "device_memory_bytes": 12 * 2**30},
        seeds={"seed": 42},
        usage={"steps": 20, "epochs": 1.0, "training_seconds": 1054.6, "peak_memory_bytes": 5 * 2**30},
        samples=[
            {"prompt": "user\nTell me a joke.", "before": "I know no joke at all, sorry.", "after": "I know no pun."}
        ],
        log=dpo_log(),
    )
    record.add_evaluation(
        HELD_OUT_PREFERENCES,
        {"accuracy": estimate(0.644, 0.588, 0.696), "margin": estimate(0.391, 0.273, 0.515), "loss": 0.63,
         "shorter": estimate(0.537, 0.48, 0.592)},
        rows=298,
        baseline={"accuracy": estimate(0.5, 0.444, 0.556), "margin": estimate(0.0, 0.0, 0.0), "loss": 0.693},
    )  # fmt: skip
    for name, value in changes.items():
        setattr(record, name, value)
    return record


def ppo_log(rollouts: int = 24) -> list[dict[str, Any]]:
    """A run that goes well: the reward rises with the KL, and the critic learns."""
    log = []
    for index in range(1, rollouts + 1):
        share = index / rollouts
        log.append(
            {
                "step": 4 * index,
                "episode": 16 * index,
                "loss": 0.01,
                "objective/scores": 2 * share,
                "objective/scores_std": 1.0,
                "objective/rlhf_reward": 1.8 * share,
                "objective/kl": 6 * share,
                "policy/clipfrac_avg": 0.05,
                "policy/approxkl_avg": 0.01,
                "policy/entropy_avg": 1.4,
                "completions/eos_rate": 0.9,
                "completions/mean_length": 30.0,
                "val/explained_variance": 0.5,
                "rewards/<b>polite</b>": 2 * share,
            }
        )
    return log


def ppo_record(**changes: Any) -> RunRecord:
    """A PPO run with nothing to say against it."""
    record = dpo_record(method="ppo", log=ppo_log(), reward=["polite"], evaluations=[])
    record.settings = {"learning_rate": 1e-4, "kl_coef": 0.05, "critic_warmup_rollouts": 0}
    record.add_evaluation(
        "Greedy answers",
        {"reward": estimate(2.1, 1.9, 2.3), "kl": estimate(6.0, 5.0, 7.0), "eos_rate": estimate(0.94, 0.9, 0.97),
         "tokens": estimate(28.0, 26.0, 30.0)},
        rows=200,
        baseline={"reward": estimate(0.0, -0.2, 0.2), "tokens": estimate(30.0, 29.0, 31.0)},
    )  # fmt: skip
    record.samples = [
        {"prompt": "Hi", "before": "Hello.", "after": "Hello!", "reward_before": 0.5, "reward_after": 1.5}
    ]
    for name, value in changes.items():
        setattr(record, name, value)
    return record


# What must neither run, nor hide, nor reorder, nor break the page.
HOSTILE_TEXTS = (
    "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">",
    "</style></svg></details></div></body>{{ 7 * 7 }}{% raw %}<!--",
    "' onmouseover='alert(1)' \" autofocus onfocus=\"alert(1)\" x=`",
    "control \x00\x07\x1b[2J\x7f\x9b and \r alone",
    "right to left \u202egnp.exe\u2066 and back",
    "lone \ud800 surrogate \udfff, \ufffe, \U000e0041",
    "z" + "\u0336" * 400,
    "https://example.com/\n\n\n" + "W" * 3000,
    "مرحبا بالعالم 你好，世界 👩‍👩‍👧 é",
)


def hostile_record() -> RunRecord:
    """A record in which every text that others wrote attacks the page, and many numbers are none."""
    record = ppo_record()
    evil = HOSTILE_TEXTS[0]
    record.base = {"name": evil, "hub_id": HOSTILE_TEXTS[2], "license": evil, "note": "x" * 5000}
    record.adapter = {"kind": evil, "r": "<r>", "target_modules": [evil] * 40}
    record.command = evil
    record.reward = [evil]
    record.finished = evil
    record.settings |= {evil: evil, "learning_rate": math.nan, "long": "L" * 9000, "nested": {"a": [evil]}}
    record.changed = [evil, "long", "absent"]
    record.versions = {evil: evil}
    record.hardware = {evil: evil, "device_memory_bytes": -1}
    record.usage = {"steps": None, "training_seconds": math.nan, evil: 1e300, "peak_memory_bytes": "many"}
    record.data = [
        {"name": evil, "source": evil, "rows": None, "sha256": evil, "preparation": {"drops": {evil: {"count": evil}}}},
        {"name": "train", "preparation": {"rows_in": 0, "token_lengths": {evil: None}, "eos_lost": None}},
    ]
    record.samples = [{"prompt": text, "before": text, "after": text[::-1]} for text in HOSTILE_TEXTS]
    record.samples.append({"prompt": "p" * 200_000, "before": "word " * 40_000, "after": "W" * 200_000})
    record.samples.append({"prompt": "", "before": None, "after": ""})
    record.samples.append({"prompt": [{"role": "user", "content": evil}], "before": 7, "after": None})
    record.add_evaluation(evil, {evil: estimate(math.nan, 0, 1), "accuracy": estimate(2.0, -5.0, 9.0)}, rows=0)
    record.add_evaluation("safety: " + evil, {"refusal_rate": 0.5, "note": evil}, rows=9, details={evil: [evil]})
    record.audit = {evil: {"count": 3, "rows": [evil]}}
    record.log = [
        {"step": step, evil: float(step), "loss": math.nan if step % 3 else 1e29, "objective/kl": 0.1 * step,
         "objective/scores": math.inf if step % 5 else -step, "eval_" + evil: step, "grad_norm": evil}
        for step in range(700)
    ]  # fmt: skip
    return record
