"""What prepared data and a model must have in common, seen before the first forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy

from alignkit.data.collate import ID_COLUMNS
from alignkit.errors import ConfigError, DataError, ModelError
from alignkit.trainers.config_engine import EngineConfig


def check_evaluation(eval_dataset: Any, args: EngineConfig) -> None:
    """See that there is something to evaluate on.

    Raises:
        ConfigError: evaluations are asked for, and there is no dataset for them.
    """
    strategy = IntervalStrategy(args.eval_strategy).value
    if eval_dataset is None and strategy != "no":
        raise ConfigError(f"eval_strategy='{strategy}' needs an eval_dataset: pass one, or set eval_strategy='no'")


def named_datasets(train: Any, evaluation: Any) -> dict[str, Any]:
    """Prepared datasets by the names that their reports have."""
    if isinstance(evaluation, Mapping):
        return {"train": train, **{f"eval_{key}": dataset for key, dataset in evaluation.items()}}
    return {"train": train, **({} if evaluation is None else {"eval": evaluation})}


def check_pairs(datasets: Mapping[str, Any], model: PreTrainedModel | PeftModel) -> None:
    """See that a model has an embedding for every token of tokenised rows, and a position for every place.

    A GPU that is asked for another one ends the process, without a word of the cause. Rotary positions have no end. A
    stream is not read for this.

    Raises:
        ModelError: a tokenizer of another model.
        DataError: rows that are longer than learned positions reach.
    """
    config = model.config.get_text_config()
    most = positions_of(config)
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset):
            continue
        check_vocabulary(dataset, config.vocab_size, name)
        prompts, first, second = (row_lengths(dataset, column) for column in ID_COLUMNS)
        longest = int(np.nanmax(prompts + np.fmax(first, second)))
        if most is not None and "rope_parameters" not in config.to_dict() and longest > most:
            raise DataError(
                f"{name}: the longest row has {longest} tokens, and the model has {most} positions: set "
                f"max_length={most} or less."
            )


def check_vocabulary(dataset: Dataset, vocab_size: int, name: str) -> None:
    """See that every token id of a prepared dataset is one of the model's.

    Raises:
        ModelError: a tokenizer of another model.
    """
    columns = [column for column in ID_COLUMNS if column in dataset.column_names]
    chunks = [chunk.flatten() for column in columns for chunk in dataset.data.column(column).chunks]
    largest = max(int(chunk.to_numpy(zero_copy_only=False).max()) for chunk in chunks if len(chunk))
    if largest >= vocab_size:
        raise ModelError(
            f"{name}: the tokenizer makes token {largest}, and the model's vocabulary has {vocab_size} tokens, so it "
            "is another model's. Pass the model's own tokenizer as processing_class."
        )


def row_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """Tokens in `column` of every row `(N,)`; not a number for rows that were dropped."""
    chunks = dataset.data.column(column).chunks
    return np.concatenate([chunk.value_lengths().to_numpy(zero_copy_only=False).astype(float) for chunk in chunks])


def positions_of(config: Any) -> int | None:
    """How many positions a model's configuration states."""
    values = config.to_dict()
    return values.get("max_position_embeddings") or values.get("n_positions")
