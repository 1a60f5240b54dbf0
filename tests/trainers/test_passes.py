"""Rows of an evaluation that accelerate repeats, so that all processes have batches of one size, do not count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from alignkit.trainers.passes import rows_not_repeated


@pytest.mark.parametrize(
    ("remainder", "is_last", "rows", "expected"),
    [
        (5, True, 4, [4, 1]),
        (3, True, 2, [2, 1]),
        (1, True, 2, [1, 0, 0]),
        (0, True, 4, [4, 4]),  # the last batches are full
        (-1, True, 4, [4, 4]),  # a stream, whose length nobody knows
        (5, False, 4, [4, 4]),
    ],
)
def test_repeated_rows_do_not_count(remainder: int, is_last: bool, rows: int, expected: list[int]):
    state = SimpleNamespace(end_of_dataloader=is_last, remainder=remainder)
    processes: list[Any] = [SimpleNamespace(gradient_state=state, process_index=i) for i in range(len(expected))]
    assert [rows_not_repeated(rows, process) for process in processes] == expected
