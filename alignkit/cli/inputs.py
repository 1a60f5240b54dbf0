"""What a recipe's arguments stand for: the rows to train on and to hold out, and the adapter to train."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, IterableDataset, ReadInstruction
from peft import LoraConfig

from alignkit.cli.arguments import ModelArguments, ScriptArguments
from alignkit.data.sources import load_preferences
from alignkit.errors import ConfigError
from alignkit.models.source import locate


class Splits(NamedTuple):
    """Rows to train on, and rows that are held out."""

    train: Dataset | IterableDataset
    test: Dataset | IterableDataset


def load_splits(script: ScriptArguments) -> Splits:
    """Load both splits; no row is in both.

    Raises:
        ConfigError: the two splits overlap, too few rows are left, or options that exclude each other.
        DataError: the data cannot be loaded.
    """
    if script.holdout_rows is not None:
        train, test = _hold_out(script, script.holdout_rows)
    else:
        _check_single_file(script)
        train, test = _load(script, script.dataset_train_split), _load(script, script.dataset_test_split)
        _check_disjoint(script)
    if script.max_train_rows is not None:
        first = script.max_train_rows
        train = train.take(first) if isinstance(train, IterableDataset) else train.select(range(min(first, len(train))))
    return Splits(train, test)


def new_adapter(model: ModelArguments) -> LoraConfig | None:
    """Return the adapter to add: none when training whole, and none when an adapter is given to be trained on.

    Raises:
        ConfigError: adapter options for an adapter that exists already.
        ModelError: there is no such model.
    """
    revision = {} if model.model_revision == "main" else {"revision": model.model_revision}
    if locate(model.model_name_or_path, revision).adapter is None:
        return model.to_peft_config()
    for field in dataclasses.fields(model):
        describes_adapter = field.name.startswith("lora_") or field.name in ("use_peft", "use_rslora", "use_dora")
        if describes_adapter and vars(model)[field.name] != field.default:
            raise ConfigError(
                f"{field.name}={vars(model)[field.name]!r}: has no effect, because {model.model_name_or_path!r} is an "
                "adapter and is trained on as it is. Leave the option out, or give the base model."
            )
    return None


def _load(script: ScriptArguments, split: str) -> Dataset | IterableDataset:
    return load_preferences(
        script.dataset_name, split=split, streaming=script.dataset_streaming, config_name=script.dataset_config
    )


def _hold_out(script: ScriptArguments, rows: int) -> Splits:
    if script.dataset_streaming:
        raise ConfigError(
            f"holdout_rows={rows}: a stream's last rows are not known; give dataset_test_split, or do not stream."
        )
    if script.dataset_test_split != "test":
        raise ConfigError(
            f"holdout_rows={rows}: takes the held-out rows from the training split, so "
            f"dataset_test_split={script.dataset_test_split!r} would have no effect; give one of the two."
        )
    whole = _load(script, script.dataset_train_split)
    assert isinstance(whole, Dataset)  # not streaming
    if len(whole) <= rows:
        raise ConfigError(f"holdout_rows={rows}: the training split has {len(whole)} rows, so none would be left.")
    return Splits(whole.select(range(len(whole) - rows)), whole.select(range(len(whole) - rows, len(whole))))


def _is_file(script: ScriptArguments) -> bool:
    return script.dataset_name != "demo" and Path(script.dataset_name).expanduser().is_file()


def _check_single_file(script: ScriptArguments) -> None:
    if _is_file(script) and "[" not in script.dataset_test_split:
        raise ConfigError(
            f"{script.dataset_name} is one file, which has no split {script.dataset_test_split!r}: its rows would be "
            "trained on and evaluated on. Give --holdout_rows 300, or --dataset_train_split 'train[:-300]' with "
            "--dataset_test_split 'train[-300:]'."
        )


def _check_disjoint(script: ScriptArguments) -> None:
    """Refuse slices of one split that share rows; of a stream, whose length is not known, too."""
    train, test = _base(script.dataset_train_split), _base(script.dataset_test_split)
    if train != test and not _is_file(script):
        return
    whole = _load(script, train)
    rows = len(whole) if isinstance(whole, Dataset) else 2**62
    first, second = (_bounds(split, rows) for split in (script.dataset_train_split, script.dataset_test_split))
    shared = range(max(first.start, second.start), min(first.stop, second.stop))
    if shared:
        raise ConfigError(
            f"dataset_train_split={script.dataset_train_split!r} and dataset_test_split={script.dataset_test_split!r} "
            f"share {len(shared)} rows, from row {shared.start} on: what is trained on cannot be held out."
        )


def _base(split: str) -> str:
    return split.split("[")[0].strip()


def _bounds(split: str, rows: int) -> range:
    cut = re.search(r"\[.*\]", split)
    (part,) = ReadInstruction.from_spec(f"rows{cut[0] if cut else ''}").to_absolute({"rows": rows})
    return range(part.from_ or 0, rows if part.to is None else part.to)
