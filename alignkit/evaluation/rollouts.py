"""Greedy answers to held-out prompts before and after PPO: reward, KL and length, each with a 95 % interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate.utils import gather_object
from datasets import Dataset
from rich.table import Table
from rich.text import Text

from alignkit.errors import DataError
from alignkit.evaluation.generation import Answers
from alignkit.evaluation.preference import Estimate, accuracy_interval, mean_interval
from alignkit.trainers.ppo_evaluate import greedy_batches

if TYPE_CHECKING:
    from alignkit.trainers.ppo import PPOTrainer


class RatedAnswer(NamedTuple):
    """One greedy answer and what it earned.

    Attributes:
        row: of the dataset.
        prompt, answer: as text, without special tokens.
        reward: weighted sum of the rewards, before shaping; `None` where the sample was dropped.
        kl: k1 from the reference, summed over the answer's tokens, in nats; 0 where the sample was dropped.
        tokens: EOS included.
        is_finished: it ended by EOS or a stop string, and was not cut.
    """

    row: int
    prompt: str
    answer: str
    reward: float | None
    kl: float
    tokens: int
    is_finished: bool


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """A policy's greedy answers.

    Attributes:
        reward: mean over the answers that have one.
        kl: nats per answer, over the same.
        tokens: per answer.
        eos_rate: share of answers that ended by themselves.
        answers: all of them, in the order of the dataset.
    """

    reward: Estimate
    kl: Estimate
    tokens: Estimate
    eos_rate: Estimate
    answers: tuple[RatedAnswer, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        figures = {"reward": self.reward, "kl": self.kl, "tokens": self.tokens, "eos_rate": self.eos_rate}
        return {
            **{name: estimate._asdict() for name, estimate in figures.items()},
            "answers": [answer._asdict() for answer in self.answers],
        }


def summarize_rollouts(trainer: PPOTrainer, dataset: Dataset) -> RolloutSummary:
    """Answer every prompt of `dataset` greedily with the policy as it is now, on all processes together.

    Args:
        trainer: it generates, rewards and scores.
        dataset: prepared prompts, such as `trainer.eval_dataset` or a selection of it.

    Raises:
        DataError: the rows are not prepared, or no answer has a reward.
    """
    if "prompt_ids" not in dataset.column_names:
        raise DataError(
            f"rows with the columns {dataset.column_names} are not prepared: pass trainer.eval_dataset, or what "
            "prepare_prompts returns."
        )
    tokenizer = trainer.processing_class
    answers: list[RatedAnswer] = []
    for batch in greedy_batches(trainer, dataset):
        prompts = tokenizer.batch_decode(batch.prompts.ids, skip_special_tokens=True)
        rewards = zip(batch.rewards.totals.tolist(), batch.rewards.kept.tolist(), strict=True)
        answers += [
            RatedAnswer(row, prompt.strip(), text.strip(), reward if kept else None, kl, len(one.ids), one.finished)
            for row, prompt, text, (reward, kept), kl, one in zip(
                batch.rows, prompts, batch.texts, rewards, batch.kl.tolist(), batch.completions, strict=True
            )
        ]
    return summarize_answers(sorted(gather_object(answers)))


def summarize_answers(answers: Sequence[RatedAnswer]) -> RolloutSummary:
    """Summarize answers: means with bootstrap intervals, and the share that ended with Wilson's.

    Raises:
        DataError: no answer has a reward.
    """
    rewarded = [(answer.reward, answer.kl) for answer in answers if answer.reward is not None]
    if not rewarded:
        raise DataError("none of the held-out answers has a reward: see what was dropped in the log")
    rewards, kls = zip(*rewarded, strict=True)
    return RolloutSummary(
        reward=mean_interval(rewards),
        kl=mean_interval(kls),
        tokens=mean_interval([answer.tokens for answer in answers]),
        eos_rate=accuracy_interval(sum(answer.is_finished for answer in answers), len(answers)),
        answers=tuple(answers),
    )


def reward_change(before: RolloutSummary, after: RolloutSummary) -> Estimate:
    """Return the mean change of the reward, prompt by prompt, over prompts whose answer has one both times.

    Raises:
        DataError: there is no such prompt.
    """
    old = {answer.row: answer.reward for answer in before.answers}
    pairs = [(answer.reward, old.get(answer.row)) for answer in after.answers]
    changes = [new - earlier for new, earlier in pairs if new is not None and earlier is not None]
    if not changes:
        raise DataError("no prompt has a rewarded answer both before and after")
    return mean_interval(changes)


def rollouts_table(before: RolloutSummary, after: RolloutSummary) -> Table:
    """Return reward, KL, length and endings before and after, and the change of the reward prompt by prompt."""
    title = f"Greedy answers to {len(after.answers)} held-out prompts, 95 % intervals"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    table.add_row("reward", _interval(before.reward, 3), _interval(after.reward, 3))
    table.add_row("its change, prompt by prompt", "", _interval(reward_change(before, after), 3))
    table.add_section()
    table.add_row("KL from the reference, nats per answer", _interval(before.kl, 2), _interval(after.kl, 2))
    table.add_row("tokens per answer", _interval(before.tokens, 1), _interval(after.tokens, 1))
    table.add_row("answers that ended by themselves", _interval(before.eos_rate, 2), _interval(after.eos_rate, 2))
    return table


def rated_side_by_side(before: RolloutSummary, after: RolloutSummary, count: int) -> list[Answers]:
    """Return the first `count` prompts with both answers, each led by its reward."""
    old = {answer.row: answer for answer in before.answers}
    return [Answers(new.prompt, _rated(old[new.row]), _rated(new)) for new in after.answers[:count]]


def _rated(answer: RatedAnswer) -> str:
    reward = "no reward" if answer.reward is None else f"{answer.reward:+.2f}"
    return f"({reward}) {answer.answer}"


def _interval(estimate: Estimate, digits: int) -> Text:
    value, low, high = (f"{number:.{digits}f}" for number in estimate)
    return Text(f"{value} [{low}, {high}]")
