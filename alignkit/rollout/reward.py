"""What a reward source is told, what it answers, and how it says that it cannot.

A source is anything that fits `RewardSource`: a function of the user (`alignkit.rollout.callables`), a sequence
classifier (`alignkit.rollout.classifier`), an adapter on the policy's own base. `alignkit.rollout.mix` adds them up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from alignkit.errors import DataError, TrainingError, printable

if TYPE_CHECKING:
    from transformers import TrainerState

# What every reward function may ask for by name; all other names are columns of the dataset.
STANDARD_ARGUMENTS = ("prompts", "completions", "prompt_ids", "completion_ids", "trainer_state")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardInputs:
    """B samples to score.

    Attributes:
        prompts: B strings, or B lists of messages.
        completions: B strings, or B lists of messages (`[{"role": "assistant", "content": ...}]`).
        prompt_ids: B lists of token ids of the policy's tokenizer.
        completion_ids: the same of the completions, EOS included where it was produced.
        columns: further columns of the dataset, each a list of B values.
        trainer_state: of the run, if there is one.

    Raises:
        DataError: lists of different lengths, or a column that has the name of a standard argument.
    """

    prompts: list[Any]
    completions: list[Any]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    trainer_state: TrainerState | None = None

    def __post_init__(self) -> None:
        check_column_names(self.columns)
        lists = {"completions": self.completions, "prompt_ids": self.prompt_ids, "completion_ids": self.completion_ids}
        for name, values in (lists | self.columns).items():
            if len(values) != len(self):
                raise DataError(f"'{name}' has {len(values)} entries for {len(self)} prompts; give one for each")

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, start: int, stop: int) -> RewardInputs:
        """Return the samples from `start` up to `stop`."""
        rows = slice(start, stop)
        return RewardInputs(
            prompts=self.prompts[rows],
            completions=self.completions[rows],
            prompt_ids=self.prompt_ids[rows],
            completion_ids=self.completion_ids[rows],
            columns={name: values[rows] for name, values in self.columns.items()},
            trainer_state=self.trainer_state,
        )


def check_column_names(columns: Iterable[str], dataset: str = "the dataset") -> None:
    """See that no column would take the place of a standard argument; `dataset` is what to call it.

    Raises:
        DataError: one would.
    """
    taken = sorted(set(columns) & set(STANDARD_ARGUMENTS))
    if taken:
        raise DataError(f"{dataset}'s column '{taken[0]}' has the name of an argument of rewards; rename it")


class ComponentScores(NamedTuple):
    """Scores of K components for B samples.

    Attributes:
        values: fp32 `(B, K)`, or `(B,)` for one component by itself; 0 where the component does not apply.
        applies: boolean of the same shape; False where a component has nothing to say about a sample.
    """

    values: Tensor
    applies: Tensor


@runtime_checkable
class RewardSource(Protocol):
    """Scores samples. `names` has one name for each of its K components."""

    names: tuple[str, ...]

    def __call__(self, inputs: RewardInputs) -> ComponentScores:
        """Return scores `(B, K)`.

        Raises:
            RewardError: some samples cannot be scored; it carries the scores of the others.
        """
        ...


class RewardFault(NamedTuple):
    """Why a sample has no score.

    Attributes:
        index: the sample, or `None` if the call failed as a whole.
        reason: what is counted: "raised", "timeout", "wrong type", "wrong length", "not finite", ...
        message: what was found and what to change.
    """

    index: int | None
    reason: str
    message: str


class RewardError(TrainingError):
    """A source that could not score some samples.

    Attributes:
        source: its name.
        faults: one for each such sample, or a single one for the whole call.
        scores: of all samples, with `applies` False at the faulty ones; `None` if the call failed as a whole.
    """

    def __init__(self, source: str, faults: Sequence[RewardFault], scores: ComponentScores | None = None) -> None:
        super().__init__(source, faults, scores)  # all in args, so that the error survives pickling between processes
        self.source = source
        self.faults = tuple(faults)
        self.scores = scores

    def __str__(self) -> str:
        fault, others = self.faults[0], len(self.faults) - 1
        where = "all samples of the call" if fault.index is None else f"sample {fault.index}"
        more = f" ({others} more of these samples cannot be scored either.)" if others else ""
        return printable(
            f"reward '{self.source}', {where}: {fault.message}{more} To leave such samples out and count them, choose "
            '"drop" for reward errors.'
        )


def single_component(values: Sequence[float | None]) -> ComponentScores:
    """Make scores `(B, 1)` of B numbers; `None` where the component does not apply."""
    numbers = torch.tensor([0.0 if value is None else value for value in values], dtype=torch.float32)
    applies = torch.tensor([value is not None for value in values], dtype=torch.bool)
    return ComponentScores(numbers[:, None], applies[:, None])
