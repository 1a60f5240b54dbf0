"""Confidence intervals in closed form."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927; Eq. 4 of Brown, Cai and DasGupta 2001).

    `(p + z²/2n ± z sqrt(p(1 − p)/n + z²/4n²)) / (1 + z²/n)` with `p = successes / trials` and z the normal quantile. It
    stays within [0, 1] and has a width even where every trial succeeded.

    Args:
        successes: from 0 to `trials`.
        trials: at least 1.
        confidence: chance that the interval covers the true share.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials} is not a share")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    center = share + z * z / (2 * trials)
    reach = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (center - reach) / scale), min(1.0, (center + reach) / scale)


def zero_rate_bound(trials: int, confidence: float = 0.95) -> float:
    """Upper bound of a rate of which `trials` trials have shown no case: `1 − (1 − confidence)^(1/trials)`.

    The rule of three (Hanley and Lippman-Hand 1983): at 95 % and more than a few trials it is about `3 / trials`. It is
    one-sided and exact: were the rate as high as this, a case would have come up with the chance `confidence`.

    Raises:
        ValueError: no trials.
    """
    if trials < 1:
        raise ValueError(f"{trials} trials say nothing about a rate")
    return 1 - (1 - confidence) ** (1 / trials)
