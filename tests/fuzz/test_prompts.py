"""Prompts for rollouts out of any rows: kept with every column that rewards read, or dropped with a reason."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from alignkit.data.prepare import prepare_preferences
from alignkit.data.prompts import prepare_prompts
from alignkit.errors import AlignkitError
from tests.fuzz.harness import effort, try_all
from tests.fuzz.rows import FORMATS, datasets, text_rows, texts
from tests.fuzz.test_rows import FAMILIES, LIMITS, TEMPLATES, check_counts, check_message, with_template

Tokenizers = dict[str, PreTrainedTokenizerBase]


@effort(150, 2_000)
def test_prompts_are_kept_dropped_or_refused(examples: int, tokenizers: Tokenizers, tally: Counter[str]) -> None:
    def check(rows: list[dict[str, Any]], family: str, template: str | None, limit: int | None) -> None:
        tokenizer = with_template(tokenizers, family, template)
        try:
            made, report = prepare_prompts(rows, tokenizer, max_prompt_tokens=limit, max_drop_fraction=1.0)
        except AlignkitError as error:
            tally["datasets refused"] += 1
            check_message(error)
            return
        check_counts(report, len(rows), list(made["row_id"]))
        for row in made:
            assert 0 < len(row["prompt_ids"]) <= (limit or math.inf)
            assert isinstance(row["prompt"], str | list)
            assert row["prompt"]
            if isinstance(row["prompt"], list):
                assert {"role", "content"} <= row["prompt"][-1].keys()
        tally["rows kept"] += report.rows_kept

    try_all(check, examples, tally, rows=datasets(FORMATS), family=FAMILIES, template=TEMPLATES, limit=LIMITS)
    assert tally["rows kept"] > examples // 2


_scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False), texts)
_values = st.one_of(
    _scalars,
    st.lists(st.one_of(st.integers(0, 9), st.text("ab", max_size=2)), max_size=3),
    st.dictionaries(st.text("ab", max_size=2), st.integers(0, 9), max_size=2),
)


@effort(80, 1_000)
def test_other_columns_reach_the_rewards_unchanged(examples: int, tokenizers: Tokenizers, tally: Counter[str]) -> None:
    tokenizer = tokenizers["bytes"]
    tokenizer.chat_template = None

    def check(values: list[Any]) -> None:
        rows = [{"prompt": f"hello {i}", "answer": value} for i, value in enumerate(values)]
        try:
            made, _ = prepare_prompts(rows, tokenizer, max_prompt_tokens=None)
        except AlignkitError as error:
            tally["datasets refused"] += 1
            check_message(error)
            return
        for found, given in zip(made["answer"], values, strict=True):
            # Columns of mixed types are read by a JSON reader that is exact to fifteen digits.
            assert found == (pytest.approx(given, rel=1e-15) if isinstance(given, float) else given)
            assert type(found) is type(given)
            tally["values"] += 1

    columns = st.one_of(st.lists(_values, min_size=1, max_size=4), *(st.lists(kind, min_size=1) for kind in (texts,)))
    try_all(check, examples, tally, values=columns)
    assert tally["values"] > examples


@effort(60, 800)
def test_prompts_are_those_of_the_pairs(examples: int, tokenizers: Tokenizers, tally: Counter[str]) -> None:
    """The prompt of a pair is the same for a rollout as for a preference loss, where both keep the row."""

    def check(rows: list[dict[str, Any]], family: str) -> None:
        tokenizer = with_template(tokenizers, family, None)
        try:
            pairs, _ = prepare_preferences(rows, tokenizer, max_length=None, max_drop_fraction=1.0)
            alone, _ = prepare_prompts(rows, tokenizer, max_prompt_tokens=None, max_drop_fraction=1.0)
        except AlignkitError:
            tally["datasets refused"] += 1
            return
        of_pairs = {row["row_id"]: row["prompt_ids"] for row in pairs}
        of_prompts = {row["row_id"]: row["prompt_ids"] for row in alone}
        both = of_pairs.keys() & of_prompts.keys()
        assert {i: of_pairs[i] for i in both} == {i: of_prompts[i] for i in both}
        assert of_pairs.keys() <= of_prompts.keys()
        tally["rows compared"] += len(both)

    try_all(check, examples, tally, rows=datasets((text_rows(), text_rows(explicit=False))), family=FAMILIES)
    assert tally["rows compared"] > examples // 2
