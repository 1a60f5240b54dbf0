"""A reward model as transformers' sequence classifier: loading one and saving one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from alignkit.errors import ModelError
from alignkit.models.adapters import put_saved_adapter
from alignkit.models.heads import SCORE, ScalarHead
from alignkit.models.load import compute_dtype, training_device
from alignkit.models.reward_adapter import find_reward_adapter
from alignkit.models.source import LOADING_ERRORS, Source, check_whole_model, explain, hub_kwargs_of, locate
from alignkit.models.tokenizer import load_tokenizer, with_distinct_pad_token
from alignkit.models.untrusted.adapters import find_adapter


class RewardModel(NamedTuple):
    """A sequence classifier whose logits are rewards, `(rows, heads)`, and the tokenizer that pads for it."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase


def load_reward_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> RewardModel:
    """Load what `RewardTrainer` saved as a plain `...ForSequenceClassification`, in evaluation mode.

    It gives the rewards of training: the head is fp32 whatever the base's dtype, and `pad_token_id` is one that ends
    no text (see `with_distinct_pad_token`). Tokenize prompt and completion together, as in training: conversations with
    `tokenizer.apply_chat_template(messages)`, text with `tokenizer(prompt + completion + tokenizer.eos_token)`.

    Args:
        folder: an output folder or checkpoint of `RewardTrainer`, or its name on the Hub.
        dtype: of the base; by default what the device computes in.
        quantization_config: `alignkit.nf4()` or another for the base of an adapter.
        trust_remote_code: allow code from the repository to run.
        device: by default this process's.

    Raises:
        ModelError: nothing there, no reward model, or an architecture without a sequence classifier in transformers.
    """
    device = training_device() if device is None else torch.device(device)
    tokenizer = with_distinct_pad_token(load_tokenizer(folder, trust_remote_code=trust_remote_code))
    settings: dict[str, Any] = {
        "dtype": compute_dtype(device) if dtype is None else dtype,
        "trust_remote_code": trust_remote_code,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if quantization_config is not None:
        settings |= {"quantization_config": quantization_config, "device_map": {"": device}}
    saved = find_reward_adapter(folder)
    if saved is None:
        source = locate(folder, {})
        if source.adapter is not None:
            raise ModelError(f"'{folder}' is an adapter of a language model, not a reward model")
        model: Any = _classifier(source, **settings)
    else:
        base: Any = _classifier(locate(saved.source.base, {}), num_labels=saved.outputs, **settings)
        files = find_adapter(saved.source.name, **hub_kwargs_of(saved.source))
        # The adapter copies this module: fp32, and cast to by itself, like the head that was trained.
        width = base.get_submodule(SCORE).weight.shape[1]
        base.add_module(SCORE, ScalarHead(width, saved.outputs).to(base.device))
        model = put_saved_adapter(base, files, folder, saved.config)
    return RewardModel((model if quantization_config is not None else model.to(device)).eval(), tokenizer)


def _classifier(source: Source, **settings: Any) -> PreTrainedModel:
    check_whole_model(source, trust_remote_code=settings["trust_remote_code"])
    try:
        with without_load_report():
            return AutoModelForSequenceClassification.from_pretrained(source.name, use_safetensors=True, **settings)
    except torch.OutOfMemoryError:
        raise
    except LOADING_ERRORS as error:
        raise ModelError(f"The reward model cannot be loaded: {explain(error, source.name)}") from error


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Silence the report that the head is new and the output layer unused: both are as they should be."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def save_classifier(
    model: PreTrainedModel, folder: str | Path, *, pad_token_id: int, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Save a causal language model that was trained whole, with its head, as a sequence classifier.

    Raises:
        ModelError: transformers has no sequence classifier of this architecture, or one of other weights.
    """
    weights: dict[str, Any] = dict(model.state_dict() if state_dict is None else state_dict)
    config = copy.deepcopy(model.config)
    config.num_labels = weights[f"{SCORE}.weight"].shape[0]
    config.get_text_config().pad_token_id = pad_token_id
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
    except ValueError as error:
        raise ModelError(
            f"transformers has no sequence classifier for {type(model).__name__}, so a reward model that was trained "
            "whole cannot be saved as one: train an adapter (peft_config)"
        ) from error
    wanted = set(classifier.state_dict())
    if wanted - weights.keys():
        raise ModelError(
            f"transformers' {type(classifier).__name__} has other weights: {sorted(wanted - set(weights))}"
        )
    classifier.save_pretrained(folder, state_dict={name: weights[name] for name in wanted})
