"""What happens to the rewards of whole completions before they meet the KL penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.functional.statistics import RunningMoments

_EPSILON = 1e-8  # keeps a spread of zero from dividing


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlong:
    """A soft limit on length.

    Attributes:
        max_tokens: the longest completion.
        buffer_tokens: over how many tokens before `max_tokens` the penalty grows from 0 to all of it.
        penalty: subtracted at `max_tokens` and beyond, 0 or more.

    Raises:
        ConfigError: a number out of range.
    """

    max_tokens: int
    buffer_tokens: int
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.buffer_tokens <= self.max_tokens:
            raise ConfigError(
                f"overlong_buffer_tokens={self.buffer_tokens!r}: must be between 1 and the longest completion, "
                f"{self.max_tokens} tokens"
            )
        _check_penalty("overlong_penalty", self.penalty)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardShaping:
    """How rewards are shaped.

    Attributes:
        clip_range: lowest and highest reward before penalties; `None` for no clipping.
        missing_eos_penalty: subtracted from the reward of a completion that did not finish, 0 or more.
        overlong: a soft limit on length; `None` for no limit.

    Raises:
        ConfigError: a number out of range.
    """

    clip_range: tuple[float, float] | None = None
    missing_eos_penalty: float = 0.0
    overlong: Overlong | None = None

    def __post_init__(self) -> None:
        if self.clip_range is not None:
            low, high = self.clip_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ConfigError(f"clip_range={self.clip_range!r}: must be two finite numbers, the lower one first")
        _check_penalty("missing_eos_penalty", self.missing_eos_penalty)


class ShapedRewards(NamedTuple):
    """Shaped rewards of B samples.

    Attributes:
        scores: `(B,)`, what the algorithm learns from.
        is_clipped: boolean `(B,)`, whether clipping changed the reward.
        penalties: `(B,)`, 0 or more, what was subtracted after clipping.
    """

    scores: Tensor
    is_clipped: Tensor
    penalties: Tensor


def shape_rewards(
    totals: Tensor, lengths: Tensor, finished: Tensor, shaping: RewardShaping, moments: RunningMoments | None = None
) -> ShapedRewards:
    """Normalise, then clip, then subtract penalties, in this order.

    So the clip range is in standard deviations where rewards are normalised, and penalties are neither scaled nor
    clipped away: a completion without an end is worse than the same one with an end, always by the same amount.

    Args:
        totals: rewards `(B,)`.
        lengths: completion tokens `(B,)`, EOS included.
        finished: boolean `(B,)`, whether the completion ended by itself.
        shaping: what to do.
        moments: of the rewards so far, these included (`moments.update(totals[kept])` first); `None` to leave the
            rewards' scale as it is.
    """
    raw = totals if moments is None else normalised(totals, moments)
    scores = raw if shaping.clip_range is None else raw.clamp(*shaping.clip_range)
    penalties = torch.where(finished, 0.0, shaping.missing_eos_penalty).to(scores.dtype)  # (B,)
    if shaping.overlong is not None:
        limit = shaping.overlong
        penalties = penalties - limit.penalty * overlong_term(lengths, limit.max_tokens, limit.buffer_tokens)
    return ShapedRewards(scores - penalties, scores != raw, penalties)


def normalised(totals: Tensor, moments: RunningMoments) -> Tensor:
    """`(r − mean) / std` with the running mean and standard deviation, `(B,)`.

    Every episode gets its reward once, so subtracting the mean shifts the value function and no preference.
    """
    return (totals - moments.mean) / (moments.std + _EPSILON)


def overlong_term(lengths: Tensor, max_tokens: int, buffer_tokens: int) -> Tensor:
    """Soft overlong punishment, Eq. 13 of arXiv 2503.14476, in [−1, 0].

    0 up to `L_max − L_buffer` tokens, then `((L_max − L_buffer) − |y|) / L_buffer`, and −1 beyond `L_max`.

    Args:
        lengths: `|y|` in tokens, `(B,)`.
        max_tokens: `L_max`.
        buffer_tokens: `L_buffer`, called `L_cache` there.
    """
    return ((max_tokens - buffer_tokens - lengths) / buffer_tokens).clamp(-1.0, 0.0)


def _check_penalty(name: str, penalty: float) -> None:
    if not (math.isfinite(penalty) and penalty >= 0):
        raise ConfigError(f"{name}={penalty!r}: must be a finite number, 0 or more; it is subtracted from the reward")
