"""Splits that share no row, and when an adapter is added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from alignkit.cli.arguments import ModelArguments, ScriptArguments
from alignkit.cli.inputs import load_splits, new_adapter
from alignkit.errors import ConfigError
from alignkit.models.load import add_adapter
from tests.model_factory import tiny_model


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts(rows: Any) -> list[int]:
    return [int(row["prompt"][1:]) for row in rows]


def splits(name: str, **options: Any) -> tuple[list[int], list[int]]:
    train, test = load_splits(ScriptArguments(dataset_name=name, **options))
    return prompts(train), prompts(test)


def test_the_last_rows_are_held_out(file: str) -> None:
    assert splits(file, holdout_rows=3) == ([0, 1, 2, 3, 4, 5, 6], [7, 8, 9])


def test_slices_of_one_file(file: str) -> None:
    found = splits(file, dataset_train_split="train[:4]", dataset_test_split="train[-2:]")
    assert found == ([0, 1, 2, 3], [8, 9])


def test_the_first_rows_are_trained_on(file: str) -> None:
    assert splits(file, holdout_rows=3, max_train_rows=2) == ([0, 1], [7, 8, 9])
    assert splits(file, holdout_rows=9, max_train_rows=5) == ([0], [1, 2, 3, 4, 5, 6, 7, 8, 9])


def test_a_stream_is_cut_too(file: str) -> None:
    options = {"dataset_train_split": "train[:6]", "dataset_test_split": "train[6:8]", "dataset_streaming": True}
    script = ScriptArguments(dataset_name=file, max_train_rows=2, **options)
    train, test = load_splits(script)
    assert isinstance(train, IterableDataset)
    assert (prompts(train), prompts(test)) == ([0, 1], [6, 7])


def test_splits_of_a_saved_dataset_may_have_the_same_slices(tmp_path: Path) -> None:
    parts = {
        name: Dataset.from_list([{"prompt": f"p{i + start}"} for i in range(3)])
        for name, start in (("train", 0), ("test", 10))
    }
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    found = splits(str(tmp_path / "saved"), dataset_train_split="train[:2]", dataset_test_split="test[:2]")
    assert found == ([0, 1], [10, 11])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "is one file, which has no split 'test'"),
        ({"dataset_test_split": "train[-2:]"}, "share 2 rows, from row 8 on"),
        ({"dataset_train_split": "train[:9]", "dataset_test_split": "other[7:]"}, "share 2 rows, from row 7 on"),
        (
            {"dataset_train_split": "train[:5]", "dataset_test_split": "train[3:]", "dataset_streaming": True},
            "share 2 rows, from row 3 on",
        ),
        ({"holdout_rows": 10}, "has 10 rows, so none would be left"),
        ({"holdout_rows": 2, "dataset_test_split": "train[:3]"}, "would have no effect; give one of the two"),
        ({"holdout_rows": 2, "dataset_streaming": True}, "a stream's last rows are not known"),
    ],
)
def test_splits_that_cannot_be_are_refused(file: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        splits(file, **options)


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    config = ModelArguments().to_peft_config()
    assert config is not None
    adapted = add_adapter(type(model).from_pretrained(tmp_path / "base"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_a_model_gets_a_new_adapter_and_an_adapter_none(adapter: str) -> None:
    base = str(Path(adapter).parent / "base")
    config = new_adapter(ModelArguments(model_name_or_path=base, lora_r=4))
    assert config is not None
    assert config.r == 4
    assert new_adapter(ModelArguments(model_name_or_path=base, use_peft=False)) is None
    assert new_adapter(ModelArguments(model_name_or_path=adapter)) is None


@pytest.mark.parametrize("options", [{"lora_r": 4}, {"use_rslora": True}, {"use_peft": False}])
def test_options_of_an_adapter_that_exists_are_refused(adapter: str, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}=.*is an adapter and is trained on as it is"):
        new_adapter(ModelArguments(model_name_or_path=adapter, **options))
