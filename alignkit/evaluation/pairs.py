"""Held-out preferences of a policy or a reward model that no trainer holds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from alignkit.data.prepare import prepare_preferences
from alignkit.data.report import PreparationReport
from alignkit.data.sources import load_preferences
from alignkit.errors import ConfigError, DataError
from alignkit.evaluation.estimates import Estimate, McNemar, mcnemar, paired_difference_interval
from alignkit.evaluation.models import PolicyModel, load_evaluated
from alignkit.evaluation.preference import PreferenceSummary, summarize_pairs
from alignkit.evaluation.scoring import BATCH_TOKENS, completion_logps, context_tokens, sequence_rewards
from alignkit.functional.preference import LossOptions, PairLogps, PairTokens, combine, get_loss
from alignkit.functional.reward import bradley_terry
from alignkit.models.reward_files import RewardModel
from alignkit.rollout.classifier import base_of

MAX_LENGTH = 1024  # tokens of prompt and completion, the trainers' default

Rows = Dataset | IterableDataset | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class PreferenceScores:
    """Rewards of held-out pairs, row by row.

    Attributes:
        row_ids: of each pair, its row in the data as given; rows that could not be used are missing.
        losses, chosen_rewards, rejected_rewards: `(N,)`.
        chosen_tokens, rejected_tokens: lengths of the completions, `(N,)`.
        report: what data preparation kept and dropped.
    """

    row_ids: list[int]
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    report: PreparationReport

    def summary(self) -> PreferenceSummary:
        """Accuracy, margin, calibration and loss, with intervals."""
        rewards = (self.chosen_rewards.numpy(), self.rejected_rewards.numpy())
        return summarize_pairs(
            self.losses.mean().item(), *rewards, self.chosen_tokens.numpy(), self.rejected_tokens.numpy()
        )


class PreferenceChange(NamedTuple):
    """Two models on the same pairs.

    Attributes:
        rows: pairs that both scored.
        accuracy: the second's accuracy minus the first's, ties as halves, with a paired bootstrap interval.
        mcnemar: the pairs on which one of them does better (right beats a tie, a tie beats wrong), and how surprising
            their split is.
    """

    rows: int
    accuracy: Estimate
    mcnemar: McNemar


def compare_preferences(
    first: PreferenceScores, second: PreferenceScores, clusters: Sequence[Hashable] | None = None
) -> PreferenceChange:
    """Compare two models that scored the same data.

    Args:
        first, second: their scores.
        clusters: of each row of the data as given, such as its prompt, where prompts have several pairs.

    Raises:
        DataError: no pair that both scored.
    """
    margins = [
        dict(zip(one.row_ids, (one.chosen_rewards - one.rejected_rewards).tolist(), strict=True))
        for one in (first, second)
    ]
    common = [row_id for row_id in first.row_ids if row_id in margins[1]]
    if not common:
        raise DataError("no pair was scored by both models: score the same data with both")
    before, after = (np.array([values[row_id] for row_id in common]) for values in margins)
    members = common if clusters is None else [clusters[row_id] for row_id in common]
    old, new = ((values > 0) + 0.5 * (values == 0) for values in (before, after))
    return PreferenceChange(len(common), paired_difference_interval(new, old, members), mcnemar(old, new))


def evaluate_preferences(model: Any, dataset: str | Rows, **options: Any) -> PreferenceSummary:
    """Measure accuracy, margin, loss and calibration on held-out pairs; see `score_preferences` for the arguments."""
    return score_preferences(model, dataset, **options).summary()


def score_preferences(
    model: Any,
    dataset: str | Rows,
    *,
    split: str = "test",
    tokenizer: Any = None,
    reference: Any = None,
    loss_type: str | None = None,
    beta: float | None = None,
    max_length: int = MAX_LENGTH,
    max_drop_fraction: float = 0.2,
    batch_tokens: int = BATCH_TOKENS,
    quiet: bool = False,
) -> PreferenceScores:
    """Reward both completions of every pair: by β times the log-ratio to the reference, or by a reward model.

    The reference of an adapter is its base with the adapter off. Rows are tokenized and cut as the trainers do.

    Args:
        model: a name, a folder, a model in memory, a `PolicyModel` or a `RewardModel`.
        dataset: preferences in any format that `prepare_preferences` reads, or a name that `load_preferences` knows.
        split: of a dataset given by name.
        tokenizer: by default the model's own.
        reference: a separate reference, for a model without adapters.
        loss_type: of a policy, a loss on pairs; by default "sigmoid". A reward model has Bradley-Terry's.
        beta: of a policy, as in training; by default 0.1.
        max_length: tokens of prompt and completion. A policy's completions lose their end; a reward model, which reads
            the end, drops the row.
        max_drop_fraction: the share of rows that may be dropped; more is an error.
        batch_tokens: most tokens in one forward pass.
        quiet: show no progress.

    Raises:
        DataError: no pairs that can be used.
        ModelError: no such model, or a policy without a reference.
        ConfigError: options that would have no effect.
        TrainingError: rewards that are not finite.
    """
    loaded = load_evaluated(model, tokenizer, reference=reference)
    if isinstance(loaded, RewardModel) and (loss_type is not None or beta is not None):
        raise ConfigError("loss_type and beta belong to a policy's loss, and this is a reward model: leave them out")
    rows = load_preferences(dataset, split=split) if isinstance(dataset, str) else dataset
    base: Any = loaded.bundle.base if isinstance(loaded, PolicyModel) else base_of(loaded.model)
    prepared, report = prepare_preferences(
        rows,
        loaded.tokenizer,
        max_length=min(max_length, context_tokens(base) or max_length),
        drop_longer=isinstance(loaded, RewardModel),
        max_drop_fraction=max_drop_fraction,
        name="held-out pairs",
    )
    pairs: list[dict[str, Any]] = [dict(row) for row in prepared]
    passes = {"batch_tokens": batch_tokens, "quiet": quiet}
    if isinstance(loaded, RewardModel):
        return _by_reward(loaded, pairs, report, passes)
    return _by_policy(loaded, pairs, report, passes, loss_type or "sigmoid", 0.1 if beta is None else beta)


def _by_policy(
    policy: PolicyModel,
    pairs: list[dict[str, Any]],
    report: PreparationReport,
    passes: Mapping[str, Any],
    loss_type: str,
    beta: float,
) -> PreferenceScores:
    loss = get_loss(loss_type)
    if loss.unpaired:
        raise ConfigError(f"loss_type='{loss_type}' reads single completions; evaluate pairs with a loss on pairs")
    groups = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in pairs]
    found = completion_logps(policy, groups, with_reference=loss.needs_reference, **passes)
    sums = torch.stack([torch.stack([one.policy.sum(), one.reference.sum()]) for one in found])  # (2N, 2)
    ours, theirs = (PairLogps(column[0::2], column[1::2]) for column in sums.unbind(1))
    tokens = _tokens(pairs)
    result = combine(
        [(loss, 1.0)],
        ours,
        theirs if loss.needs_reference else None,
        options=LossOptions(beta=beta),
        tokens=tokens,
        margin=_numbers(pairs, "margin"),
    )
    return _scores(pairs, report, tokens, result.losses, result.chosen_rewards, result.rejected_rewards)


def _by_reward(
    reward: RewardModel, pairs: list[dict[str, Any]], report: PreparationReport, passes: Mapping[str, Any]
) -> PreferenceScores:
    _refuse_labels(reward)
    completions = ("chosen_ids", "rejected_ids")
    sequences = [[*row["prompt_ids"], *row[name]] for row in pairs for name in completions]
    rewards = sequence_rewards(reward, sequences, **passes)  # (2N, K)
    losses = bradley_terry(rewards[0::2], rewards[1::2], margin=_numbers(pairs, "margin")).losses
    chosen, rejected = rewards[0::2].mean(1), rewards[1::2].mean(1)
    return _scores(pairs, report, _tokens(pairs), losses, chosen, rejected)


def _refuse_labels(reward: RewardModel) -> None:
    """Several outputs of ours are an ensemble; those that have names are labels, whose mean means nothing."""
    labels = base_of(reward.model).config.id2label or {}
    if len(labels) > 1 and not all(str(text).startswith("LABEL_") for text in labels.values()):
        raise ConfigError(
            f"the reward model tells the labels {list(labels.values())} apart, and no single one is its reward: "
            "evaluate a model with one output"
        )


def _tokens(pairs: list[dict[str, Any]]) -> PairTokens:
    return PairTokens(*(torch.tensor([len(row[name]) for row in pairs]) for name in ("chosen_ids", "rejected_ids")))


def _numbers(pairs: list[dict[str, Any]], column: str) -> Tensor | None:
    return torch.tensor([row[column] for row in pairs], dtype=torch.float64) if column in pairs[0] else None


def _scores(
    pairs: list[dict[str, Any]],
    report: PreparationReport,
    tokens: PairTokens,
    losses: Tensor,
    chosen: Tensor,
    rejected: Tensor,
) -> PreferenceScores:
    ids = [int(row["row_id"]) for row in pairs]
    return PreferenceScores(ids, losses, chosen, rejected, tokens.chosen, tokens.rejected, report)
