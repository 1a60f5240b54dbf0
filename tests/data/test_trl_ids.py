"""Ids equal the installed TRL's, on real rows and made-up ones, wherever the prompt is a prefix."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from alignkit.data.messages import transcript_to_messages
from alignkit.data.prepare import prepare_preferences
from alignkit.data.records import to_record
from alignkit.data.sources import load_preferences

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@pytest.fixture(scope="module")
def trl_prepare():
    """TRL's own preparation, run without building a trainer around it."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer

    def prepare(rows: list[dict[str, Any]], tokenizer, max_length: int | None) -> Dataset:
        stand_in = SimpleNamespace(_tokenizer=tokenizer)
        args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
        dataset = Dataset.from_list([{**row, "row_id": i} for i, row in enumerate(rows)])
        return trainer._prepare_dataset(stand_in, dataset, tokenizer, args, "train")

    return prepare


def assert_same_ids(ours: Dataset, theirs: Dataset, max_length: int | None, *, at_least: int) -> None:
    """TRL truncates in its collator: prompt + completion to `max_length`, from the start."""
    wanted = {row["row_id"]: row for row in theirs}
    for row in ours:
        other = wanted[row["row_id"]]
        assert row["prompt_ids"] == other["prompt_ids"]
        for column in ("chosen_ids", "rejected_ids"):
            assert row["prompt_ids"] + row[column] == (other["prompt_ids"] + other[column])[:max_length]
    assert len(ours) >= at_least


def test_hh_as_messages(shared_data, smol_tokenizer, trl_prepare) -> None:
    rows = load_preferences(str(shared_data / "hh_harmless_train.jsonl"), split="train[:400]")
    ours, report = prepare_preferences(rows, smol_tokenizer, max_length=300)
    messages = [{name: transcript_to_messages(row[name]) for name in ("chosen", "rejected")} for row in rows]
    theirs = trl_prepare(messages, smol_tokenizer, 300)
    assert_same_ids(ours, theirs, 300, at_least=350)
    assert report.not_prefix.count == 0
    # TRL drops the rows whose prompt fills the length, and we drop those too.
    kept = {row["row_id"] for row in ours}
    dropped = {i for count in report.drops.values() for i in count.row_ids}
    assert set(range(400)) - kept >= dropped
    assert set(theirs["row_id"]) - kept <= dropped


def test_sharegpt_pairs(shared_data, smol_tokenizer, trl_prepare) -> None:
    path = shared_data / "dpo_en_demo.json"
    ours, report = prepare_preferences(load_preferences(str(path)), smol_tokenizer, max_length=2048)
    rows = [
        {
            "prompt": [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]],
            "chosen": [{"role": "assistant", "content": row["chosen"]["value"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]["value"]}],
        }
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]
    assert_same_ids(ours, trl_prepare(rows, smol_tokenizer, 2048), 2048, at_least=285)
    assert report.not_prefix.count == 0


def test_unpaired_rows(shared_data, smol_tokenizer) -> None:
    trainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    path = shared_data / "kto_en_demo.json"
    ours, report = prepare_preferences(load_preferences(str(path)), smol_tokenizer, max_length=2048, unpaired=True)
    rows = [
        {"row_id": i, "prompt": row["messages"][:-1], "completion": row["messages"][-1:], "label": row["label"]}
        for i, row in enumerate(json.loads(path.read_text(encoding="utf-8")))
    ]
    stand_in = SimpleNamespace(_tokenizer=smol_tokenizer, calculate_KL=False)
    args = SimpleNamespace(dataset_num_proc=None, max_length=2048)
    theirs = trainer._prepare_dataset(stand_in, Dataset.from_list(rows), smol_tokenizer, args, "eval")
    assert ours["row_id"] == theirs["row_id"]
    for row, other in zip(ours, theirs, strict=True):
        assert (row["prompt_ids"], row["label"]) == (other["prompt_ids"], other["label"])
        assert row["prompt_ids"] + row["chosen_ids"] == (other["prompt_ids"] + other["completion_ids"])[:2048]
    assert (len(ours), report.not_prefix.count) == (294, 0)


def test_plain_text_of_hh(shared_data, smol_tokenizer, trl_prepare) -> None:
    """Explicit text prompts, and the same rows with the prompt inside both completions."""
    explicit = []
    for row in load_preferences(str(shared_data / "hh_harmless_train.jsonl"), split="train[:250]"):
        prompt, mark, chosen = row["chosen"].rpartition("\n\nAssistant:")
        other, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
        if prompt == other:
            explicit.append({"prompt": "Dialogue" + prompt + mark, "chosen": chosen, "rejected": rejected})
    implicit = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in explicit]
    for rows, at_least in ((explicit, 220), (implicit, 150)):
        ours, report = prepare_preferences(rows, smol_tokenizer, max_length=None)
        prefixed = ours.select([i for i, row in enumerate(ours) if is_prefix(rows[row["row_id"]], smol_tokenizer)])
        assert len(prefixed) == len(ours) - report.not_prefix.count
        assert_same_ids(prefixed, trl_prepare(rows, smol_tokenizer, None), None, at_least=at_least)


def is_prefix(row: dict[str, str], tokenizer) -> bool:
    """Whether the tokens of a text row's prompt are the first tokens of prompt + completion, for both completions."""
    record = to_record(row)
    start = tokenizer(record.prompt)["input_ids"]
    return all(tokenizer(record.prompt + text)["input_ids"][: len(start)] == start for text in record.completions)
