"""From what a user names as rewards to reward sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import ConfigError, ModelError
from alignkit.models.load import load_tokenizer, training_device
from alignkit.models.lora import is_quantized
from alignkit.models.source import HUB_KWARGS, LOADING_ERRORS, check_whole_model, explain, locate
from alignkit.rollout.callables import CallableReward
from alignkit.rollout.classifier import ClassifierReward, base_of
from alignkit.rollout.reward import RewardSource

RewardSpec = str | Path | PreTrainedModel | PeftModel | RewardSource | Callable[..., Any]
AdapterSource = Callable[[str], RewardSource]


def make_reward_sources(
    spec: RewardSpec | Sequence[RewardSpec],
    reward_processing_classes: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None = None,
    *,
    adapter_source: AdapterSource | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    model_init_kwargs: Mapping[str, Any] | None = None,
) -> list[RewardSource]:
    """Make a reward source of each thing in `spec`.

    Args:
        spec: a function, a classifier by name, path or object, a `RewardSource` such as `ClassifierReward` with options
            of its own, a reward adapter's path, or a list of these.
        reward_processing_classes: tokenizers of the classifiers, one entry per thing in `spec` (`None` for what is no
            classifier); by default what a classifier's own folder or repository holds.
        adapter_source: makes a source of a folder or repository that holds an adapter.
        device: where classifiers go, unless they are quantized; by default this process's.
        trust_remote_code: allow a repository's own code to run.
        model_init_kwargs: arguments of `from_pretrained` for classifiers given by name.

    Raises:
        ConfigError: nothing given, or things and tokenizers that do not match.
        ModelError: a classifier or tokenizer that cannot be loaded.
    """
    specs = list(spec) if isinstance(spec, list | tuple) else [spec]
    if not specs:
        raise ConfigError("reward_funcs is empty: give at least one function, classifier or adapter")
    tokenizers = _tokenizers(reward_processing_classes, len(specs))
    loading: dict[str, Any] = {
        "device": training_device() if device is None else device,
        "trust_remote_code": trust_remote_code,
        "model_init_kwargs": model_init_kwargs or {},
    }
    return [_make(each, tokenizer, adapter_source, loading) for each, tokenizer in zip(specs, tokenizers, strict=True)]


def _make(
    spec: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    adapter_source: AdapterSource | None,
    loading: Mapping[str, Any],
) -> RewardSource:
    if isinstance(spec, str | Path):
        hub_kwargs = {key: value for key, value in loading["model_init_kwargs"].items() if key in HUB_KWARGS}
        source = locate(spec, hub_kwargs)
        if source.adapter is None:
            return load_classifier(spec, tokenizer=tokenizer, **loading)
        _refuse_tokenizer(tokenizer, f"the adapter '{spec}', which has its base's")
        return _from_adapter(source.name, adapter_source)
    if isinstance(spec, RewardSource) and not isinstance(spec, type):
        _refuse_tokenizer(tokenizer, f"'{spec.names[0]}', which is a reward source already")
        return spec
    if isinstance(spec, nn.Module):
        return _from_model(spec, tokenizer, loading["device"], loading["trust_remote_code"])
    function = CallableReward(spec)
    _refuse_tokenizer(tokenizer, f"the function '{function.names[0]}'")
    return function


def load_classifier(
    model: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    model_init_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> ClassifierReward:
    """Load a sequence classifier with its tokenizer, in the dtype that it was saved in.

    Args:
        model: a folder or a name on the Hub.
        tokenizer: by default the classifier's own.
        device: by default this process's; a quantized model stays where it was loaded.
        trust_remote_code: allow the repository's own code to run.
        model_init_kwargs: arguments of `from_pretrained` (`dtype`, `revision`, `quantization_config`, ...).
        **options: of `ClassifierReward` (`name`, `label`, `output`, `max_tokens`, ...).

    Raises:
        ModelError: nothing there, or a checkpoint without a classification head, which would be random.
    """
    kwargs: dict[str, Any] = {"dtype": "auto", **(model_init_kwargs or {})}
    hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
    source = locate(model, hub_kwargs)
    if source.adapter is not None or source.gguf_file is not None:
        kind = "an adapter" if source.adapter is not None else "a GGUF file"
        raise ModelError(
            f"'{model}' holds {kind}, not a whole sequence classifier; load it yourself and pass the model"
        )
    check_whole_model(source, trust_remote_code=trust_remote_code, variant=kwargs.get("variant"))
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            source.name,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **source.kwargs,
            **{**kwargs, "use_safetensors": True},
        )
    except torch.OutOfMemoryError:
        raise
    except LOADING_ERRORS as error:
        raise ModelError(f"The reward model cannot be loaded: {explain(error, source.name)}") from error
    classifier, info = loaded
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:4])
        raise ModelError(
            f"'{model}' has no weights for {missing}, so its scores would be random. Give a trained sequence "
            "classifier, not a language model."
        )
    if tokenizer is None:
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, **hub_kwargs)
    return ClassifierReward(_placed(classifier, device or training_device()), tokenizer, **options)


def _tokenizers(given: Any, count: int) -> list[PreTrainedTokenizerBase | None]:
    if given is None:
        return [None] * count
    tokenizers = list(given) if isinstance(given, list | tuple) else [given]
    if len(tokenizers) != count:
        raise ConfigError(
            f"{len(tokenizers)} reward_processing_classes for {count} rewards: give one for each, None for functions"
        )
    return tokenizers


def _refuse_tokenizer(tokenizer: PreTrainedTokenizerBase | None, what: str) -> None:
    if tokenizer is not None:
        raise ConfigError(f"reward_processing_classes names a tokenizer for {what}; put None in its place")


def _from_adapter(name: str, adapter_source: AdapterSource | None) -> RewardSource:
    if adapter_source is None:
        raise ModelError(
            f"'{name}' holds an adapter, and there is no base here for it to share. Load it onto its base yourself and "
            "pass the PeftModel."
        )
    return adapter_source(name)


def _from_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, device: torch.device, trust_remote_code: bool
) -> ClassifierReward:
    base = base_of(model)
    name = base.config.name_or_path
    if tokenizer is None and not name:
        raise ModelError(
            f"the reward model {type(base).__name__} does not say where it came from, so its tokenizer cannot be "
            "found. Pass it in reward_processing_classes."
        )
    own = load_tokenizer(str(name), trust_remote_code=trust_remote_code) if tokenizer is None else tokenizer
    return ClassifierReward(_placed(model, device), own)


def _placed(model: Any, device: torch.device) -> Any:
    return model if is_quantized(model) else model.to(device)
