"""PPO-ptx (arXiv 2203.02155, Section 3.5): a language-modelling loss beside PPO's, on texts that are to be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignkit.data.encode_dataset import columns_of, encode_dataset
from alignkit.data.encode_rows import LengthLimit, RowEncoder
from alignkit.data.records import Kind, kind_of
from alignkit.data.report import PreparationReport
from alignkit.data.tokenize import RecordTokenizer
from alignkit.errors import ConfigError
from alignkit.trainers.passes import Batch
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.ppo_data import completion_seed
from alignkit.trainers.ppo_score import groups_batch

_LABEL = "label"
TEXTS = "ptx"  # what the dataset is called in reports
PTX = "ptx_tokens"  # the column that tells a batch of texts from one of episodes


def prepare_texts(
    dataset: Dataset | Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, args: PPOConfig
) -> tuple[Dataset, PreparationReport]:
    """Turn rows into `prompt_ids` and `chosen_ids`: what is conditioned on, and what the policy is to keep saying.

    Rows are prompts with completions, conversations, or preferences, whose chosen side is taken. Where there are
    labels, rows that are labelled as undesirable are left out.

    Raises:
        DataError: columns that make no known format, or too many rows that cannot be used.
    """
    name, label = TEXTS, {_LABEL: True}
    columns = columns_of(dataset, name)
    if _LABEL not in columns and not {"chosen", "chosen_ids"} & set(columns):
        columns = [*columns, _LABEL]
        if isinstance(dataset, Dataset):
            dataset = dataset.add_column(_LABEL, [True] * len(dataset))
        else:
            dataset = [{**row, **label} for row in dataset]
    kind = kind_of(columns)
    encoder = RowEncoder(RecordTokenizer(tokenizer), kind, kind is Kind.UNPAIRED, (), LengthLimit(args.max_length))
    report = PreparationReport(name)
    encoded, kept = encode_dataset(dataset, columns, encoder, report, args.dataset_num_proc)
    report.finish(args.max_drop_fraction)
    prepared = encoded.select(kept)
    if kind is Kind.UNPAIRED:
        labels = prepared[_LABEL]
        prepared = prepared.select([row for row in range(len(prepared)) if labels[row]])
    if not len(prepared):
        raise ConfigError("ptx_dataset: every row is labelled as undesirable, so there is no text to keep")
    return prepared, report


def check_ptx(dataset: Any, args: PPOConfig) -> None:
    """See that there is a dataset where there is a weight, and the other way round.

    Raises:
        ConfigError: one without the other.
    """
    if args.ptx_coef and dataset is None:
        raise ConfigError(f"ptx_coef={args.ptx_coef} weighs a loss on ptx_dataset: pass ptx_dataset, or leave it at 0")
    if dataset is not None and not args.ptx_coef:
        raise ConfigError("ptx_dataset has no effect with ptx_coef=0: set ptx_coef (usual: 0.01 to 1), or leave it out")


class TextMix:
    """The texts of each optimizer step: as many as it has prompts, drawn anew for every step, with replacement.

    Args:
        dataset: from `prepare_texts`.
        args: of the run.
        process, processes: this one's rank, and how many there are.
    """

    def __init__(self, dataset: Dataset, args: PPOConfig, process: int, processes: int) -> None:
        self.dataset, self.args, self.process, self.processes = dataset, args, process, processes

    def batches(self, step: int, count: int) -> list[Batch]:
        """Take this process's texts for the `count` micro-batches of an optimizer step; `PTX` is the tokens of all.

        What is drawn depends on the run's seed and the step alone.
        """
        size = self.args.per_device_train_batch_size
        generator = torch.Generator().manual_seed(completion_seed(f"ptx/{self.args.seed}", step, 0))
        rows = torch.randint(len(self.dataset), (count, self.processes, size), generator=generator)
        tokens = sum(len(ids) for ids in self.dataset[rows.flatten().tolist()]["chosen_ids"])
        return [self._batch(micro[self.process].tolist(), tokens) for micro in rows]

    def _batch(self, rows: list[int], tokens: int) -> Batch:
        found = self.dataset[rows]
        batch = groups_batch(list(map(list, found["prompt_ids"])), list(map(list, found["chosen_ids"])))
        return batch | {PTX: torch.full((len(rows),), tokens)}


def text_loss(logps: Tensor, inputs: Mapping[str, Tensor], coef: float) -> Tensor:
    """A chunk's share of `−coef · mean log π(token)` over the tokens of an optimizer step's texts."""
    return -coef * logps.sum() / inputs[PTX][0]
