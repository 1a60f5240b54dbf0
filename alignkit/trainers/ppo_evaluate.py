"""Evaluation of a policy: greedy completions of held-out prompts, their reward and their KL from the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from datasets import Dataset

from alignkit.functional.kl import k1
from alignkit.rollout.collect import token_mask
from alignkit.trainers.pooled import Pooled, PooledWindow, deviation, mean
from alignkit.trainers.ppo_data import take_prompts
from alignkit.trainers.ppo_metrics import reward_metrics

if TYPE_CHECKING:
    from alignkit.trainers.ppo import PPOTrainer

# The smallest number of prompts that generate together; more come together where batches are larger.
FEWEST_PROMPTS = 16


@torch.no_grad()
def greedy_metrics(trainer: PPOTrainer, dataset: Dataset) -> dict[str, float]:
    """Complete every prompt of `dataset` once, at temperature 0; processes share the prompts.

    Returns:
        `reward` and `reward_std` (the weighted sum, before shaping), `kl` (k1, nats per completion),
        `mean_length` (tokens), `eos_rate`, and `rewards/*` of each component.
    """
    accelerator = trainer.accelerator
    rows = list(range(accelerator.process_index, len(dataset), accelerator.num_processes))
    window = PooledWindow()
    size = max(FEWEST_PROMPTS, trainer.args.per_device_eval_batch_size)
    for start in range(0, len(rows), size):
        window.add(_metrics_of(trainer, dataset, rows[start : start + size]))
    return window.means(accelerator)


def _metrics_of(trainer: PPOTrainer, dataset: Dataset, rows: list[int]) -> dict[str, Pooled]:
    prompts = take_prompts(dataset, rows, 1, "greedy")
    completions, _, rewards = trainer.complete(prompts, temperature=0.0)
    tokens = trainer.score(prompts.ids, [completion.ids for completion in completions])
    mask = token_mask(completions, rewards.kept)
    kl = torch.where(mask, k1(tokens.logps, tokens.ref_logps), 0).sum(1)[rewards.kept]
    kept = rewards.totals[rewards.kept]
    return {
        "reward": mean(kept),
        "reward_std": deviation(kept),
        "kl": mean(kl),
        "mean_length": mean(torch.tensor([float(len(completion.ids)) for completion in completions])),
        "eos_rate": mean(torch.tensor([completion.finished for completion in completions])),
        **reward_metrics(rewards),
    }
