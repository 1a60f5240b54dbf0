"""Every format becomes the same record."""

from __future__ import annotations

import json

import pytest

from alignkit.data.reasons import BadRow, DropReason
from alignkit.data.records import Kind, Preference, TokenRow, Transcripts, Unpaired, kind_of, to_label, to_record

ASK = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "be kind"}
PAIR = Preference([ASK], [YES], [NO])
HH_YES = "\n\nHuman: hi\n\nAssistant: yes"
HH_NO = "\n\nHuman: hi\n\nAssistant: no"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
        {"chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"chosen": HH_YES, "rejected": HH_NO},
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        {"messages": [ASK], "chosen": YES, "rejected": NO},
        {"conversations": [ASK], "chosen": [YES], "rejected": "no"},
        {"prompt": "hi", "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"prompt": "hi", "chosen": [YES], "rejected": [NO]},
        {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"prompt": [ASK], "chosen": [{**YES, "tool_calls": None, "name": None}], "rejected": [NO]},
        {"prompt": [ASK], "chosen": [{**YES, "content": [{"type": "text", "text": "yes"}]}], "rejected": [NO]},
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO], "id": 7, "category": "x", "tools": None},
    ],
    ids=[
        "explicit", "implicit", "hh", "sharegpt", "one message each", "text beside messages", "ultrafeedback",
        "prompt text", "whole conversations", "filled with None", "text parts", "other columns",
    ],
)  # fmt: skip
def test_conversations_of_all_formats_are_one_record(row: dict) -> None:
    assert to_record(row) == PAIR


def test_system_messages_stay() -> None:
    sharegpt = {
        "conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    }
    assert to_record(sharegpt) == Preference([SYSTEM, ASK], [YES], [NO])
    column = {"conversations": [ASK], "system": "be kind", "chosen": YES, "rejected": NO}
    assert to_record(column) == Preference([SYSTEM, ASK], [YES], [NO])


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("the sky is blue.", "the sky is green.", ("the sky is", " blue.", " green.")),  # the space moves over
        ("a:b", "a:c", ("a:", "b", "c")),
        ("abc", "abcd", ("ab", "c", "cd")),  # one is the other's beginning: a character is left to each
    ],
)
def test_implicit_prompt_of_text_is_the_common_prefix(chosen: str, rejected: str, expected: tuple[str, ...]) -> None:
    assert to_record({"chosen": chosen, "rejected": rejected}) == Preference(*expected)


def test_explicit_text_is_left_alone() -> None:
    row = {"prompt": "Q: hi\nA: ", "chosen": "yes", "rejected": " no"}
    assert to_record(row) == Preference("Q: hi\nA: ", "yes", " no")


def test_transcripts_as_text_are_cut_after_the_last_assistant() -> None:
    record = to_record({"chosen": HH_YES, "rejected": HH_NO}, transcripts=Transcripts.AS_TEXT)
    assert record == Preference("\n\nHuman: hi\n\nAssistant:", " yes", " no")


def test_a_transcript_beside_its_prompt_is_not_doubled() -> None:
    record = to_record({"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": HH_YES, "rejected": HH_NO})
    assert record == Preference("\n\nHuman: hi\n\nAssistant:", " yes", " no")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "completion": [YES], "label": True},
        {"prompt": "hi", "completion": [YES], "label": 1},
        {"messages": [ASK, YES], "label": "True"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "label": 1.0},
        {"prompt": [ASK], "completion": [ASK, YES], "label": True},
    ],
)
def test_unpaired_rows(row: dict) -> None:
    assert to_record(row) == Unpaired([ASK], [YES], True)


def test_tools_and_template_arguments() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}, "strict": None}}
    clean = {"type": "function", "function": {"name": "f", "parameters": {}}}
    row = {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}
    for given in ([tool], json.dumps([tool])):
        record = to_record({**row, "tools": given, "chat_template_kwargs": {"enable_thinking": False, "other": None}})
        assert record == Preference([ASK], [YES], [NO], [clean], {"enable_thinking": False})
    assert to_record({**row, "tools": "", "chat_template_kwargs": '{"a": 1}'}) == Preference(
        [ASK], [YES], [NO], None, {"a": 1}
    )


def test_sharegpt_function_calls_become_tool_calls() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "3"},
        ],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    }
    record = to_record(row)
    assert isinstance(record, Preference)
    assert [message["role"] for message in record.prompt] == ["user", "assistant", "tool"]  # type: ignore[index]
    assert record.prompt[1]["tool_calls"] == [  # type: ignore[index]
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]


def test_token_rows_pass_through() -> None:
    row = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4], "prompt": "ignored"}
    assert to_record(row) == TokenRow([1, 2], [3], [4])
    assert to_record({**row, "label": False}) == TokenRow([1, 2], [3], [4], False)


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["prompt", "chosen", "rejected"], Kind.PAIRED),
        (["chosen", "rejected"], Kind.PAIRED),
        (["chosen", "rejected", "prompt", "completion", "label"], Kind.PAIRED),
        (["messages", "label"], Kind.UNPAIRED),
        (["prompt", "completion", "label"], Kind.UNPAIRED),
        (["prompt_ids", "chosen_ids", "rejected_ids"], Kind.TOKENS),
    ],
)
def test_kinds(columns: list[str], kind: Kind) -> None:
    assert kind_of(columns) is kind


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", "TRUE", "1"])
def test_labels(value: object) -> None:
    assert to_label(value) is True


def test_a_bad_row_says_reason_and_detail() -> None:
    with pytest.raises(BadRow, match="not a label: label is 2; expected true or false") as caught:
        to_record({"prompt": "a", "completion": "b", "label": 2})
    assert caught.value.reason is DropReason.NOT_A_LABEL
