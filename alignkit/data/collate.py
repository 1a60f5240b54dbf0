"""Token rows to the batch that `DPOTrainer`, or a loop of one's own, works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.data.layout import Pairs
from alignkit.errors import DataError

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# Optional columns that travel with a pair, and the dtype that they travel in.
EXTRA_COLUMNS = {
    "weight": torch.float32,
    "margin": torch.float32,
    "label": torch.bool,
    "ref_chosen_logps": torch.float32,
    "ref_rejected_logps": torch.float32,
    "row_id": torch.int64,
}


@dataclass
class DPOCollator:
    """Gather tokenised pairs into a dict of tensors, without padding: the layout is chosen later.

    Rows have TRL's columns `prompt_ids`, `chosen_ids`, `rejected_ids`, and may have `weight`, `margin`, `label`,
    `ref_chosen_logps`, `ref_rejected_logps`, and `row_id`, by which messages name them. The batch holds

    - `lengths`: tokens of prompt, chosen and rejected, `(B, 3)`;
    - `input_ids`: `[prompt | chosen | rejected]` of every pair one after another, `(N,)`;
    - `(B,)` for each further column.

    Args:
        max_length: tokens of prompt + completion; what is longer loses its end, as in TRL. `None` for no limit.

    Raises:
        DataError: a row without one of the id columns, without a prompt, or without completion tokens that fit.
    """

    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate at least one row."""
        parts = [self._fit(number, row) for number, row in enumerate(rows)]
        batch = {
            "lengths": torch.tensor([[len(ids) for ids in row] for row in parts]),
            "input_ids": torch.tensor([token for row in parts for ids in row for token in ids]),
        }
        for column, dtype in EXTRA_COLUMNS.items():
            if column in rows[0]:
                batch[column] = torch.tensor([row[column] for row in rows], dtype=dtype)
        return batch

    def _fit(self, number: int, row: Mapping[str, Any]) -> tuple[list[int], list[int], list[int]]:
        missing = [column for column in ID_COLUMNS if column not in row]
        if missing:
            raise DataError(
                f"row {number} of the batch has no {', '.join(missing)}; it has {sorted(row)}. "
                "Tokenise the dataset with alignkit.prepare_preferences first."
            )
        prompt, chosen, rejected = (list(row[column]) for column in ID_COLUMNS)
        room = None if self.max_length is None else max(0, self.max_length - len(prompt))
        chosen, rejected = chosen[:room], rejected[:room]
        for name, ids in zip(("prompt", "chosen", "rejected"), (prompt, chosen, rejected), strict=True):
            if not ids:
                raise DataError(
                    f"row {number} of the batch has no {name} tokens"
                    + ("" if room is None else f" within max_length={self.max_length}")
                )
        return prompt, chosen, rejected


def pairs_of(batch: Mapping[str, Tensor]) -> Pairs:
    """View a collated batch as `Pairs`; lengths come to the CPU, where layouts are planned."""
    return Pairs(batch["input_ids"], batch["lengths"].cpu())


def split_batch(batch: Mapping[str, Tensor], pairs_per_part: list[int]) -> list[dict[str, Tensor]]:
    """Cut a collated batch into consecutive batches of the given numbers of pairs."""
    parts: list[dict[str, Tensor]] = []
    columns = {name: tensor.split(pairs_per_part) for name, tensor in batch.items() if name != "input_ids"}
    for number, pairs in enumerate(pairs_of(batch).split(pairs_per_part)):
        part = {name: tensors[number] for name, tensors in columns.items()}
        parts.append({"lengths": part.pop("lengths"), "input_ids": pairs.input_ids, **part})
    return parts


def add_columns(parts: Sequence[dict[str, Tensor]], columns: Mapping[str, Tensor]) -> None:
    """Give each part of a split batch its rows of further columns of the whole batch, without gradients."""
    sizes = [len(part["lengths"]) for part in parts]
    for name, tensor in columns.items():
        for part, rows in zip(parts, tensor.detach().split(sizes), strict=True):
            part[name] = rows
