"""Evaluation of a policy: greedy completions of held-out prompts, their reward and their KL from the reference."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from alignkit.errors import TrainingError
from alignkit.functional.kl import k1
from alignkit.rollout.collect import Prompts, token_mask
from alignkit.rollout.engine import Completion
from alignkit.rollout.mix import RewardResult
from alignkit.trainers.guards import ROW_ID, few
from alignkit.trainers.pooled import Pooled, PooledWindow, deviation, mean
from alignkit.trainers.ppo_data import take_prompts
from alignkit.trainers.ppo_metrics import reward_metrics

if TYPE_CHECKING:
    from alignkit.trainers.ppo import PPOTrainer

logger = logging.getLogger(__name__)

# The smallest number of prompts that generate together; more come together where batches are larger.
FEWEST_PROMPTS = 16


class GreedyBatch(NamedTuple):
    """Greedy completions of B prompts.

    Attributes:
        rows: of the dataset.
        prompts: what was asked.
        completions: what came, EOS included.
        texts: the completions as text, without special tokens.
        rewards: what the sources said.
        kl: k1 from the reference, nats per completion `(B,)`; 0 for dropped samples.
    """

    rows: list[int]
    prompts: Prompts
    completions: list[Completion]
    texts: list[str]
    rewards: RewardResult
    kl: Tensor


def greedy_metrics(trainer: PPOTrainer, dataset: Dataset) -> dict[str, float]:
    """Complete every prompt of `dataset` once, at temperature 0; processes share the prompts.

    Returns:
        `reward` and `reward_std` (the weighted sum, before shaping), `kl` (k1, nats per completion),
        `mean_length` (tokens), `eos_rate`, and `rewards/*` of each component.

    Raises:
        TrainingError: every completion was dropped.
    """
    window, bad = PooledWindow(), list[int]()
    for batch in greedy_batches(trainer, dataset):
        window.add(_metrics_of(batch))
        bad += [row for row, kl in zip(batch.rows, batch.kl.tolist(), strict=True) if not math.isfinite(kl)]
    if bad:
        logger.warning(
            "evaluation after step %d: log-probability is not finite (rows %s of the data).",
            trainer.state.global_step,
            few([dataset[row][ROW_ID] for row in bad]),
        )
    if not window.figures():  # more processes than prompts: figures of the same names, in which nothing counts
        of_one = _metrics_of(_complete(trainer, dataset, [0]))
        window.add({name: Pooled(kind, 0 * sums) for name, (kind, sums) in of_one.items()})
    found = window.means(trainer.accelerator)
    if "reward" not in found:
        raise TrainingError(
            f"none of the {len(dataset)} held-out completions has a reward: all were dropped. on_reward_error='raise' "
            "stops at the first of them and says why."
        )
    return found


def greedy_batches(trainer: PPOTrainer, dataset: Dataset) -> Iterator[GreedyBatch]:
    """Complete this process's share of the prompts of `dataset` once each, at temperature 0."""
    accelerator = trainer.accelerator
    rows = list(range(accelerator.process_index, len(dataset), accelerator.num_processes))
    size = max(FEWEST_PROMPTS, trainer.args.per_device_eval_batch_size)
    if not rows:  # forward passes are where processes meet (layout, DDP's buffers), so each makes one
        _complete(trainer, dataset, [0])
    for start in range(0, len(rows), size):
        yield _complete(trainer, dataset, rows[start : start + size])


@torch.no_grad()
def _complete(trainer: PPOTrainer, dataset: Dataset, rows: list[int]) -> GreedyBatch:
    prompts = take_prompts(dataset, rows, 1, "greedy")
    completions, texts, rewards, _ = trainer.complete(prompts, temperature=0.0)
    tokens = trainer.score(prompts.ids, [completion.ids for completion in completions])
    mask = token_mask(completions, rewards.kept)
    kl = torch.where(mask, k1(tokens.logps, tokens.ref_logps), 0).sum(1)
    return GreedyBatch(rows, prompts, completions, texts, rewards, kl)


def _metrics_of(batch: GreedyBatch) -> dict[str, Pooled]:
    kept = batch.rewards.kept
    rewards = batch.rewards.totals[kept]
    return {
        "reward": mean(rewards),
        "reward_std": deviation(rewards),
        "kl": mean(batch.kl[kept]),
        "mean_length": mean(torch.tensor([float(len(completion.ids)) for completion in batch.completions])),
        "eos_rate": mean(torch.tensor([completion.finished for completion in batch.completions])),
        **reward_metrics(batch.rewards),
    }
