"""Rows of every kind: each is kept whole and right, or dropped with a reason, or the dataset is refused in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from alignkit.data.prepare import prepare_preferences
from alignkit.data.reasons import DropReason
from alignkit.data.report import PreparationReport
from alignkit.errors import AlignkitError
from tests.fuzz.harness import effort, is_printable, try_all
from tests.fuzz.rows import FORMATS, PAIRED_FORMATS, TEXT_FORMATS, clean_datasets, datasets
from tests.fuzz.templates import WORKING

Tokenizers = dict[str, PreTrainedTokenizerBase]
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
LIMITS = st.sampled_from([None, None, 2, 5, 9, 16, 27, 60, 100, 200, 1000])
FAMILIES = st.sampled_from(["bytes", "dummy prefix", "words"])
TEMPLATES = st.sampled_from([*sorted(WORKING), None])


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    """The rows in a table, if one can hold them."""
    try:
        return Dataset.from_list(rows, on_mixed_types="use_json")
    except Exception:  # noqa: BLE001 (whatever Arrow and `datasets` say to rows that make no table)
        return rows


FORMS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": list,
    "dataset": as_dataset,
    "stream": lambda rows: IterableDataset.from_generator(rows.__iter__),
}


def with_template(tokenizers: Tokenizers, family: str, name: str | None) -> PreTrainedTokenizerBase:
    tokenizer = tokenizers[family]
    tokenizer.chat_template = None if name is None else WORKING[name]
    return tokenizer


def check_counts(report: PreparationReport, rows_in: int, kept: list[int]) -> None:
    """Every row given is kept once or dropped once, under a reason, and the report can be shown and written."""
    dropped = [row for count in report.drops.values() for row in count.row_ids]
    assert report.rows_in == rows_in
    assert report.rows_kept == len(kept)
    assert sum(count.count for count in report.drops.values()) == len(dropped) == report.rows_dropped
    assert sorted({*kept, *dropped}) == list(range(rows_in))
    assert all(isinstance(reason, DropReason) and count.example for reason, count in report.drops.items())
    assert is_printable(report.text())
    assert is_printable(str(report.as_dict()))


def check_message(error: AlignkitError) -> None:
    """An error can be written to any terminal and says something."""
    assert is_printable(str(error))
    assert len(str(error)) > 20


def check_lengths(row: dict[str, Any], limit: int | None, vocabulary: int, *, unpaired: bool) -> None:
    """No part is empty, all fit, and all ids are the tokenizer's."""
    assert all(row[name] for name in COLUMNS)
    for name in COLUMNS[1:]:
        assert limit is None or len(row["prompt_ids"]) + len(row[name]) <= limit
        assert all(0 <= token < vocabulary for token in (*row["prompt_ids"], *row[name]))
    assert unpaired or row["chosen_ids"] != row["rejected_ids"]


@pytest.mark.parametrize(
    ("form", "examples"),
    [
        *zip(FORMS, (250, 40, 40), strict=True),
        *(
            pytest.param(form, count, marks=pytest.mark.slow)
            for form, count in zip(FORMS, (2_000, 300, 300), strict=True)
        ),
    ],
)
def test_rows_are_kept_dropped_or_refused(
    form: str, examples: int, tokenizers: Tokenizers, tally: Counter[str]
) -> None:
    def check(rows: list[dict[str, Any]], family: str, template: str | None, limit: int | None, flags: tuple) -> None:
        drops_longer, unpaired, share = flags
        tokenizer = with_template(tokenizers, family, template)
        source = FORMS[form](rows)
        options = {"max_length": limit, "drop_longer": drops_longer, "max_drop_fraction": share}
        try:
            made, report = prepare_preferences(source, tokenizer, unpaired=unpaired, **options)
            table = list(made)  # a stream is read only now
        except AlignkitError as error:
            tally["datasets refused"] += 1
            tally.update(f"rows {reason.value}" for reason in DropReason if f"dropped: {reason.value}" in str(error))
            check_message(error)
            return
        check_counts(report, len(rows), sorted({row["row_id"] for row in table}))
        for row in table:
            check_lengths(row, limit, 1 + max(tokenizer.get_vocab().values()), unpaired=unpaired)
        tally["rows kept"] += report.rows_kept
        tally.update({f"rows {reason.value}": count.count for reason, count in report.drops.items()})

    flags = st.tuples(st.booleans(), st.booleans(), st.sampled_from([1.0, 1.0, 1.0, 0.2]))
    try_all(
        check, examples, tally, rows=datasets(FORMATS), family=FAMILIES, template=TEMPLATES, limit=LIMITS, flags=flags
    )
    assert tally["rows kept"] > examples // 8  # what is drawn is not all rubbish
    assert sum(name.startswith("rows ") for name in tally) >= (8 if examples > 200 else 4)  # and meets most reasons


