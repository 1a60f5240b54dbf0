"""Several reward sources as one: a weighted sum, with every failure either an error or a counted loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from alignkit.errors import ConfigError, DataError, TrainingError, nearest
from alignkit.rollout.background import BackgroundLoop
from alignkit.rollout.callables import CallableReward
from alignkit.rollout.reward import (
    ComponentScores,
    RewardError,
    RewardFault,
    RewardInputs,
    RewardSource,
    check_column_names,
)

OnError = Literal["raise", "drop"]
NOTHING_APPLIES = "no source applies"


class RewardResult(NamedTuple):
    """Rewards of B samples, on the CPU.

    Attributes:
        totals: fp32 `(B,)`, the weighted sums; 0 where a sample is not kept.
        components: by name, what each source said, `(B,)`; of samples that are not kept too, where it said something.
        kept: boolean `(B,)`, False for dropped samples.
        dropped: `"<source>: <reason>"` to the number of samples that were dropped for it; each counts once.
        fault: what the first failure said; empty where there was none.
    """

    totals: Tensor
    components: dict[str, ComponentScores]
    kept: Tensor
    dropped: dict[str, int]
    fault: str = ""


class _Outcome(NamedTuple):
    """What one source made of all samples: scores `(B, K)`, and why the samples in `faults` have none."""

    scores: ComponentScores
    faults: dict[int, RewardFault]


class RewardMix:
    """Adds up reward sources: `r_i = Σ_k w_k r_ik` over the components k that apply to sample i.

    Functions run under a time limit, if there is one; async ones run at the same time as all others. Without a limit, a
    sync function runs in the calling thread, as functions that use signals must.

    Args:
        sources: what scores.
        weights: one for each component, in the order of `names`; by default 1. A component of weight 0 is only watched.
        on_error: what becomes of a sample that a source fails on, or that no source of weight other than 0 applies to:
            "raise" an error, or "drop" the sample and count it. A call that fails as a whole fails all its samples.
        timeout_s: seconds that one call of a function may take.
        samples_per_call: samples that a function is called with at once, by default all. With "drop", fewer samples are
            lost when a call fails.

    Attributes:
        names: of all components; equal names are numbered.

    Raises:
        ConfigError: no source, or options that make no sense.
    """

    def __init__(
        self,
        sources: Sequence[RewardSource],
        weights: Sequence[float] | None = None,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
        samples_per_call: int | None = None,
    ) -> None:
        if not sources:
            raise ConfigError("there is no reward: give at least one function, classifier or adapter")
        self.sources = tuple(sources)
        names = numbered([name for source in self.sources for name in source.names])
        self.names = tuple(names)
        taken = iter(names)
        self._names = [tuple(next(taken) for _ in source.names) for source in self.sources]
        self._weights = _checked_weights(weights, self.names)
        if on_error not in get_args(OnError):
            raise ConfigError(
                f'on_error={on_error!r}: must be "raise" or "drop".{nearest(on_error, get_args(OnError))}'
            )
        if timeout_s is not None and not (math.isfinite(timeout_s) and timeout_s > 0):
            raise ConfigError(
                f"timeout_s={timeout_s!r}: must be a positive, finite number of seconds, or None for no limit"
            )
        if samples_per_call is not None and samples_per_call < 1:
            raise ConfigError(f"samples_per_call={samples_per_call!r}: must be 1 or more, or None for all")
        self.on_error, self.timeout_s, self.samples_per_call = on_error, timeout_s, samples_per_call
        self._loop = BackgroundLoop()

    def check_columns(self, columns: Collection[str], dataset: str = "the dataset") -> None:
        """Check, before any sample exists, that a dataset has the columns that functions ask for.

        Raises:
            ConfigError: a function asks for something else.
            DataError: a column has the name of a standard argument.
        """
        check_column_names(columns, dataset)
        for source in self.sources:
            if isinstance(source, CallableReward):
                source.check_columns(columns, dataset)

    def __call__(self, inputs: RewardInputs) -> RewardResult:
        """Score B samples.

        Raises:
            RewardError: a source failed on a sample and `on_error` is "raise".
            TrainingError: no source applies to a sample and `on_error` is "raise".
            ConfigError: a function asks for a column that is not there.
            DataError: there are no samples.
        """
        if not len(inputs):
            raise DataError("there are no samples to reward")
        outcomes = self._outcomes(inputs)
        values = torch.cat([outcome.scores.values for outcome in outcomes], dim=1)  # (B, K)
        applies = torch.cat([outcome.scores.applies for outcome in outcomes], dim=1)  # (B, K)
        causes = self._causes(outcomes, applies)
        kept = torch.tensor([index not in causes for index in range(len(inputs))])
        totals = (torch.where(applies, values, 0.0) * self._weights).sum(dim=1)  # (B,)
        columns = zip(self.names, values.unbind(1), applies.unbind(1), strict=True)
        return RewardResult(
            totals=torch.where(kept, totals, 0.0),
            components={name: ComponentScores(column, counts) for name, column, counts in columns},
            kept=kept,
            dropped=dict(Counter(causes.values())),
            fault=next((fault.message for outcome in outcomes for fault in outcome.faults.values()), ""),
        )

    def _outcomes(self, inputs: RewardInputs) -> list[_Outcome]:
        """Start every async function, let the other sources work in turn, and wait for the async ones last."""
        begun = [list(self._begin(source, inputs)) for source in self.sources]
        outcomes: dict[int, _Outcome] = {}
        for index in sorted(range(len(begun)), key=lambda index: _is_async(self.sources[index])):
            names = self._names[index]
            outcomes[index] = _join([self._finish(names, rows, finish) for rows, finish in begun[index]])
        return [outcomes[index] for index in range(len(begun))]

    def _begin(
        self, source: RewardSource, inputs: RewardInputs
    ) -> Iterator[tuple[range, Callable[[], ComponentScores]]]:
        if not isinstance(source, CallableReward):
            yield range(len(inputs)), partial(source, inputs)
            return
        size = self.samples_per_call or len(inputs)
        for start in range(0, len(inputs), size):
            part = inputs.part(start, start + size)
            yield range(start, start + len(part)), source.begin(part, self._loop, self.timeout_s)

    def _finish(self, names: tuple[str, ...], rows: range, finish: Callable[[], ComponentScores]) -> _Outcome:
        """Wait for one call; return its scores, and its faults under the samples' numbers in the whole batch."""
        faults: tuple[RewardFault, ...] = ()
        try:
            scores = finish()
        except RewardError as error:
            if self.on_error == "raise":
                moved = [_moved(fault, rows.start) for fault in error.faults]
                raise RewardError(names[0], moved, error.scores) from error
            faults, scores = error.faults, error.scores or _no_scores(len(rows), len(names))
        scores = _checked(scores, names, len(rows))
        not_finite = _not_finite(scores)
        if not_finite and self.on_error == "raise":
            raise RewardError(names[0], [_moved(fault, rows.start) for fault in not_finite], scores)
        lost = _by_sample([_moved(fault, rows.start) for fault in (*faults, *not_finite)], rows)
        fine = torch.tensor([index not in lost for index in rows])[:, None]  # (B, 1)
        return _Outcome(ComponentScores(torch.where(fine, scores.values, 0.0), scores.applies & fine), lost)

    def _causes(self, outcomes: list[_Outcome], applies: Tensor) -> dict[int, str]:
        """Say for each sample that is lost what its first failure was."""
        causes: dict[int, str] = {}
        for names, outcome in zip(self._names, outcomes, strict=True):
            for index, fault in outcome.faults.items():
                causes.setdefault(index, f"{names[0]}: {fault.reason}")
        speaks = (applies & (self._weights != 0)).any(dim=1)  # (B,)
        for index in (~speaks).nonzero().flatten().tolist():
            if index not in causes and self.on_error == "raise":
                raise TrainingError(
                    f"sample {index}: no reward applies; {_listed(self.names)} returned None or weigh 0. Add a reward "
                    'that applies to every sample, or choose "drop" for reward errors to leave such samples out.'
                )
            causes.setdefault(index, NOTHING_APPLIES)
        return causes


