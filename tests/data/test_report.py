"""The report's numbers and its table."""

from __future__ import annotations

import json

import pytest
from rich.table import Table

from alignkit.data.reasons import BadRow, DropReason
from alignkit.data.report import PreparationReport
from alignkit.errors import DataError


def filled() -> PreparationReport:
    report = PreparationReport("eval")
    for row_id in range(30):
        report.drop(row_id, DropReason.EMPTY, f"[bold]chosen {row_id}[/bold] is empty")
    for length in range(1, 101):
        report.keep(100 + length, {"prompt": [length]}, truncated=2, eos_lost=length > 98, not_prefix=length == 1)
    return report


def test_counts_and_quantiles() -> None:
    report = filled()
    assert (report.rows_in, report.rows_kept, report.rows_dropped) == (130, 100, 30)
    assert report.truncated_completions == 200
    assert report.eos_lost.row_ids == [199, 200]
    assert report.not_prefix.row_ids == [101]
    assert report.quantiles() == {"prompt": {"min": 1, "median": 50, "p95": 95, "max": 100}}
    assert report.drops[DropReason.EMPTY].count == 30
    assert report.drops[DropReason.EMPTY].row_ids == list(range(20))


def test_the_table_holds_everything() -> None:
    report = filled()
    assert isinstance(report.table(), Table)
    text = " ".join(report.text().split())
    for part in (
        "Preparation of eval",
        "rows read",
        "130",
        "dropped: empty",
        "18, 19, …",
        "[bold]chosen 0[/bold] is empty",
    ):
        assert part in text
    for part in ("completions truncated", "200", "EOS lost", "199, 200", "min 1, median 50, p95 95, max 100"):
        assert part in text


def test_as_dict_is_json() -> None:
    assert json.loads(json.dumps(filled().as_dict())) == filled().as_dict()


def test_check() -> None:
    filled().check(0.24)
    with pytest.raises(
        DataError, match=r"eval: 30 of 130 rows \(23\.1%\) were dropped, more than max_drop_fraction=0\.2"
    ):
        filled().check(0.2)
    empty = PreparationReport()
    empty.check(0.0)
    empty.drop(0, DropReason.EMPTY, "")
    with pytest.raises(DataError, match="none of the 1 rows can be used"):
        empty.check(1.0)


def test_the_values_of_reasons_are_stable() -> None:
    assert [reason.value for reason in DropReason] == [
        "not text",
        "empty",
        "identical",
        "identical after truncation",
        "prompt fills the length",
        "prompt longer than max_prompt_tokens",
        "longer than max_length",
        "wrong roles",
        "chosen does not continue the prompt",
        "not a number",
        "not a label",
        "not token ids",
        "bad tools or chat_template_kwargs",
        "chat template refuses the row",
    ]
    assert str(BadRow(DropReason.EMPTY, "chosen is empty")) == "empty: chosen is empty"