@effort(60, 600)
def test_lists_datasets_and_streams_give_the_same(examples: int, tokenizers: Tokenizers, tally: Counter[str]) -> None:
    def check(rows: list[dict[str, Any]], family: str, template: str, limit: int | None) -> None:
        tokenizer = with_template(tokenizers, family, template)
        options: dict[str, Any] = {"max_length": limit, "max_drop_fraction": 1.0}
        found = []
        for source in (rows, Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
            try:
                made, report = prepare_preferences(source, tokenizer, **options)
                table = list(made)
            except AlignkitError as error:
                found.append(type(error))
                continue
            # Reading a stream ends with a check, and `IterableDataset` makes no rows of it.
            assert isinstance(made, IterableDataset) or len(made) == report.rows_kept
            check_counts(report, len(rows), [row["row_id"] for row in table])
            found.append(table)
            tally["rows kept"] += len(table)
        assert found[0] == found[1] == found[2]

    try_all(
        check,
        examples,
        tally,
        rows=clean_datasets(),
        family=FAMILIES,
        template=st.sampled_from(sorted(WORKING)),
        limit=LIMITS,
    )
    assert tally["rows kept"] > examples


@effort(80, 1_200)
def test_a_row_does_not_depend_on_its_neighbours(examples: int, tokenizers: Tokenizers, tally: Counter[str]) -> None:
    def check(rows: list[dict[str, Any]], family: str, template: str | None, limit: int | None) -> None:
        tokenizer = with_template(tokenizers, family, template)
        options: dict[str, Any] = {"max_length": limit, "max_drop_fraction": 1.0}
        try:
            together, _ = prepare_preferences(rows, tokenizer, **options)
        except AlignkitError:
            tally["datasets refused"] += 1
            return
        for row in together:
            columns = {name for other in rows for name in other}  # a list has the columns of all its rows
            alone, _ = prepare_preferences([{**dict.fromkeys(columns), **rows[row["row_id"]]}], tokenizer, **options)
            assert [{**other, "row_id": row["row_id"]} for other in alone] == [row]
            tally["rows kept"] += 1

    try_all(check, examples, tally, rows=datasets(PAIRED_FORMATS), family=FAMILIES, template=TEMPLATES, limit=LIMITS)
    assert tally["rows kept"] > examples // 4


@effort(80, 1_200)
def test_nothing_is_lost_and_the_end_is_trained(examples: int, tokenizers: Tokenizers, tally: Counter[str]) -> None:
    """Bytes come back from ids: what is trained on is the text that was given, with one EOS behind it."""
    tokenizer = tokenizers["bytes"]
    tokenizer.chat_template = None
    eos = tokenizer.eos_token_id

    def check(rows: list[dict[str, Any]]) -> None:
        try:
            made, report = prepare_preferences(rows, tokenizer, max_length=None, max_drop_fraction=1.0)
        except AlignkitError:
            tally["datasets refused"] += 1
            return
        assert report.eos_lost.count == report.truncated_completions == 0
        for row in made:
            given = rows[row["row_id"]]
            for name in ("chosen", "rejected"):
                whole = given.get("prompt", "") + given[name]
                read = tokenizer.decode(row["prompt_ids"] + row[f"{name}_ids"])
                # A completion that ends as a text ends gets no second end, but a prompt may hold its first part.
                assert read == whole + "</s>" or read == whole.removesuffix("</s>") + "</s>"
                assert row[f"{name}_ids"][-1] == eos
            tally["rows kept"] += 1

    try_all(check, examples, tally, rows=clean_datasets(TEXT_FORMATS))
    assert tally["rows kept"] > examples // 2
