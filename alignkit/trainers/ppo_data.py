"""Which prompts a rollout takes: the same for any number of processes, and for a run that was resumed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from alignkit.errors import ConfigError
from alignkit.rollout.collect import Prompts
from alignkit.trainers.ppo_config import PPOConfig

logger = logging.getLogger(__name__)

# Columns that a prepared prompt has besides those that go to rewards.
OWN_COLUMNS = ("row_id", "prompt_ids", "prompt")


class RolloutSampler(Sampler[list[int]]):
    """Rows of each rollout for one process, repeated once for every micro-batch that is trained on.

    Trainer derives epochs, steps and what to skip after a resume from the number of batches, so a rollout is as many
    batches as it has micro-batches: the first is what the rollout is collected for, the others only tick.

    Args:
        rows: prompts in the dataset.
        args: of the run.
        process, processes: this one's rank, and how many there are.

    Raises:
        ConfigError: fewer prompts than one rollout takes.
    """

    def __init__(self, rows: int, args: PPOConfig, process: int, processes: int) -> None:
        self.rows, self.args, self.process, self.processes = rows, args, process, processes
        self.epoch = 0
        self.micro_batch = args.per_device_train_batch_size
        self.per_rollout = self.micro_batch * args.gradient_accumulation_steps * args.num_mini_batches * processes
        if rows < self.per_rollout:
            raise ConfigError(
                f"a rollout takes {self.per_rollout} prompts (per_device_train_batch_size={self.micro_batch} × "
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} × "
                f"num_mini_batches={args.num_mini_batches} × {processes} processes), and the dataset has {rows}: give "
                "more prompts, or lower one of these."
            )
        left_out = rows % self.per_rollout
        if left_out and process == 0:
            logger.warning(
                "every epoch leaves out %d of %d prompts, others each time, because a rollout takes %d",
                left_out,
                rows,
                self.per_rollout,
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows // self.per_rollout * self.ticks

    @property
    def ticks(self) -> int:
        """Micro-batches that a rollout is trained on by each process."""
        return self.args.num_ppo_epochs * self.args.num_mini_batches * self.args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        generator = torch.Generator().manual_seed(seed + self.epoch)
        order = torch.randperm(self.rows, generator=generator)
        for rows in order[: self.rows // self.per_rollout * self.per_rollout].split(self.per_rollout):
            # Every micro-batch of all processes together is a contiguous part, whatever their number.
            mine = rows.view(-1, self.processes, self.micro_batch)[:, self.process].flatten().tolist()
            for _ in range(self.ticks):
                yield mine


class RolloutLoader(DataLoader):
    """A data loader over row numbers whose sampler knows epochs."""

    def __init__(self, sampler: RolloutSampler) -> None:
        super().__init__(range(sampler.rows), batch_sampler=sampler, collate_fn=_as_rows)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def _as_rows(rows: list[int]) -> dict[str, Tensor]:
    return {"rows": torch.tensor(rows)}


def take_prompts(dataset: Dataset, rows: list[int], generations: int, key: str) -> Prompts:
    """Read prompts out of a prepared dataset and give each completion its seed.

    Args:
        dataset: from `prepare_prompts`.
        rows: which.
        generations: completions per prompt.
        key: what the seeds depend on besides the row and the completion's number: the run's seed and the rollout.
    """
    examples: list[dict[str, Any]] = [dataset[row] for row in rows]
    columns = [name for name in dataset.column_names if name not in OWN_COLUMNS]
    return Prompts(
        ids=[list(example["prompt_ids"]) for example in examples],
        sources=[example["prompt"] for example in examples],
        columns={name: [example[name] for example in examples] for name in columns},
        seeds=[[completion_seed(key, row, number) for number in range(generations)] for row in rows],
        rows=[example["row_id"] for example in examples],
    )


def completion_seed(key: str, row: int, number: int) -> int:
    """A seed in [0, 2⁶³) for completion `number` of row `row`, equal in every process and run."""
    digest = hashlib.blake2b(f"{key}/{row}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
