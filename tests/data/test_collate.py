"""The collator: what a batch holds, how rows are cut, and what is refused."""

from __future__ import annotations

import pytest
import torch

from alignkit.data.collate import DPOCollator, pairs_of, split_batch
from alignkit.errors import DataError

ROWS = [
    {"prompt_ids": [10, 11, 12], "chosen_ids": [20, 21], "rejected_ids": [30]},
    {"prompt_ids": [13], "chosen_ids": [22], "rejected_ids": [31, 32, 33]},
    {"prompt_ids": [14, 15], "chosen_ids": [23], "rejected_ids": [34]},
]


def test_batch_is_flat_and_unpadded():
    batch = DPOCollator()(ROWS[:2])
    assert sorted(batch) == ["input_ids", "lengths"]
    assert batch["input_ids"].tolist() == [10, 11, 12, 20, 21, 30, 13, 22, 31, 32, 33]
    assert batch["lengths"].tolist() == [[3, 2, 1], [1, 1, 3]]
    assert batch["input_ids"].dtype == batch["lengths"].dtype == torch.int64


def test_tensor_and_tuple_rows_are_read():
    row = {"prompt_ids": torch.tensor([1, 2]), "chosen_ids": (3,), "rejected_ids": torch.tensor([4])}
    assert DPOCollator()([row])["input_ids"].tolist() == [1, 2, 3, 4]


def test_further_columns_travel_in_their_dtype_and_unknown_ones_stay_behind():
    rows = [
        {
            **row,
            "weight": number / 2,
            "margin": -number,
            "label": number == 1,
            "ref_chosen_logps": -1.5,
            "ref_rejected_logps": -2.5,
            "source": "x",
        }
        for number, row in enumerate(ROWS)
    ]
    batch = DPOCollator()(rows)
    assert "source" not in batch
    assert batch["weight"].tolist() == [0.0, 0.5, 1.0]
    assert batch["margin"].tolist() == [0.0, -1.0, -2.0]
    assert batch["margin"].dtype == torch.float32
    assert batch["label"].tolist() == [False, True, False]
    assert batch["label"].dtype == torch.bool
    assert batch["ref_chosen_logps"].tolist() == [-1.5] * 3


def test_max_length_cuts_each_sequence_at_its_end():
    batch = DPOCollator(max_length=4)(ROWS[:2])
    # Prompt of 3 leaves room for one token; prompt of 1 leaves room for three.
    assert batch["lengths"].tolist() == [[3, 1, 1], [1, 1, 3]]
    assert batch["input_ids"].tolist() == [10, 11, 12, 20, 30, 13, 22, 31, 32, 33]


def test_rows_are_not_changed():
    row = {"prompt_ids": [1], "chosen_ids": [2, 3, 4], "rejected_ids": [5]}
    DPOCollator(max_length=2)([row])
    assert row["chosen_ids"] == [2, 3, 4]


@pytest.mark.parametrize(
    ("row", "max_length", "message"),
    [
        ({"prompt_ids": [1], "chosen_ids": [2]}, None, r"row 1 of the batch has no rejected_ids; it has .*chosen_ids"),
        ({"prompt_ids": [], "chosen_ids": [2], "rejected_ids": [3]}, None, "row 1 of the batch has no prompt tokens$"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []}, None, "row 1 .* has no rejected tokens$"),
        (
            {"prompt_ids": [1] * 8, "chosen_ids": [2], "rejected_ids": [3]},
            8,
            "row 1 .* has no chosen tokens within max_length=8",
        ),
    ],
)
def test_bad_rows_name_themselves(row, max_length, message):
    with pytest.raises(DataError, match=message):
        DPOCollator(max_length)([ROWS[0], row])


def test_split_batch_cuts_tokens_and_columns_alike():
    batch = DPOCollator()([{**row, "weight": float(number)} for number, row in enumerate(ROWS)])
    first, second = split_batch(batch, [2, 1])
    assert first["input_ids"].tolist() == [10, 11, 12, 20, 21, 30, 13, 22, 31, 32, 33]
    assert first["weight"].tolist() == [0.0, 1.0]
    assert second["input_ids"].tolist() == [14, 15, 23, 34]
    assert second["lengths"].tolist() == [[2, 1, 1]]
    assert second["weight"].tolist() == [2.0]


def test_pairs_of_views_the_batch():
    pairs = pairs_of(DPOCollator()(ROWS))
    assert pairs.lengths.tolist() == [[3, 2, 1], [1, 1, 3], [2, 1, 1]]
    assert pairs.lengths.device.type == "cpu"
