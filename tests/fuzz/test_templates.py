"""Chat templates of real models and broken ones: rows they write come out whole, what they refuse is said."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from alignkit.data.prepare import prepare_preferences
from alignkit.data.prompts import prepare_prompts
from alignkit.errors import AlignkitError, DataError
from tests.fuzz.harness import effort, try_all
from tests.fuzz.rows import answers, chat_rows, clean_datasets, datasets, texts, turns
from tests.fuzz.templates import BROKEN, ENDS_WITH_EOS, WORKING
from tests.fuzz.test_rows import FAMILIES, LIMITS, check_counts, check_lengths, check_message

Tokenizers = dict[str, PreTrainedTokenizerBase]
FOREIGN = st.builds("".join, st.lists(st.sampled_from(["{{", "}}", "{%", "%}", "messages", " for x in ", "endfor"])))


@effort(40, 800)
def test_a_conversation_is_trained_on_as_the_template_writes_it(
    examples: int, tokenizers: Tokenizers, tally: Counter[str]
) -> None:
    """Bytes come back from ids: prompt and completion are the template's text, and its last words are trained."""
    tokenizer = tokenizers["bytes"]

    def check(rows: list[dict[str, Any]], template: str) -> None:
        tokenizer.chat_template = WORKING[template]
        try:
            made, report = prepare_preferences(rows, tokenizer, max_length=None, max_drop_fraction=1.0)
        except AlignkitError as error:
            tally["datasets refused"] += 1
            check_message(error)
            return
        check_counts(report, len(rows), list(made["row_id"]))
        for row in made:
            given = rows[row["row_id"]]
            asked = tokenizer.apply_chat_template(given["prompt"], tokenize=False, add_generation_prompt=True)
            assert tokenizer.decode(row["prompt_ids"]) == asked
            for name in ("chosen", "rejected"):
                whole = tokenizer.apply_chat_template(given["prompt"] + given[name], tokenize=False)
                read = tokenizer.decode(row[f"{name}_ids"])
                assert whole.endswith(read)
                if whole.startswith(asked):
                    assert asked + read == whole
                else:  # the words themselves are never cut
                    assert given[name][0]["content"].strip() in read
                assert (tokenizer.eos_token in read) is (template in ENDS_WITH_EOS) or "</s>" in str(given)
            tally["rows kept"] += 1

    rows = clean_datasets((chat_rows(clean=True), chat_rows()))
    try_all(check, examples, tally, rows=rows, template=st.sampled_from(sorted(WORKING)))
    assert tally["rows kept"] > examples


@effort(120, 1_500)
def test_a_broken_template_drops_rows_or_is_refused(examples: int, tokenizers: Tokenizers, tally: Counter[str]) -> None:
    def check(rows: list[dict[str, Any]], family: str, template: str, limit: int | None, only_prompts: bool) -> None:
        tokenizer = tokenizers[family]
        tokenizer.chat_template = template
        try:
            if only_prompts:
                made, report = prepare_prompts(rows, tokenizer, max_prompt_tokens=limit, max_drop_fraction=1.0)
            else:
                made, report = prepare_preferences(rows, tokenizer, max_length=limit, max_drop_fraction=1.0)
        except AlignkitError as error:
            tally["datasets refused"] += 1
            check_message(error)
            return
        check_counts(report, len(rows), list(made["row_id"]))
        for row in made if not only_prompts else []:
            check_lengths(row, limit, 1 + max(tokenizer.get_vocab().values()), unpaired=False)
        tally["rows kept"] += report.rows_kept

    templates = st.one_of(st.sampled_from([*BROKEN.values()]), st.sampled_from([*BROKEN.values()]), FOREIGN)
    rows = datasets((chat_rows(), chat_rows(explicit=False)))
    limits = st.one_of(st.none(), LIMITS.filter(bool))
    try_all(
        check, examples, tally, rows=rows, family=FAMILIES, template=templates, limit=limits, only_prompts=st.booleans()
    )
    assert tally["datasets refused"] > examples // 4
    assert tally["rows kept"] > 0


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_template(name: str, tokenizers: Tokenizers) -> None:
    """None raises what is not alignkit's own, whatever Jinja or Python say to it."""
    tokenizer = tokenizers["bytes"]
    tokenizer.chat_template = BROKEN[name]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"hello {i}", "name": "\ud83d"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for i in range(2)
    ]
    harmless = {"backwards", "counts messages", "lists what it is given"}
    if name in harmless:
        made, report = prepare_preferences(rows, tokenizer, max_length=None)
        assert report.rows_kept == len(made) == 2
    else:
        with pytest.raises(DataError, match="none of the 2 rows can be used"):
            prepare_preferences(rows, tokenizer, max_length=None)


@effort(40, 800)
def test_a_row_brings_no_template_of_its_own(examples: int, tokenizers: Tokenizers, tally: Counter[str]) -> None:
    """Text of a dataset is never run: neither as a template nor inside one."""
    tokenizer = tokenizers["bytes"]
    tokenizer.chat_template = WORKING["chatml"]
    marker = "{{ 40 + 2 }}"

    def check(asked: list[dict[str, Any]], answer: list[dict[str, Any]], key: str) -> None:
        asked = [{**turn, "content": turn["content"] + marker} for turn in asked]
        row = {"prompt": asked, "chosen": answer, "rejected": [{"role": "assistant", "content": marker}]}
        rows = [row, {**row, "chat_template_kwargs": {key: "{{ 40 + 2 }}"}}]
        try:
            made, report = prepare_preferences(rows, tokenizer, max_length=None, max_drop_fraction=1.0)
        except AlignkitError:
            tally["datasets refused"] += 1
            return
        for kept in made:
            assert tokenizer.decode(kept["prompt_ids"]).count(marker) >= len(asked)
            assert tokenizer.decode(kept["rejected_ids"]).startswith(marker)
        assert key != "chat_template" or 1 not in list(made["row_id"])
        tally["rows kept"] += report.rows_kept

    keys = st.sampled_from(["chat_template", "anything", "documents", "eos_token", "messages"])
    try_all(check, examples, tally, asked=turns(), answer=answers(), key=keys)
    assert tally["rows kept"] > examples // 2


@effort(60, 1_000)
def test_markup_in_messages_reaches_no_report(examples: int, tokenizers: Tokenizers, tally: Counter[str]) -> None:
    """What a report quotes of a row is shown as it is: no markup of the row's opens or closes anything in it."""
    tokenizer = tokenizers["bytes"]
    tokenizer.chat_template = "{% for m in messages %}{{ raise_exception(m.content) }}{% endfor %}"

    def check(text: str) -> None:
        row = {"prompt": [{"role": "user", "content": text}]}
        answer = {
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }
        with pytest.raises(DataError, match="none of the 1 rows can be used") as caught:
            prepare_preferences([{**row, **answer}], tokenizer, max_length=None)
        check_message(caught.value)

    markup = st.sampled_from(
        ["[", "]", "\\", "[/", "bold]", "[red]", "[/red]", "[link=x]", "[@click=f]", "a", "\\[/bold]"]
    )
    try_all(check, examples, tally, text=st.one_of(st.lists(markup, max_size=8).map("".join), texts))
