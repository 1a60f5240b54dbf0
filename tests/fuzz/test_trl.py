"""Ids equal the installed TRL's wherever a prompt's ids begin those of prompt + completion."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from alignkit.data.prepare import prepare_preferences
from alignkit.errors import AlignkitError
from tests.data.test_trl_ids import trl_prepare  # noqa: F401, a fixture
from tests.fuzz.harness import effort, try_all
from tests.fuzz.rows import clean_datasets
from tests.fuzz.test_rows import with_template

Tokenizers = dict[str, PreTrainedTokenizerBase]


@effort(40, 600)
def test_ids_are_those_of_trl(examples: int, tokenizers: Tokenizers, trl_prepare: Any, tally: Counter[str]) -> None:  # noqa: F811
    def check(rows: list[dict[str, Any]], family: str, template: str, limit: int | None) -> None:
        tokenizer = with_template(tokenizers, family, template)
        try:
            ours, report = prepare_preferences(rows, tokenizer, max_length=limit, max_drop_fraction=1.0)
        except AlignkitError:
            tally["datasets refused"] += 1
            return
        wanted = {row["row_id"]: row for row in trl_prepare(rows, tokenizer, limit)}
        for row in ours:
            if row["row_id"] in report.not_prefix.row_ids:
                tally["prompts that are no prefix"] += 1
                continue
            other = wanted[row["row_id"]]
            assert row["prompt_ids"] == other["prompt_ids"]
            for column in ("chosen_ids", "rejected_ids"):
                assert row["prompt_ids"] + row[column] == (other["prompt_ids"] + other[column])[:limit]
            tally["rows compared"] += 1

    try_all(
        check,
        examples,
        tally,
        rows=clean_datasets(),
        # A tokenizer that appends an end by itself puts it between prompt and completion in TRL; here it is taken off.
        family=st.sampled_from(["bytes", "dummy prefix"]),
        template=st.sampled_from(["chatml", "llama 3", "no generation prompt"]),
        limit=st.sampled_from([None, 12, 30, 80]),
    )
    assert tally["rows compared"] > examples
