"""What `max_length` does, foretold from the same rows without it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from alignkit.data.prepare import prepare_preferences
from alignkit.data.reasons import DropReason
from alignkit.errors import AlignkitError
from tests.fuzz.harness import effort, try_all
from tests.fuzz.rows import CLEAN_FORMATS, clean_datasets, text_rows
from tests.fuzz.test_rows import FAMILIES, with_template

Tokenizers = dict[str, PreTrainedTokenizerBase]
Row = dict[str, Any]


def foretold(
    row: Row, limit: int, eos: int, *, drops_longer: bool
) -> DropReason | tuple[list[int], list[int], int, bool]:
    """The reason why a row falls out, or its completions, how many of them are cut, and whether an end is lost."""
    room = limit - len(row["prompt_ids"])
    if room <= 0:
        return DropReason.PROMPT_FILLS_LENGTH
    parts = [row["chosen_ids"], row["rejected_ids"]]
    if drops_longer and max(map(len, parts)) > room:
        return DropReason.TOO_LONG
    cut = [part[:room] for part in parts]
    if cut[0] == cut[1]:
        return DropReason.IDENTICAL_AFTER_TRUNCATION
    lost = any(len(part) > room and (eos in part[room:] or eos not in part) for part in parts)
    return cut[0], cut[1], sum(len(part) > room for part in parts), lost


@effort(120, 1_500)
def test_every_length_is_the_unlimited_one_cut(examples: int, tokenizers: Tokenizers, tally: Counter[str]) -> None:
    def check(rows: list[Row], family: str, template: str, room: int, drops_longer: bool) -> None:
        tokenizer = with_template(tokenizers, family, template)
        try:
            whole, before = prepare_preferences(rows, tokenizer, max_length=None, max_drop_fraction=1.0)
        except AlignkitError:
            tally["datasets refused"] += 1
            return
        limit = max(2, len(whole[0]["prompt_ids"]) + room)  # near what the first row takes
        expected = {
            row["row_id"]: foretold(row, limit, tokenizer.eos_token_id, drops_longer=drops_longer) for row in whole
        }
        kept = {i: found for i, found in expected.items() if isinstance(found, tuple)}
        try:
            options = {"max_length": limit, "drop_longer": drops_longer, "max_drop_fraction": 1.0}
            made, report = prepare_preferences(rows, tokenizer, **options)
        except AlignkitError:
            assert not kept
            tally["all rows dropped"] += 1
            return
        assert {row["row_id"]: (row["chosen_ids"], row["rejected_ids"]) for row in made} == {
            i: found[:2] for i, found in kept.items()
        }
        reasons = {row: reason for reason, count in report.drops.items() for row in count.row_ids}
        assert {i: found for i, found in expected.items() if isinstance(found, DropReason)} == {
            i: reason for i, reason in reasons.items() if i in expected
        }
        assert before.rows_dropped + len(expected) == len(rows) == report.rows_in
        assert report.truncated_completions == sum(found[2] for found in kept.values())
        assert report.eos_lost.row_ids == [i for i, found in kept.items() if found[3]]
        tally["rows kept"] += len(kept)
        tally["completions cut"] += report.truncated_completions
        tally["ends lost"] += report.eos_lost.count

    try_all(
        check,
        examples,
        tally,
        rows=clean_datasets((*CLEAN_FORMATS, text_rows())),
        family=FAMILIES,
        template=st.sampled_from(["chatml", "no generation prompt", "thinking"]),
        room=st.sampled_from([1, 2, 4, 7, 12, 30, 0, -3]),
        drops_longer=st.booleans(),
    )
    assert (
        min(tally[name] for name in ("rows kept", "completions cut", "ends lost", "all rows dropped")) > examples // 40
    )
