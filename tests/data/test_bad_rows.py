"""Rows that cannot be trained on: each is dropped under its own reason, with its row id and what was found in it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from alignkit.data.prepare import prepare_preferences
from alignkit.data.reasons import DropReason
from alignkit.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
OTHER = {"role": "assistant", "content": "no"}
TEXT = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
CHAT = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "hi"}],
    "chosen": {"from": "gpt", "value": "yes"},
    "rejected": {"from": "gpt", "value": "no"},
}
HH = {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}
TOKENS = {"prompt_ids": [4], "chosen_ids": [5, 1], "rejected_ids": [6, 1]}
WEIGHTED = {**TEXT, "weight": 1.0, "margin": 0.5}
LOGPS = {**TEXT, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
SYSTEM = {"role": "system", "content": "be"}
SPEECH = " w1" * 50_000 + " w1"  # 200,003 characters

NOT_TEXT, EMPTY, ROLES = DropReason.NOT_TEXT, DropReason.EMPTY, DropReason.WRONG_ROLES
CONTINUES, NUMBER, ARGUMENTS = DropReason.NOT_A_CONTINUATION, DropReason.NOT_A_NUMBER, DropReason.BAD_TEMPLATE_ARGUMENTS
SAME, IDS = DropReason.IDENTICAL, DropReason.NOT_TOKEN_IDS

# name: (a good row, what is different in the bad row, reason, what the report says was found)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], DropReason, str]] = {
    "chosen None": (TEXT, {"chosen": None}, NOT_TEXT, "chosen is None"),
    "prompt None": (TEXT, {"prompt": None}, NOT_TEXT, "prompt is None"),
    "rejected a number": (TEXT, {"rejected": 3.5}, NOT_TEXT, "rejected is float ('3.5')"),
    "chosen a bool": (TEXT, {"chosen": True}, NOT_TEXT, "chosen is bool ('True')"),
    "content None": (CHAT, {"chosen": [{"role": "assistant", "content": None}]}, NOT_TEXT, "chosen[0].content is None"),
    "content a number": (CHAT, {"rejected": [{"role": "assistant", "content": 7}]}, NOT_TEXT, "content is int ('7')"),
    "messages of text": (CHAT, {"prompt": ["hi"]}, NOT_TEXT, "prompt[0] is str ('hi') where a message"),
    "messages None": (CHAT, {"rejected": None}, NOT_TEXT, "rejected is None where a list of messages"),
    "image part": (
        CHAT,
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        NOT_TEXT,
        "prompt[0].content has a part that is not text",
    ),
    "lone surrogate": (TEXT, {"chosen": "yes \ud83d"}, NOT_TEXT, "a lone surrogate '\\ud83d' at character 4"),
    "surrogate in a message": (
        CHAT,
        {"prompt": [{**USER, "content": "\udc00"}]},
        NOT_TEXT,
        "prompt[0].content has a lone",
    ),
    "text beside messages": (HH, {"rejected": [USER, OTHER]}, NOT_TEXT, "chosen is text, rejected is list"),
    "function call not JSON": (
        SHAREGPT,
        {"chosen": {"from": "function_call", "value": "f(1)"}},
        NOT_TEXT,
        "a function call that is not JSON",
    ),
    "chosen empty": (TEXT, {"chosen": ""}, EMPTY, "chosen is empty"),
    "rejected whitespace": (TEXT, {"rejected": " \n\t\u00a0"}, EMPTY, "rejected is empty"),
    "prompt empty": (TEXT, {"prompt": ""}, EMPTY, "prompt is empty"),
    "prompt without messages": (CHAT, {"prompt": []}, EMPTY, "prompt is empty"),
    "answer without messages": (CHAT, {"chosen": []}, EMPTY, "chosen is empty"),
    "answer whitespace": (CHAT, {"rejected": [{**OTHER, "content": "  "}]}, EMPTY, "rejected is empty"),
    "question whitespace": (CHAT, {"prompt": [{**USER, "content": "\n"}]}, EMPTY, "prompt is empty"),
    "transcript without answer": (HH, {"chosen": "\n\nHuman: hi\n\nAssistant: "}, EMPTY, "chosen is empty"),
    "implicit without common start": (
        HH,
        {"chosen": "yes", "rejected": "no"},
        EMPTY,
        "chosen and rejected share no prompt",
    ),
    "no token id": (TOKENS, {"prompt_ids": []}, EMPTY, "prompt_ids is empty"),
    "identical text": (TEXT, {"rejected": "yes"}, SAME, "chosen and rejected are the same"),
    "identical messages": (CHAT, {"rejected": [ASSISTANT]}, SAME, "chosen and rejected are the same"),
    "identical transcripts": (HH, {"rejected": HH["chosen"]}, SAME, "chosen and rejected are the same"),
    "identical ids": (TOKENS, {"rejected_ids": [5, 1]}, SAME, "chosen_ids and rejected_ids are the same"),
    "identical once tokenised": (TEXT, {"rejected": "yes  "}, SAME, "chosen and rejected have the same tokens"),
    "same start, long": (
        TEXT,
        {"chosen": SPEECH + " w2", "rejected": SPEECH + " w3"},
        DropReason.IDENTICAL_AFTER_TRUNCATION,
        "the first 19 tokens are the same, max_length=20",
    ),
    "long prompt": (
        TEXT,
        {"prompt": SPEECH},
        DropReason.PROMPT_FILLS_LENGTH,
        "50001 tokens, max_length=20",
    ),
    "unknown role": (
        CHAT,
        {"chosen": [{**ASSISTANT, "role": "narrator"}]},
        ROLES,
        "chosen[0] has the unknown role 'narrator'",
    ),
    "role None": (CHAT, {"chosen": [{**ASSISTANT, "role": None}]}, ROLES, "chosen[0] has the unknown role None"),
    "prompt ends with assistant": (
        CHAT,
        {"prompt": [USER, OTHER]},
        ROLES,
        "chosen: message 2 is assistant after assistant",
    ),
    "two users": (CHAT, {"prompt": [USER, USER]}, ROLES, "chosen: message 1 is user after user"),
    "system late": (CHAT, {"prompt": [USER, SYSTEM]}, ROLES, "message 1 is system after user"),
    "only a system message": (CHAT, {"prompt": [SYSTEM]}, ROLES, "message 1 is assistant after system"),
    "assistant starts": (CHAT, {"prompt": [ASSISTANT, USER]}, ROLES, "message 0 is assistant at the start"),
    "answer ends with user": (CHAT, {"rejected": [OTHER, USER]}, ROLES, "rejected ends with user, not with assistant"),
    "transcript ends with human": (
        HH,
        {"chosen": HH["chosen"] + "\n\nHuman: hi", "rejected": HH["rejected"] + "\n\nHuman: no"},
        ROLES,
        "chosen ends with user",
    ),
    "transcripts part at a question": (
        HH,
        {"rejected": "\n\nHuman: be\n\nAssistant: no"},
        EMPTY,
        "chosen and rejected share no prompt",
    ),
    "another conversation": (
        CHAT,
        {"chosen": [{**USER, "content": "be"}, ASSISTANT]},
        CONTINUES,
        "chosen is a conversation that does not start with prompt",
    ),
    "another prompt text": (
        {"prompt": "hi", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        {"prompt": "be kind"},
        CONTINUES,
        "no user message that chosen and rejected share is the prompt",
    ),
    "another transcript": (
        {"prompt": "\n\nHuman: hi\n\nAssistant:", **HH},
        {"prompt": "\n\nHuman: be\n\nAssistant:"},
        CONTINUES,
        "chosen is a transcript that does not start with prompt",
    ),
    "weight NaN": (WEIGHTED, {"weight": float("nan")}, NUMBER, "weight is nan"),
    "weight negative": (WEIGHTED, {"weight": -0.5}, NUMBER, "weight is -0.5, below 0"),
    "margin text": (WEIGHTED, {"margin": "big"}, NUMBER, "margin is 'big'"),
    "margin bool": (WEIGHTED, {"margin": True}, NUMBER, "margin is True"),
    "reference infinite": (LOGPS, {"ref_chosen_logps": float("-inf")}, NUMBER, "ref_chosen_logps is -inf"),
    "reference None": (LOGPS, {"ref_rejected_logps": None}, NUMBER, "ref_rejected_logps is None"),
    "ids of text": (TOKENS, {"chosen_ids": ["yes"]}, IDS, "chosen_ids holds 'yes'"),
    "ids negative": (TOKENS, {"prompt_ids": [-1]}, IDS, "prompt_ids holds -1"),
    "ids not a list": (TOKENS, {"rejected_ids": 5}, IDS, "rejected_ids is int"),
    "ids out of the vocabulary": (
        TOKENS,
        {"chosen_ids": [5, 9999]},
        IDS,
        "chosen_ids holds 9999, the tokenizer",
    ),
    "tools not JSON": ({**CHAT, "tools": "[]"}, {"tools": "[f"}, ARGUMENTS, "tools is not JSON"),
    "tools not a list": ({**CHAT, "tools": "[]"}, {"tools": '{"a": 1}'}, ARGUMENTS, "tools is dict, not a list"),
    "template arguments not a mapping": (
        {**CHAT, "chat_template_kwargs": {}},
        {"chat_template_kwargs": [1]},
        ARGUMENTS,
        "chat_template_kwargs is list, not a mapping",
    ),
    "reserved template argument": (
        {**CHAT, "chat_template_kwargs": {}},
        {"chat_template_kwargs": {"tokenize": True}},
        ARGUMENTS,
        "chat_template_kwargs may not set 'tokenize'",
    ),
    "a template of its own": (
        {**CHAT, "chat_template_kwargs": {}},
        {"chat_template_kwargs": {"chat_template": "{{ messages }}"}},
        ARGUMENTS,
        "chat_template_kwargs may not set 'chat_template'",
    ),
    # What Python itself refuses to print, convert or walk through.
    "chosen a huge number": (TEXT, {"chosen": 10**5000}, NOT_TEXT, "chosen is int ('<a number of 16610 bits>')"),
    "weight a huge number": (WEIGHTED, {"weight": 10**400}, NUMBER, "weight is <a number of 1329 bits>"),
    "id a huge number": (TOKENS, {"chosen_ids": [-(10**5000)]}, IDS, "chosen_ids holds <a number of 16610 bits>"),
    "tools nested deep": (
        {**CHAT, "tools": "[]"},
        {"tools": "[" * 100_000},
        ARGUMENTS,
        "tools is not JSON: maximum recursion depth",
    ),
    "function call nested deep": (
        SHAREGPT,
        {"chosen": {"from": "function_call", "value": "[" * 100_000}},
        NOT_TEXT,
        "a function call that is not JSON",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["list", "stream"])
def test_a_bad_row_is_dropped_with_its_reason(name: str, form: str, word_tokenizer) -> None:
    good, change, reason, found = CASES[name]
    rows = [good, good, {**good, **change}, good]
    dataset = rows if form == "list" else IterableDataset.from_generator(rows.__iter__)
    prepared, report = prepare_preferences(dataset, word_tokenizer, max_length=20, max_drop_fraction=0.25)
    assert [row["row_id"] for row in prepared] == [0, 1, 3]
    assert {dropped: count.row_ids for dropped, count in report.drops.items()} == {reason: [2]}
    assert found in report.drops[reason].example
    assert reason.value in " ".join(report.text().split())
    assert (report.rows_in, report.rows_kept) == (4, 3)


@pytest.mark.parametrize("label", [None, 2, "maybe", -1, float("nan")])
def test_a_bad_label_is_dropped(label: object, word_tokenizer) -> None:
    good = {"prompt": "hi", "completion": "yes", "label": True}
    rows = [good, {**good, "label": label}, {**good, "label": False}]
    prepared, report = prepare_preferences(rows, word_tokenizer, max_length=20, unpaired=True, max_drop_fraction=0.5)
    assert [(row["row_id"], row["label"]) for row in prepared] == [(0, True), (2, False)]
    assert report.drops[DropReason.NOT_A_LABEL].row_ids == [1]
    assert f"label is {label!r}" in report.drops[DropReason.NOT_A_LABEL].example


def test_a_row_that_the_template_refuses_is_dropped(word_tokenizer) -> None:
    def refuse(messages: str) -> str:
        return "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}" + messages

    template = word_tokenizer.chat_template
    rows = [CHAT, {**CHAT, "prompt": [SYSTEM, USER]}]
    try:
        word_tokenizer.chat_template = refuse(template)
        prepared, report = prepare_preferences(rows, word_tokenizer, max_length=20, max_drop_fraction=0.5)
    finally:
        word_tokenizer.chat_template = template
    assert [row["row_id"] for row in prepared] == [0]
    assert report.drops[DropReason.TEMPLATE_REFUSED].row_ids == [1]
    assert "no system, please" in report.drops[DropReason.TEMPLATE_REFUSED].example


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("1 // 0", "ZeroDivisionError"),
        ("2.0 ** 5000", "OverflowError"),
        ("messages.append(1)", "SecurityError"),
        ("'\\\\[/bold]' ~ messages[9].content", "UndefinedError"),
        ("raise_exception('\\\\[/bold] \x1b[31m \ud83d')", "\\[/bold] \\x1b[31m \\ud83d"),
    ],
)
def test_whatever_a_template_raises_drops_the_row(expression: str, found: str, word_tokenizer) -> None:
    template = word_tokenizer.chat_template
    try:
        word_tokenizer.chat_template = (
            "{% if messages[0].role == 'system' %}{{ " + expression + " }}{% endif %}" + template
        )
        _, report = prepare_preferences(
            [CHAT, {**CHAT, "prompt": [SYSTEM, USER]}], word_tokenizer, max_length=20, max_drop_fraction=0.5
        )
    finally:
        word_tokenizer.chat_template = template
    assert report.drops[DropReason.TEMPLATE_REFUSED].row_ids == [1]
    assert found in report.drops[DropReason.TEMPLATE_REFUSED].example
    assert "refuses the row" in report.text()


@pytest.mark.parametrize(
    "text",
    ["🙂👩‍👩‍👧‍👦 w1", "مرحبا بالعالم", "\u202eright to left\u202c", "e\u0301 \u200b w2", "w1\x00w2", "𝒻𝓊𝓃"],
    ids=["emoji", "arabic", "bidi marks", "combining", "NUL", "astral"],
)
def test_unusual_text_is_kept_whole(text: str, byte_bpe_tokenizer) -> None:
    rows = [{"prompt": f"{text}?", "chosen": text, "rejected": f"{text}!"}]
    prepared, report = prepare_preferences(rows, byte_bpe_tokenizer, max_length=None)
    assert report.rows_kept == 1
    assert byte_bpe_tokenizer.decode(prepared[0]["prompt_ids"]) == f"{text}?"
    assert byte_bpe_tokenizer.decode(prepared[0]["chosen_ids"]) == f"{text}</s>"


def test_a_completion_of_200000_characters_loses_its_end_and_is_counted(word_tokenizer) -> None:
    rows = [{**TEXT, "chosen": SPEECH}, TEXT]
    prepared, report = prepare_preferences(rows, word_tokenizer, max_length=20)
    assert len(prepared[0]["chosen_ids"]) == 19
    assert prepared[0]["rejected_ids"][-1] == word_tokenizer.eos_token_id
    assert (report.truncated_completions, report.eos_lost.row_ids) == (1, [0])
    whole, report = prepare_preferences(rows, word_tokenizer, max_length=None)
    assert len(whole[0]["chosen_ids"]) == 50_002
    assert report.truncated_completions == 0


NOT_UNDERSTOOD = "make no format that alignkit understands"
DATASETS: dict[str, tuple[list[Any], str]] = {
    "no rejected": ([{"prompt": "hi", "chosen": "yes"}], f"columns ['prompt', 'chosen'] {NOT_UNDERSTOOD}"),
    "misspelt": ([{"prompt": "hi", "choosen": "yes", "rejected": "no"}], "Did you mean 'chosen'?"),
    "no label": ([{"prompt": "hi", "completion": "yes"}], f"columns ['prompt', 'completion'] {NOT_UNDERSTOOD}"),
    "formats are listed": ([{"text": "hi"}], "prompt, completion, label"),
    "image": ([{**TEXT, "image": None}], "has the column 'image': alignkit is text only"),
    "images": ([{**TEXT, "images": []}], "has the column 'images': alignkit is text only"),
    "no rows": ([], "the dataset has no rows"),
    "unpaired": (
        [{"prompt": "hi", "completion": "yes", "label": True}],
        "train on them with DPOTrainer and loss_type='kto'",
    ),
    "row not a dict": ([TEXT, "hi"], "row 1 is a str, not a dict of columns"),
    "all dropped": ([{**TEXT, "chosen": ""}] * 3, "none of the 3 rows can be used"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_that_cannot_be_used_is_an_error(name: str, word_tokenizer) -> None:
    rows, message = DATASETS[name]
    with pytest.raises(DataError, match=re.escape(message)):
        prepare_preferences(rows, word_tokenizer, max_length=20, name="train")


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_kind_are_an_error(label: bool, word_tokenizer) -> None:
    rows = [{"prompt": "hi", "completion": "yes", "label": label}] * 2
    kind = "desirable (true)" if label else "undesirable (false)"
    with pytest.raises(DataError, match=re.escape(f"every row is labelled {kind}; KTO needs rows of both kinds")):
        prepare_preferences(rows, word_tokenizer, max_length=20, unpaired=True)


@pytest.mark.parametrize("make", [list, Dataset.from_list, lambda rows: IterableDataset.from_generator(rows.__iter__)])
def test_conversations_without_a_chat_template_are_an_error(make, plain_tokenizer) -> None:
    with pytest.raises(DataError, match="no chat template: take the tokenizer of an instruct model"):
        prepare_preferences(make([CHAT]), plain_tokenizer, max_length=20)


def test_text_without_an_eos_token_is_an_error(plain_tokenizer) -> None:
    eos = plain_tokenizer.eos_token
    try:
        plain_tokenizer.eos_token = None
        with pytest.raises(DataError, match="no EOS token, so completions could not be taught to end"):
            prepare_preferences([TEXT], plain_tokenizer, max_length=20)
    finally:
        plain_tokenizer.eos_token = eos


def test_reference_columns_of_pairs_do_not_fit_unpaired_rows(word_tokenizer) -> None:
    with pytest.raises(DataError, match="ref_chosen_logps belongs to a pair's completions"):
        prepare_preferences([LOGPS], word_tokenizer, max_length=20, unpaired=True)


def test_token_ids_without_a_label_cannot_be_unpaired(word_tokenizer) -> None:
    with pytest.raises(DataError, match="token ids for loss_type='kto' need a `label` column"):
        prepare_preferences([TOKENS], word_tokenizer, max_length=20, unpaired=True)


@pytest.mark.parametrize("max_length", [0, 1, -5])
def test_a_length_without_room_is_an_error(max_length: int, word_tokenizer) -> None:
    with pytest.raises(DataError, match=f"max_length={max_length} leaves no room"):
        prepare_preferences([TEXT], word_tokenizer, max_length=max_length)


def test_a_dict_of_datasets_is_an_error(word_tokenizer) -> None:
    both = {"train": Dataset.from_list([TEXT]), "test": Dataset.from_list([TEXT])}
    with pytest.raises(DataError, match=re.escape("a dict of datasets ['test', 'train']; give one of them")):
        prepare_preferences(both, word_tokenizer, max_length=20)


def test_too_many_drops_are_an_error_that_holds_the_table(word_tokenizer) -> None:
    rows = [TEXT] * 7 + [{**TEXT, "chosen": ""}] * 2 + [{**TEXT, "rejected": "yes"}]
    with pytest.raises(DataError, match=re.escape("3 of 10 rows (30.0%) were dropped")) as caught:
        prepare_preferences(rows, word_tokenizer, max_length=20)
    assert "dropped: empty" in str(caught.value)
    assert "7, 8" in str(caught.value)
    assert "raise max_drop_fraction" in str(caught.value)
    _, report = prepare_preferences(rows, word_tokenizer, max_length=20, max_drop_fraction=0.3)
    assert report.rows_dropped == 3


@pytest.mark.parametrize("unpaired", [False, True])
def test_a_stream_stops_at_100_rows_if_too_many_are_dropped(unpaired: bool, word_tokenizer) -> None:
    rows = ([TEXT] * 3 + [{**TEXT, "chosen": None}]) * 50
    stream = IterableDataset.from_generator(rows.__iter__)
    prepared, report = prepare_preferences(stream, word_tokenizer, max_length=20, unpaired=unpaired)
    with pytest.raises(DataError, match=re.escape("25 of 100 rows (25.0%) were dropped")):
        list(prepared)
    assert report.rows_in == 100


@pytest.mark.parametrize("unpaired", [False, True])
def test_a_short_stream_is_checked_at_its_end(unpaired: bool, word_tokenizer) -> None:
    rows = [TEXT] * 30 + [{**TEXT, "chosen": None}] * 10
    stream = IterableDataset.from_generator(rows.__iter__)
    prepared, _ = prepare_preferences(stream, word_tokenizer, max_length=20, unpaired=unpaired)
    with pytest.raises(DataError, match=re.escape("10 of 40 rows (25.0%) were dropped")):
        list(prepared)


def test_an_empty_stream_is_an_error(word_tokenizer) -> None:
    with pytest.raises(DataError, match="the stream has no rows"):
        prepare_preferences(IterableDataset.from_generator([].__iter__), word_tokenizer, max_length=20)
