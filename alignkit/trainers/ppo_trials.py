"""What the longest passes of PPO are made of: prompts with the longest completions, and the texts that are mixed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alignkit.trainers.longest_batch import Trial, lengths_of
from alignkit.trainers.passes import Batch
from alignkit.trainers.ppo_score import groups_batch, score_tokens

if TYPE_CHECKING:
    from alignkit.trainers.ppo import PPOTrainer


def ppo_trials(trainer: PPOTrainer) -> list[Trial]:
    """Episodes that were never written, each as long as it could become, and the texts of `ptx_dataset`."""
    args, dataset = trainer.args, _any(trainer.train_dataset)
    prompts = lengths_of(dataset, ["prompt_ids"])  # (N, 1)
    completions = torch.full((len(prompts), args.num_generations), args.max_completion_length)

    def collate(rows: Sequence[int]) -> Batch:
        ids = [list(dataset[row]["prompt_ids"]) for row in rows]
        # What a completion says does not change what it costs.
        written = [prompt[-1:] * args.max_completion_length for prompt in ids for _ in range(args.num_generations)]
        return groups_batch(ids, written)

    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        scores = score_tokens(trainer.bundle, trainer._passes.lay_out(inputs), args, wrapped=model)
        total = scores.logps.sum() + args.entropy_coef * scores.entropies.sum()
        return total if scores.values is None else total + scores.values.sum()

    episodes = Trial(torch.cat([prompts, completions], dim=1), collate, loss)
    return [episodes] if trainer._texts is None else [episodes, _texts(trainer, _any(trainer._texts.dataset))]


def _texts(trainer: PPOTrainer, dataset: Any) -> Trial:
    def collate(rows: Sequence[int]) -> Batch:
        found = dataset[list(rows)]
        return groups_batch(list(map(list, found["prompt_ids"])), list(map(list, found["chosen_ids"])))

    def loss(model: nn.Module, inputs: Batch) -> Tensor:
        return trainer.bundle.score(trainer._passes.lay_out(inputs), wrapped=model).logps.sum()

    return Trial(lengths_of(dataset, ["prompt_ids", "chosen_ids"]), collate, loss)


def _any(dataset: Any) -> Any:
    """A dataset is typed for less than what it can."""
    return dataset
