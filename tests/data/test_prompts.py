"""Prompts for rollouts: ids and columns by hand, the same ids as preferences have, and every way to be wrong."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from alignkit.data.prepare import prepare_preferences
from alignkit.data.prompts import prepare_prompts, to_prompt
from alignkit.data.reasons import BadRow, DropReason
from alignkit.data.records import Prompt, Transcripts
from alignkit.data.show import show_example
from alignkit.data.sources import load_preferences
from alignkit.data.tokenize import RecordTokenizer
from alignkit.errors import ConfigError, DataError
from tests.data.conftest import ids
from tests.fuzz.rows import deep

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
AGAIN, SYSTEM = {"role": "user", "content": "w1"}, {"role": "system", "content": "be kind"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
TOLD = {"tools": [{"name": "w3"}], "chat_template_kwargs": {"mood": "kind"}}
TOOL = {"role": "tool", "content": "w2"}
HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: w1\n\nAssistant: be kind",
    "rejected": "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: w1\n\nAssistant: no",
}
HI = ids("<user>", "hi", "<assistant>")
THREE_TURNS = ids("<user>", "hi", "<assistant>", "yes", "</s>", "<user>", "w1", "<assistant>")

# name: (a row, its prompt as rewards see it, its ids)
GOOD: dict[str, tuple[dict[str, Any], Any, list[int]]] = {
    "text": ({"prompt": " hi w1 "}, " hi w1 ", ids("hi", "w1")),
    "messages in prompt": ({"prompt": [USER]}, [USER], HI),
    "one message": ({"prompt": USER}, [USER], HI),
    "ShareGPT roles": ({"prompt": [{"from": "human", "value": "hi"}]}, [USER], HI),
    "a conversation in prompt": ({"prompt": [USER, ANSWER, AGAIN]}, [USER, ANSWER, AGAIN], THREE_TURNS),
    "a system message": ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER], ids("be", "kind") + HI),
    "messages with an answer": ({"messages": [USER, ANSWER]}, [USER], HI),
    "messages with two answers": ({"messages": [USER, ANSWER, ANSWER]}, [USER], HI),
    "messages without answer": ({"messages": [USER, ANSWER, AGAIN]}, [USER, ANSWER, AGAIN], THREE_TURNS),
    "conversations": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        [USER],
        HI,
    ),
    "a system column": ({"messages": [USER, ANSWER], "system": "be kind"}, [SYSTEM, USER], ids("be", "kind") + HI),
    "text beside its conversation": ({"prompt": "hi", "messages": [USER, ANSWER]}, [USER], HI),
    "messages beside a conversation": (
        {"prompt": [USER], "messages": [USER, ANSWER, AGAIN, ANSWER]},
        [USER],
        HI,
    ),
    "text beside a completion": ({"prompt": "hi", "completion": "yes"}, "hi", ids("hi")),
    "HH transcripts": (HH, [USER, ANSWER, AGAIN], THREE_TURNS),
    "a transcript in prompt": (
        {"prompt": "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: w1\n\nAssistant:"},
        [USER, ANSWER, AGAIN],
        THREE_TURNS,
    ),
    "a transcript without the open turn": ({"prompt": "\n\nHuman: hi"}, [USER], HI),
    "text pair": ({"prompt": "hi ", "chosen": "yes", "rejected": "no"}, "hi ", ids("hi")),
    "text beside conversations": (
        {"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "no"}]},
        [USER],
        HI,
    ),
    "text that is JSON": ({"prompt": "5"}, "5", ids("<unk>")),
    "text that is a JSON object": ({"prompt": '{"role": "user"}'}, '{"role": "user"}', ids("<unk>", "<unk>")),
    "text that is null": ({"prompt": "null"}, "null", ids("<unk>")),
    "text in many scripts": ({"prompt": "hi\u2028é 你 😀 \\ \""}, "hi\u2028é 你 😀 \\ \"", ids("hi", *["<unk>"] * 5)),
}  # fmt: skip


@pytest.mark.parametrize("form", ["list", "dataset"])
@pytest.mark.parametrize("case", GOOD)
def test_good_rows(case: str, form: str, word_tokenizer) -> None:
    row, prompt, prompt_ids = GOOD[case]
    rows = [row] if form == "list" else Dataset.from_list([row])
    prepared, report = prepare_prompts(rows, word_tokenizer, max_prompt_tokens=None)
    others = {"system": row["system"]} if "system" in row else {}
    assert list(prepared) == [{"row_id": 0, "prompt_ids": prompt_ids, "prompt": prompt, **others}]
    assert report.rows_kept == 1


def test_tools_and_template_arguments_reach_the_template(word_tokenizer) -> None:
    own = copy.deepcopy(word_tokenizer)
    own.chat_template = "{{ tools[0].name if tools else 'no' }} {{ mood or 'be' }} {{ messages[-1].content }}"
    rows = [
        {"prompt": [USER], **TOLD},
        {"prompt": [USER], "tools": '[{"name": "w4"}]', "chat_template_kwargs": None},
        {"prompt": [USER, CALL, TOOL], "tools": None, "chat_template_kwargs": '{"mood": "w5"}'},
    ]
    prepared, _ = prepare_prompts(rows, own, max_prompt_tokens=None)
    assert prepared["prompt_ids"][:] == [ids("w3", "kind", "hi"), ids("w4", "be", "hi"), ids("no", "w5", "w2")]
    assert prepared["tools"][:] == [row["tools"] for row in rows]
    assert prepared["chat_template_kwargs"][:] == [row["chat_template_kwargs"] for row in rows]
    pair = {"prompt": [USER], "chosen": [ANSWER], "rejected": [AGAIN | {"role": "assistant"}], **TOLD}
    prepared_pair, _ = prepare_prompts([pair], own, max_prompt_tokens=None)
    assert prepared_pair[0]["prompt_ids"] == ids("w3", "kind", "hi")
    # Arrow gives every message the keys of all; rewards see none that the dataset did not set.
    assert prepared[2]["prompt"] == [USER, CALL, TOOL]


@pytest.mark.parametrize("form", ["list", "dataset"])
def test_other_columns_follow_their_rows(form: str, word_tokenizer) -> None:
    rows = [
        {"prompt": "hi", "chosen_by": "a", "answer": 3, "extra": {"x": [1.5, 2.0]}, "row_id": 7, "prompt_ids": [1]},
        {"prompt": " ", "chosen_by": "b", "answer": 4, "extra": {"x": []}, "row_id": 8, "prompt_ids": [2]},
        {"prompt": "w1", "chosen_by": None, "answer": 5, "extra": {"x": [0.25]}, "row_id": 9, "prompt_ids": [3]},
    ]
    prepared, report = prepare_prompts(
        rows if form == "list" else Dataset.from_list(rows).with_format("torch"),
        word_tokenizer,
        max_prompt_tokens=4,
        max_drop_fraction=0.5,
    )
    assert list(prepared) == [
        {**rows[0], "row_id": 0, "prompt_ids": ids("hi")},
        {**rows[2], "row_id": 2, "prompt_ids": ids("w1")},
    ]
    assert (report.rows_in, report.rows_kept) == (3, 2)


def test_a_list_may_mix_what_arrow_may_not(word_tokenizer) -> None:
    rows = [
        {"prompt": "hi", "answer": "5", "about": {"a": "x"}},
        {"prompt": [USER], "answer": 5, "about": {"b": 1}},
        {"prompt": [SYSTEM, USER], "answer": None},
    ]
    prepared, _ = prepare_prompts(rows, word_tokenizer, max_prompt_tokens=None)
    assert prepared["prompt"][:] == [row["prompt"] for row in rows]
    assert prepared["answer"][:] == ["5", 5, None]
    assert prepared["about"][:] == [{"a": "x"}, {"b": 1}, None]


def test_columns_that_are_used_up_are_left_out(word_tokenizer) -> None:
    row = {**HH, "completion": "yes", "label": True, "weight": 2.0}
    prepared, _ = prepare_prompts([row], word_tokenizer, max_prompt_tokens=None)
    assert prepared.column_names == ["row_id", "prompt_ids", "prompt", "label", "weight"]


def test_duplicates_stay_and_shuffled_datasets_keep_their_order(word_tokenizer) -> None:
    dataset = Dataset.from_list([{"prompt": word, "n": n} for n, word in enumerate(["hi", "w1", "hi", "w2"])])
    prepared, _ = prepare_prompts(dataset.select([3, 2, 0]), word_tokenizer, max_prompt_tokens=1)
    rows = [(row["row_id"], row["prompt"], row["prompt_ids"], row["n"]) for row in prepared]
    assert rows == [(0, "w2", ids("w2"), 3), (1, "hi", ids("hi"), 2), (2, "hi", ids("hi"), 0)]


def test_a_prompt_of_exactly_the_limit_stays(word_tokenizer) -> None:
    prepared, report = prepare_prompts(
        [{"prompt": "hi w1"}, {"prompt": "hi w1 w2"}], word_tokenizer, max_prompt_tokens=2, max_drop_fraction=0.5
    )
    assert prepared["prompt_ids"][:] == [ids("hi", "w1")]
    assert report.as_dict()["drops"] == {
        "prompt longer than max_prompt_tokens": {"count": 1, "row_ids": [1], "example": "3 tokens, max_prompt_tokens=2"}
    }
    assert report.quantiles() == {"prompt": {"min": 2, "median": 2, "p95": 2, "max": 2}}


def test_text_keeps_the_beginning_that_the_tokenizer_gives_it_and_needs_no_eos(llama_like_tokenizer) -> None:
    prepared, _ = prepare_prompts([{"prompt": "say hello"}], llama_like_tokenizer, max_prompt_tokens=None)
    pairs, _ = prepare_preferences(
        [{"prompt": "say hello", "chosen": " foo", "rejected": " bar"}], llama_like_tokenizer, max_length=None
    )
    assert prepared[0]["prompt_ids"] == pairs[0]["prompt_ids"]
    assert prepared[0]["prompt_ids"][0] == llama_like_tokenizer.bos_token_id
    without_eos = copy.deepcopy(llama_like_tokenizer)
    without_eos.eos_token = None
    again, _ = prepare_prompts([{"prompt": "say hello"}], without_eos, max_prompt_tokens=None)
    assert again[0]["prompt_ids"] == prepared[0]["prompt_ids"]


def test_transcripts_stay_text_without_a_template(byte_bpe_tokenizer) -> None:
    text = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: w1\n\nAssistant:"
    for row in (HH, {"prompt": text}):
        prepared, _ = prepare_prompts([row], byte_bpe_tokenizer, max_prompt_tokens=None)
        assert prepared[0]["prompt"] == text
        assert byte_bpe_tokenizer.decode(prepared[0]["prompt_ids"]) == text
    assert to_prompt({"prompt": text}, transcripts=Transcripts.AS_TEXT) == Prompt(text)


def test_hh_has_the_prompts_that_preferences_have(shared_data, smol_tokenizer) -> None:
    rows = load_preferences(str(shared_data / "hh_harmless_train.jsonl"), split="train[:300]")
    pairs, pair_report = prepare_preferences(rows, smol_tokenizer, max_length=None)
    prompts, report = prepare_prompts(rows, smol_tokenizer, max_prompt_tokens=None)
    assert len(prompts) > 280
    assert prompts["row_id"][:] == pairs["row_id"][:]
    assert prompts["prompt_ids"][:] == pairs["prompt_ids"][:]
    assert report.drops == pair_report.drops
    assert prompts.column_names == ["row_id", "prompt_ids", "prompt"]
    for row in prompts.select(range(20)):
        rendered = smol_tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        assert smol_tokenizer(rendered, add_special_tokens=False)["input_ids"] == row["prompt_ids"]


def test_what_was_prepared_can_be_prepared_again(word_tokenizer) -> None:
    once, _ = prepare_prompts([{**HH, "n": 1}, {**HH, "n": 2}], word_tokenizer, max_prompt_tokens=None)
    again, _ = prepare_prompts(once, word_tokenizer, max_prompt_tokens=None)
    assert again.to_list() == once.to_list()


def test_two_processes_give_the_same(word_tokenizer) -> None:
    dataset = Dataset.from_list([{"prompt": [USER], "n": 1}, {"prompt": [USER, ANSWER, AGAIN], "n": 2}] * 3)
    one = prepare_prompts(dataset, word_tokenizer, max_prompt_tokens=5, max_drop_fraction=0.5)
    two = prepare_prompts(dataset, word_tokenizer, max_prompt_tokens=5, max_drop_fraction=0.5, num_proc=2)
    assert one[0].to_list() == two[0].to_list() == [{**one[0][0], "row_id": i} for i in (0, 2, 4)]
    assert one[1] == two[1]


def test_the_second_call_tokenises_nothing(tmp_path, word_tokenizer, monkeypatch) -> None:
    Dataset.from_list([{"prompt": "hi"}, {"prompt": ""}, {"prompt": "w1 w2"}]).save_to_disk(tmp_path / "rows")
    dataset = Dataset.load_from_disk(tmp_path / "rows")
    first = prepare_prompts(dataset, word_tokenizer, max_prompt_tokens=2, max_drop_fraction=0.5)
    calls, encode = [], RecordTokenizer.encode

    def counted(self: RecordTokenizer, records: list) -> list:
        calls.append(len(records))
        return encode(self, records)

    monkeypatch.setattr(RecordTokenizer, "encode", counted)
    second = prepare_prompts(dataset, word_tokenizer, max_prompt_tokens=2, max_drop_fraction=0.5)
    assert calls == []
    assert second[0].to_list() == first[0].to_list()
    assert second[1] == first[1]
    shorter, _ = prepare_prompts(dataset, word_tokenizer, max_prompt_tokens=1, max_drop_fraction=0.9)
    assert (calls, len(shorter)) == ([2], 1)  # another limit is another result; the empty row is never tokenised


def test_a_prompt_can_be_shown(word_tokenizer) -> None:
    prepared, _ = prepare_prompts([{"prompt": [USER]}], word_tokenizer, max_prompt_tokens=None)
    assert str(show_example(prepared[0], word_tokenizer)) == (
        "── prompt (row 0), 3 tokens, not trained on ──\n<user> hi <assistant>\n"
    )


NOT_TEXT, EMPTY, ROLES = DropReason.NOT_TEXT, DropReason.EMPTY, DropReason.WRONG_ROLES
ARGUMENTS = DropReason.BAD_TEMPLATE_ARGUMENTS

# name: (a row, reason, what the report says was found)
BAD: dict[str, tuple[dict[str, Any], DropReason, str]] = {
    "text empty": ({"prompt": ""}, EMPTY, "prompt is empty"),
    "text whitespace": ({"prompt": " \n\t\u00a0"}, EMPTY, "prompt is empty"),
    "no messages": ({"prompt": []}, EMPTY, "prompt has no messages"),
    "last message whitespace": ({"prompt": [{**USER, "content": "\n"}]}, EMPTY, "the prompt's last message is empty"),
    "an answer to nothing": ({"messages": [ANSWER]}, EMPTY, "prompt has no messages"),
    "None": ({"prompt": None}, NOT_TEXT, "prompt is None"),
    "a number": ({"prompt": 3.5}, NOT_TEXT, "prompt is float ('3.5')"),
    "token ids in prompt": ({"prompt": [4, 5]}, NOT_TEXT, "prompt is a list of token ids; rewards need text"),
    "a list of texts": ({"prompt": ["hi"]}, NOT_TEXT, "prompt[0] is str ('hi') where a message"),
    "content None": ({"prompt": [{**USER, "content": None}]}, NOT_TEXT, "prompt[0].content is None"),
    "an image": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        NOT_TEXT,
        "prompt[0].content has a part that is not text",
    ),
    "a lone surrogate": ({"prompt": "hi \ud83d"}, NOT_TEXT, "a lone surrogate '\\ud83d' at character 3"),
    "what JSON cannot say": ({"prompt": [{**USER, "at": {1, 2}}]}, NOT_TEXT, "neither text nor JSON: Object of"),
    "messages None": ({"messages": None}, NOT_TEXT, "messages is None where a list of messages"),
    "ends with assistant": ({"prompt": [USER, ANSWER]}, ROLES, "prompt ends with assistant, not with user or tool"),
    "only a system message": ({"messages": [SYSTEM]}, ROLES, "prompt ends with system, not with user or tool"),
    "an answered transcript": ({"prompt": "\n\nHuman: hi\n\nAssistant: yes"}, ROLES, "prompt ends with assistant"),
    "two users": ({"prompt": [USER, AGAIN]}, ROLES, "prompt: message 1 is user after user"),
    "unknown role": ({"prompt": [{**USER, "role": "narrator"}]}, ROLES, "prompt[0] has the unknown role 'narrator'"),
    "a tool first": ({"prompt": [TOOL]}, ROLES, "prompt: message 0 is tool at the start"),
    "too long": ({"prompt": "w1 " * 21}, DropReason.PROMPT_TOO_LONG, "21 tokens, max_prompt_tokens=20"),
    "identical pair": ({**HH, "rejected": HH["chosen"]}, DropReason.IDENTICAL, "chosen and rejected are the same"),
    "a pair without a common start": ({"chosen": "yes", "rejected": "no"}, EMPTY, "share no prompt"),
    "tools no list": ({"prompt": [USER], "tools": "{}"}, ARGUMENTS, "tools is dict, not a list"),
    "a reserved argument": (
        {"prompt": [USER], "chat_template_kwargs": {"tokenize": True}},
        ARGUMENTS,
        "chat_template_kwargs may not set 'tokenize'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_dropped_and_counted(case: str, word_tokenizer) -> None:
    row, reason, detail = BAD[case]
    good = HH if "chosen" in row else {"messages": [USER]} if "messages" in row else {"prompt": "hi"}
    prepared, report = prepare_prompts([good, row, good], word_tokenizer, max_prompt_tokens=20, max_drop_fraction=0.5)
    assert prepared["row_id"][:] == [0, 2]
    assert {reason: (count.count, count.row_ids) for reason, count in report.drops.items()} == {reason: (1, [1])}
    assert detail in report.drops[reason].example


def test_a_template_may_refuse_a_row(word_tokenizer) -> None:
    own = copy.deepcopy(word_tokenizer)
    own.chat_template = "{{ raise_exception('no system') if messages[0].role == 'system' else messages[0].content }}"
    _, report = prepare_prompts(
        [{"prompt": [USER]}, {"prompt": [SYSTEM, USER]}], own, max_prompt_tokens=None, max_drop_fraction=0.5
    )
    assert report.drops[DropReason.TEMPLATE_REFUSED].example == "TemplateError: no system"


# name: (dataset, options, error, what it says)
REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no prompt column": (
        [{"promt": "hi", "n": 1}],
        {},
        DataError,
        r"train: none of the columns \['promt', 'n'\] holds prompts\. Did you mean 'prompt'\? Give `prompt` \(text or",
    ),
    "one half of a pair": ([{"chosen": "hi"}], {}, DataError, r"none of the columns \['chosen'\] holds prompts\. Give"),
    "input_ids": ([{"input_ids": [4]}], {}, DataError, "'input_ids' holds token ids, and PPO's rewards need text"),
    "prompt_ids": ([{"prompt_ids": [4], "n": 1}], {}, DataError, "'prompt_ids' holds token ids, and PPO's rewards"),
    "images": ([{"prompt": "hi", "images": []}], {}, DataError, "the column 'images': alignkit is text only"),
    "a stream": (
        Dataset.from_list([{"prompt": "hi"}]).to_iterable_dataset(),
        {},
        ConfigError,
        "train: PPO needs a dataset of known length, and this is a stream: load it without streaming=True",
    ),
    "a dict of datasets": (
        DatasetDict({"train": Dataset.from_list([{"prompt": "hi"}])}),
        {},
        DataError,
        r"train: a dict of datasets \['train'\]; give one of them",
    ),
    "no rows": ([], {}, DataError, "train: the dataset has no rows"),
    "rows of text": (["hi"], {}, DataError, "train: row 0 is a str, not a dict of columns"),
    "a column that no dataset holds": (
        [{"prompt": "hi", "check": object()}],
        {},
        DataError,
        "train: the column 'check' cannot be kept for the rewards",
    ),
    "a column nested deeper than JSON goes": (
        [{"prompt": "hi", "check": deep(5000)}],
        {},
        DataError,
        "train: the column 'check' cannot be kept for the rewards",
    ),
    "a column of text and what is not JSON": (
        [{"prompt": "hi", "check": "x"}, {"prompt": "hi", "check": object()}],
        {},
        DataError,
        "train: the column 'check' cannot be kept for the rewards",
    ),
    "no room": ([{"prompt": "hi"}], {"max_prompt_tokens": 0}, DataError, "max_prompt_tokens=0 leaves no room for a p"),
    "many drops": (
        [{"prompt": "hi"}, {"prompt": " "}, {"prompt": "w1"}],
        {"name": "eval"},
        DataError,
        r"eval: 1 of 3 rows \(33\.3%\) were dropped, more than max_drop_fraction=0\.2 allows",
    ),
    "all dropped": (
        [{"prompt": [4, 5]}],
        {"max_drop_fraction": 1.0},
        DataError,
        r"none of the 1 rows can be used(.|\n)*prompt is a list of token ids",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_datasets_that_are_refused(case: str, word_tokenizer) -> None:
    dataset, options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        prepare_prompts(dataset, word_tokenizer, **{"max_prompt_tokens": 20, **options})


def test_conversations_need_a_chat_template(plain_tokenizer) -> None:
    with pytest.raises(DataError, match="The rows are conversations, but the tokenizer has no chat template"):
        prepare_prompts([{"prompt": [USER]}], plain_tokenizer, max_prompt_tokens=None)


def test_one_row_by_itself() -> None:
    assert to_prompt({"messages": [USER, CALL, TOOL, ANSWER]}) == Prompt([USER, CALL, TOOL])
    with pytest.raises(BadRow, match=re.escape("wrong roles: prompt ends with assistant, not with user or tool")):
        to_prompt({"prompt": [USER, ANSWER]})