def why_all_dropped(rewards: RewardResult) -> str:
    """Say why nothing is left of rewards of which every sample was dropped."""
    reasons = ", ".join(f"{reason} ({count})" for reason, count in rewards.dropped.items())
    return f"all {len(rewards.kept)} samples were dropped: {reasons}. {rewards.fault}".rstrip()


def numbered(names: Sequence[str]) -> list[str]:
    """Make names unique: the second `x` becomes `x_2`, the third `x_3`."""
    result: list[str] = []
    for name in names:
        unique, number = name, 1
        while unique in result:
            number += 1
            unique = f"{name}_{number}"
        result.append(unique)
    return result


def _checked_weights(weights: Sequence[float] | None, names: tuple[str, ...]) -> Tensor:
    """Return weights `(K,)`."""
    if weights is None:
        return torch.ones(len(names))
    if len(weights) != len(names):
        raise ConfigError(
            f"{len(weights)} reward weights for {len(names)} rewards ({_listed(names)}): give one for each"
        )
    for name, weight in zip(names, weights, strict=True):
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"the weight {weight!r} of reward '{name}' must be a finite number")
    if not any(weights):
        raise ConfigError(f"all reward weights ({_listed(names)}) are 0, so nothing would be learned")
    return torch.tensor(weights, dtype=torch.float32)


