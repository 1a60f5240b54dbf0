"""What goes wrong in PPO, how the metrics show it, and which setting to change.

`diagnose` is a pure function of the metrics of a run's rollouts so far. Every diagnosis is one row of `DIAGNOSES` and
one function that looks for its signs; a diagnosis whose metrics are missing is not made. "The last rollouts" are the
last ones that have the metric; "the start" is as many of the first ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

History = Sequence[Mapping[str, float]]
Action = Literal["warn", "lower_rate", "stop"]

NEGATIVE_KL_NATS = -0.2  # per completion; noise around a true KL of 0 is smaller, and a larger KL is further away
NEGATIVE_KL_ROLLOUTS = 3
HIGH_KL_NATS = 30.0  # per completion; three times the top of what kl_target usually asks for
HIGH_KL_ROLLOUTS = 2
KL_JUMP_FACTOR = 4.0  # of the last rollout over the mean of the three before; learning moves KL by tens of percent
KL_JUMP_NATS = 10.0  # per completion; below, a jump is what the first steps from 0 look like
APPROX_KL_NATS = 0.1  # per token; the top of what target_approx_kl usually allows
RATIO_DISTANCE = 0.1  # of the mean importance ratio from 1, which is its expectation
LARGE_UPDATE_ROLLOUTS = 2
HIGH_CLIP_FRACTION = 0.3  # share of tokens; 0.02 to 0.2 is usual
HIGH_CLIP_ROLLOUTS = 3
STILL_CLIP_FRACTION = 1e-4  # share of tokens
STILL_APPROX_KL_NATS = 1e-6  # per token; learning shows 1e-4 and more
STILL_KL_NATS = 0.01  # per completion; a policy that learned anything is further away
STILL_ROLLOUTS = 5
DEAD_CRITIC_AFTER = 10  # rollouts; a critic that begins with random values needs some
DEAD_CRITIC_ROLLOUTS = 5
COLLAPSED_ENTROPY = 0.3  # of the start's; a policy that learns keeps more than half
ENTROPY_ROLLOUTS = 3
LOW_EOS_RATE = 0.05  # share of completions; the reward then sees hardly one that has an end
LOW_EOS_ROLLOUTS = 3
EMPTY_LENGTH = 0.2  # of the start's tokens per completion
EMPTY_EOS_RATE = 0.9  # share of completions: they are short because they end, not because they are cut
EMPTY_ROLLOUTS = 3
LENGTH_CORRELATION = 0.5  # a quarter of the reward's variance is then told by length alone
LENGTH_GROWTH = 1.25  # of tokens per completion, over the start's
LENGTH_ROLLOUTS = 5
LOST_SPREAD = 0.1  # of the start's deviation of scores
SPREAD_ROLLOUTS = 3
DISAGREEMENT_GROWTH = 1.5  # of the ensemble's deviation, over the start's
SCORE_RISE = 0.5  # in standard deviations of the start's scores: clearly more than noise
HACKING_ROLLOUTS = 5
NO_LEARNING_AFTER = 30  # rollouts
NO_LEARNING_RISE = 0.1  # in standard deviations of scores: about the noise of ten rollouts of 16 completions
NO_LEARNING_ROLLOUTS = 10


class Signs(NamedTuple):
    """What shows a problem: a sentence with numbers, and how many of the last rollouts it speaks of."""

    evidence: str
    rollouts: int


class Finding(NamedTuple):
    """A problem that a history shows.

    Attributes:
        name: a word for it.
        evidence: the numbers.
        explanation: what goes wrong.
        remedy: which options of `PPOConfig` to change, and to what.
        action: the strongest measure that it justifies while the run goes on.
        rollouts: how many of the last rollouts show it.
    """

    name: str
    evidence: str
    explanation: str
    remedy: str
    action: Action
    rollouts: int


class Diagnosis(NamedTuple):
    """A problem to look for."""

    name: str
    look: Callable[[History], Signs | None]
    explanation: str
    remedy: str
    action: Action


def diagnose(history: History) -> list[Finding]:
    """Return the problems that a run shows now.

    Args:
        history: logged metrics of its rollouts, the oldest first. Critic warm-up does not belong in it: a policy that
            rests looks like one that does not learn.
    """
    findings = []
    for diagnosis in DIAGNOSES:
        signs = diagnosis.look(history)
        if signs is not None:
            name, _, explanation, remedy, action = diagnosis
            findings.append(Finding(name, signs.evidence, explanation, remedy, action, signs.rollouts))
    return findings


def _negative_kl(history: History) -> Signs | None:
    kl = _last(history, "objective/kl", NEGATIVE_KL_ROLLOUTS)
    return _shown("objective/kl", kl, "nats") if kl and max(kl) < NEGATIVE_KL_NATS else None


def _kl_blow_up(history: History) -> Signs | None:
    kl = _last(history, "objective/kl", HIGH_KL_ROLLOUTS)
    if kl and min(kl) > HIGH_KL_NATS:
        return _shown("objective/kl", kl, "nats")
    kl = _last(history, "objective/kl", 4)
    if kl and kl[-1] > max(KL_JUMP_NATS, KL_JUMP_FACTOR * _mean(kl[:-1])):
        return Signs(f"objective/kl jumped from {_mean(kl[:-1]):.3g} to {kl[-1]:.3g} nats", 1)
    return None


def _large_updates(history: History) -> Signs | None:
    approx_kl = _last(history, "policy/approxkl_avg", LARGE_UPDATE_ROLLOUTS)
    if approx_kl and min(approx_kl) > APPROX_KL_NATS:
        return _shown("policy/approxkl_avg", approx_kl, "nats per token")
    ratio = _last(history, "val/ratio", LARGE_UPDATE_ROLLOUTS)
    if ratio and min(abs(value - 1) for value in ratio) > RATIO_DISTANCE:
        return _shown("val/ratio", ratio, "where 1 is expected")
    return None


def _high_clip_fraction(history: History) -> Signs | None:
    share = _last(history, "policy/clipfrac_avg", HIGH_CLIP_ROLLOUTS)
    return _shown("policy/clipfrac_avg", share, "of the tokens") if share and min(share) > HIGH_CLIP_FRACTION else None


def _standstill(history: History) -> Signs | None:
    share = _last(history, "policy/clipfrac_avg", STILL_ROLLOUTS)
    approx_kl = _last(history, "policy/approxkl_avg", STILL_ROLLOUTS)
    kl = _last(history, "objective/kl", STILL_ROLLOUTS)
    if not (share and approx_kl and kl):
        return None
    # With one step per rollout nothing is ever clipped; then only the KL from the reference says that nothing moves.
    still = max(share) < STILL_CLIP_FRACTION and max(approx_kl) < STILL_APPROX_KL_NATS
    if still and max(abs(value) for value in kl) < STILL_KL_NATS:
        return _shown("policy/clipfrac_avg and policy/approxkl_avg were 0, and objective/kl", kl, "nats")
    return None


def _dead_critic(history: History) -> Signs | None:
    explained = _last(history, "val/explained_variance", DEAD_CRITIC_AFTER)[-DEAD_CRITIC_ROLLOUTS:]
    return _shown("val/explained_variance", explained, "") if explained and max(explained) <= 0 else None


def _entropy_collapse(history: History) -> Signs | None:
    change = _change(history, "policy/entropy_avg", ENTROPY_ROLLOUTS)
    if change and change.end < COLLAPSED_ENTROPY * change.start:
        return _shown_change("policy/entropy_avg", change, ENTROPY_ROLLOUTS, "nats")
    return None


def _no_endings(history: History) -> Signs | None:
    rate = _last(history, "completions/eos_rate", LOW_EOS_ROLLOUTS)
    return _shown("completions/eos_rate", rate, "") if rate and max(rate) < LOW_EOS_RATE else None


def _empty_answers(history: History) -> Signs | None:
    change = _change(history, "completions/mean_length", EMPTY_ROLLOUTS)
    rate = _last(history, "completions/eos_rate", EMPTY_ROLLOUTS)
    if change and rate and change.end < EMPTY_LENGTH * change.start and min(rate) > EMPTY_EOS_RATE:
        return _shown_change("completions/mean_length", change, EMPTY_ROLLOUTS, "tokens")
    return None


def _length_hacking(history: History) -> Signs | None:
    pays = _last(history, "rewards/length_correlation", LENGTH_ROLLOUTS)
    change = _change(history, "completions/mean_length", LENGTH_ROLLOUTS)
    if pays and change and _mean(pays) > LENGTH_CORRELATION and change.end > LENGTH_GROWTH * change.start:
        signs = _shown_change("completions/mean_length", change, LENGTH_ROLLOUTS, "tokens")
        return signs._replace(evidence=f"{signs.evidence}, with rewards/length_correlation at {_mean(pays):.2f}")
    return None


def _lost_spread(history: History) -> Signs | None:
    change = _change(history, "objective/scores_std", SPREAD_ROLLOUTS)
    if change and change.end < LOST_SPREAD * change.start:
        return _shown_change("objective/scores_std", change, SPREAD_ROLLOUTS, "")
    return None


def _reward_hacking(history: History) -> Signs | None:
    disagreement = _change(history, "rewards/ensemble_std", HACKING_ROLLOUTS)
    scores, spread = (_change(history, f"objective/{name}", HACKING_ROLLOUTS) for name in ("scores", "scores_std"))
    if not (disagreement and scores and spread):
        return None
    rises = scores.end - scores.start > SCORE_RISE * spread.start
    if rises and disagreement.end > DISAGREEMENT_GROWTH * disagreement.start:
        signs = _shown_change("rewards/ensemble_std", disagreement, HACKING_ROLLOUTS, "")
        return signs._replace(
            evidence=f"{signs.evidence}, while objective/scores rose from {scores.start:.3g} to {scores.end:.3g}"
        )
    return None


def _no_learning(history: History) -> Signs | None:
    if len(_values(history, "objective/scores")) < NO_LEARNING_AFTER:
        return None
    scores = _change(history, "objective/scores", NO_LEARNING_ROLLOUTS)
    spread = _change(history, "objective/scores_std", NO_LEARNING_ROLLOUTS)
    if scores and spread and scores.end - scores.start < NO_LEARNING_RISE * spread.start:
        return _shown_change("objective/scores", scores, NO_LEARNING_ROLLOUTS, f"at a deviation of {spread.start:.3g}")
    return None


DIAGNOSES: tuple[Diagnosis, ...] = (
    Diagnosis(
        "negative KL",
        _negative_kl,
        "A KL divergence cannot be below 0 where completions come from the policy that is scored. What is sampled is "
        "not what is scored, so the penalty rewards the difference and training runs away along it.",
        "min_completion_length: 0, because a forbidden EOS is sampled from one distribution and scored with another. "
        "If it is 0, the rollout engine and the scorer disagree: try rollout_engine='hf', and no custom engine.",
        "stop",
    ),
    Diagnosis(
        "KL blow-up",
        _kl_blow_up,
        "The policy has left the reference for text that the reference would hardly write, and is usually no longer "
        "readable; the reward was never meant for such text.",
        "kl_coef: two to five times as large, or kl_target=6 to let it adapt. learning_rate: a third.",
        "stop",
    ),
    Diagnosis(
        "updates too large",
        _large_updates,
        "Within one rollout the policy moves so far that the samples no longer speak for it; PPO's estimate of the "
        "gradient is then wrong.",
        "learning_rate: a third. num_ppo_epochs: one or two fewer. target_approx_kl=0.05 ends a rollout's steps early.",
        "lower_rate",
    ),
    Diagnosis(
        "clip fraction too high",
        _high_clip_fraction,
        "Most of the pull on the policy is cut off by clipping, so a large part of each rollout teaches nothing.",
        "learning_rate: half. num_ppo_epochs or num_mini_batches: fewer. A larger cliprange only hides it.",
        "lower_rate",
    ),
    Diagnosis(
        "standstill",
        _standstill,
        "The policy does not change at all: no token's probability moves.",
        "learning_rate: ten times as large (LoRA wants 1e-5 to 1e-4). Check that warmup_steps are over, and that "
        "critic_warmup_rollouts is not longer than the run.",
        "warn",
    ),
    Diagnosis(
        "dead critic",
        _dead_critic,
        "The critic predicts returns no better than a constant would, so advantages are as noisy as the rewards.",
        "value_learning_rate: ten times learning_rate. critic_warmup_rollouts=10. value_adapter=True, or vf_coef: five "
        "times as large. Rewards of large size: normalize_rewards=True. Or advantage_estimator='rloo', which needs "
        "no critic.",
        "warn",
    ),
    Diagnosis(
        "entropy collapse",
        _entropy_collapse,
        "The policy has become nearly deterministic: completions are alike, nothing is explored, and it seldom "
        "recovers.",
        "kl_coef: two to five times as large. entropy_coef=0.01. temperature=1.0. learning_rate: a third.",
        "stop",
    ),
    Diagnosis(
        "completions do not end",
        _no_endings,
        "Hardly any completion ends by itself. The reward judges texts that were cut off, and nothing teaches the "
        "policy to stop.",
        "max_completion_length: twice as large. missing_eos_penalty=1.0.",
        "warn",
    ),
    Diagnosis(
        "empty answers",
        _empty_answers,
        "Completions end almost at once: saying nothing has become the best that the policy can do about this reward.",
        "min_completion_length would only hide it: look at the reward of a short answer first. kl_coef: two to five "
        "times as large. missing_eos_penalty: smaller.",
        "stop",
    ),
    Diagnosis(
        "length hacking",
        _length_hacking,
        "The reward pays for length, and the policy delivers it.",
        "overlong_buffer_tokens: a quarter of max_completion_length, with overlong_penalty=1.0. kl_coef: twice as "
        "large. Better, a reward that does not see length.",
        "warn",
    ),
    Diagnosis(
        "reward spread gone",
        _lost_spread,
        "All completions get nearly the same score, so there is nothing left to prefer: the reward is at its top, or "
        "the completions are all alike.",
        "reward_clip: None or larger, if scores lie at it. temperature=1.0. If the reward is at its top, the run is "
        "done: stop, or give other prompts.",
        "warn",
    ),
    Diagnosis(
        "reward hacking",
        _reward_hacking,
        "The score rises where the reward model's heads disagree, that is where they were never trained: the policy "
        "exploits their errors.",
        "kl_coef: two to five times as large. Score with the ensemble's minimum in place of its mean, and go back to a "
        "checkpoint from before the disagreement grew.",
        "stop",
    ),
    Diagnosis(
        "no learning",
        _no_learning,
        "The score has not risen since the start by more than its noise.",
        "learning_rate: three times as large. num_generations or gradient_accumulation_steps: twice as large, for "
        "less noise. kl_coef: half, if the KL penalty is as large as the scores' differences.",
        "warn",
    ),
)


class _Change(NamedTuple):
    """Mean of a metric over the first and over the last rollouts."""

    start: float
    end: float


def _values(history: History, name: str) -> list[float]:
    return [metrics[name] for metrics in history if name in metrics]


def _last(history: History, name: str, count: int) -> list[float]:
    """Return the last `count` values, or none if there are fewer."""
    values = _values(history, name)
    return values[-count:] if len(values) >= count else []


def _change(history: History, name: str, count: int) -> _Change | None:
    values = _values(history, name)
    return _Change(_mean(values[:count]), _mean(values[-count:])) if len(values) >= 2 * count else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _shown(name: str, values: Sequence[float], unit: str) -> Signs:
    numbers = ", ".join(f"{value:.3g}" for value in values)
    return Signs(f"{name} was {numbers} {unit}".rstrip() + f" in the last {len(values)} rollouts", len(values))


def _shown_change(name: str, change: _Change, rollouts: int, unit: str) -> Signs:
    evidence = f"{name} went from {change.start:.3g} at the start to {change.end:.3g} {unit}".rstrip()
    return Signs(f"{evidence} over the last {rollouts} rollouts", rollouts)
