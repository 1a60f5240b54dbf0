"""The most expensive pass of a run, made before training starts: memory runs out in the first seconds, or never."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn

from alignkit.data.collate import ID_COLUMNS, DPOCollator
from alignkit.data.layout import group_costs
from alignkit.trainers.boundary import random_states, set_random_states
from alignkit.trainers.passes import Batch, accumulate

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 10_000


class Trial(NamedTuple):
    """Rows that passes are made of.

    Attributes:
        lengths: tokens of each row's prompt and completions, `(N, 1 + C)`.
        collate: makes a batch of these rows.
        loss: a forward pass of a batch, whose backward pass takes what training's takes.
    """

    lengths: Tensor
    collate: Callable[[Sequence[int]], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]


def pair_trials(trainer: Any, loss: Callable[[nn.Module, Batch], Tensor]) -> list[Trial]:
    """The pairs of the training data.

    They are collated by our own collator: one that the user made may count what it is given, or draw random numbers.
    """
    dataset, collate = trainer.train_dataset, DPOCollator(trainer.args.max_length)
    return [Trial(lengths_of(dataset, ID_COLUMNS), lambda rows: collate([dataset[row] for row in rows]), loss)]


def lengths_of(dataset: Dataset, columns: Sequence[str]) -> Tensor:
    """Tokens in these columns of every row, `(N, columns)`."""
    tables: Any = dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
    parts = [np.stack([_lengths(table[column]) for column in columns], axis=1) for table in tables]
    return torch.from_numpy(np.concatenate(parts)).long()


def _lengths(column: Any) -> np.ndarray:
    return np.concatenate([chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in column.chunks])


def most_expensive_rows(costs: Tensor, most_rows: int, max_tokens: int | None) -> list[int]:
    """Rows of the largest pass that a micro-batch can give: the longest row, and with it as much as fits.

    Args:
        costs: tokens of each row `(N,)`.
        most_rows: of a micro-batch.
        max_tokens: of a pass; `None` for whole micro-batches. A longer row is a pass by itself.
    """
    falling, order = costs.sort(descending=True, stable=True)
    chosen, total, place = [0], int(falling[0]), 1
    while len(chosen) < most_rows:
        if max_tokens is not None:  # the next row that fits into what is left
            place = max(place, int(torch.searchsorted(-falling, total - max_tokens)))
        if place >= len(falling):
            break
        chosen.append(place)
        total += int(falling[place])
        place += 1
    return order[chosen].tolist()


def try_longest_batch(trainer: Any) -> None:
    """Make the most expensive passes of a run forward and backward, and leave no trace but a smaller token budget.

    Streams are read for nothing: how long their rows are is not known. Under FSDP and DeepSpeed passes cannot be cut.

    Args:
        trainer: one that guards its steps.

    Raises:
        TrainingError: a single row does not fit.
    """
    passes, bundle = trainer._passes, trainer.bundle
    if trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    if not isinstance(trainer.train_dataset, Dataset):
        logger.info("The training data is a stream: whether its longest batch fits into memory shows when it comes.")
        return
    layout, attention, kernels = passes.layout, bundle.attention_implementations, set(bundle.kernels)
    generators = random_states()
    try:
        for trial in trainer.trials():
            passes.memory.fit(lambda trial=trial: _make(trainer, trial), lambda: _drop_gradients(trainer))
    finally:
        _drop_gradients(trainer)
        set_random_states(generators)
        bundle.kernels.clear()
        bundle.kernels.update(kernels)
        if layout is None:  # the first batch of training decides
            passes.layout = None
            bundle.use_own_attention(attention)


def _make(trainer: Any, trial: Trial) -> None:
    passes, accelerator, model = trainer._passes, trainer.accelerator, trainer.model_wrapped
    model.train()
    longest = int(trial.lengths.sum(1).argmax())
    passes.lay_out(trainer._prepare_inputs(trial.collate([longest])))  # what rows cost depends on the layout
    costs = group_costs(trial.lengths, passes.layout)
    rows = most_expensive_rows(costs, trainer.args.per_device_train_batch_size, passes.max_tokens)
    batch: Any = trainer._prepare_inputs(trial.collate(rows))

    def step(chunk: Batch) -> Tensor:
        with passes.precision():
            loss = trial.loss(model, chunk)
        accelerator.backward(loss)
        return loss.detach()

    with accelerator.no_sync(model):
        accumulate(step, [batch], model, accelerator, trainer.args)


def _drop_gradients(trainer: Any) -> None:
    trainer.model_wrapped.zero_grad(set_to_none=True)