def _checked(scores: ComponentScores, names: tuple[str, ...], count: int) -> ComponentScores:
    """Bring what a source returned to the CPU; functions were checked before, sources of other kinds were not."""
    values, applies = (tensor.detach().cpu() for tensor in scores)
    shape = (count, len(names))
    if values.shape != shape or applies.shape != shape or applies.dtype != torch.bool:
        found = f"values {tuple(values.shape)} and applies {tuple(applies.shape)} of {applies.dtype}"
        fault = RewardFault(
            None, "wrong length", f"the source returned {found}; both must be {shape}, applies boolean."
        )
        raise RewardError(names[0], [fault])
    return ComponentScores(values.float(), applies)


def _not_finite(scores: ComponentScores) -> list[RewardFault]:
    bad = (scores.applies & ~scores.values.isfinite()).any(dim=1)
    return [
        RewardFault(
            row,
            "not finite",
            f"the reward is {[round(value, 4) for value in scores.values[row].tolist()]} in float32. Return a finite "
            "number, or None where the reward does not apply.",
        )
        for row in bad.nonzero().flatten().tolist()
    ]


def _moved(fault: RewardFault, start: int) -> RewardFault:
    return fault if fault.index is None else fault._replace(index=fault.index + start)


def _by_sample(faults: Sequence[RewardFault], rows: range) -> dict[int, RewardFault]:
    """Give a failure of the whole call to each of its samples."""
    return {index: fault for fault in faults for index in (rows if fault.index is None else [fault.index])}


def _no_scores(count: int, components: int) -> ComponentScores:
    return ComponentScores(torch.zeros(count, components), torch.zeros(count, components, dtype=torch.bool))


def _is_async(source: RewardSource) -> bool:
    return isinstance(source, CallableReward) and source.is_async


def _join(outcomes: list[_Outcome]) -> _Outcome:
    values = torch.cat([outcome.scores.values for outcome in outcomes])
    applies = torch.cat([outcome.scores.applies for outcome in outcomes])
    faults = {index: fault for outcome in outcomes for index, fault in outcome.faults.items()}
    return _Outcome(ComponentScores(values, applies), faults)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
