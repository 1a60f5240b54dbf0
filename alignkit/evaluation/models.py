"""What is evaluated: a policy beside its reference, or a reward model, loaded without a trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel, TaskType
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import ConfigError, ModelError
from alignkit.models.bundle import ModelBundle
from alignkit.models.load import load_model, load_tokenizer, training_device, with_pad_token
from alignkit.models.lora import FUSED_LORA, is_quantized
from alignkit.models.reward_files import RewardModel, load_reward_model
from alignkit.models.source import explain, locate

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class PolicyModel:
    """A language model to evaluate.

    Attributes:
        name: what to call it: the path or id that it came from.
        bundle: the policy, and the reference where there is one: the base with its adapters off, or a separate model.
        tokenizer: the policy's, with a padding token.
    """

    name: str
    bundle: ModelBundle
    tokenizer: PreTrainedTokenizerBase


Evaluated = PolicyModel | RewardModel


def load_policy(
    model: str | Path | PreTrainedModel | PeftModel | PolicyModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    reference: str | Path | PreTrainedModel | None = None,
    quantization_config: Any = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> PolicyModel:
    """Load a causal language model, or an adapter on its base, for evaluation.

    Args:
        model: a name, a folder, `"demo"`, or a model in memory; a `PolicyModel` is returned as it is.
        tokenizer: by default the one that belongs to the name.
        reference: a separate reference, for a model that has no adapters to switch off.
        quantization_config: `alignkit.nf4()` or another, for a model given by name.
        dtype: of the base; by default what the device computes in.
        trust_remote_code: allow code from the repository to run.
        device: by default this process's.

    Raises:
        ModelError: nothing there, no causal language model, or no tokenizer to be found.
        ConfigError: options of loading for a model that is loaded already.
    """
    if isinstance(model, PolicyModel):
        return model
    device = training_device() if device is None else torch.device(device)
    loading = {"quantization_config": quantization_config, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if isinstance(model, str | Path):
        name, owner = str(model), model
        loaded = _on(load_model(model, device=device, custom_modules=FUSED_LORA, **loading), device)
    elif isinstance(model, PreTrainedModel | PeftModel):
        if quantization_config is not None or dtype is not None:
            raise ConfigError("quantization_config and dtype apply when a model is loaded; this one is loaded already")
        name = owner = model.config.name_or_path or type(model).__name__
        loaded = model
    else:
        raise ModelError(f"model must be a name, a path, or a transformers or PEFT model, not {type(model).__name__}")
    own = load_tokenizer(owner, trust_remote_code=trust_remote_code) if tokenizer is None else with_pad_token(tokenizer)
    given: Any = reference
    if isinstance(reference, str | Path):
        given = _on(load_model(reference, device=device, **loading), device)
    return PolicyModel(name, ModelBundle(loaded, reference=given), own)


def load_evaluated(
    model: str | Path | PreTrainedModel | PeftModel | Evaluated,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    reference: str | Path | PreTrainedModel | None = None,
    **loading: Any,
) -> Evaluated:
    """Load a policy or a reward model, whichever it is.

    Args:
        model: a name, a folder, a model in memory, or what this function returns.
        tokenizer: by default the one that belongs to the name.
        reference: for a policy; see `load_policy`.
        **loading: further arguments of `load_policy` or `alignkit.load_reward_model`.

    Raises:
        ModelError: nothing there, or nothing of either kind.
        ConfigError: a reference for a reward model.
    """
    if isinstance(model, PolicyModel | RewardModel):
        return model
    if not _is_classifier(model):
        return load_policy(model, tokenizer, reference=reference, **loading)
    if reference is not None:
        raise ConfigError("a reward model is compared with no reference: leave it out")
    if isinstance(model, str | Path):
        loaded = load_reward_model(model, **loading)
        return loaded if tokenizer is None else RewardModel(loaded.model, tokenizer)
    if tokenizer is None:
        raise ModelError("a reward model in memory needs its tokenizer: pass it, or pass the folder's name")
    return RewardModel(model, with_pad_token(tokenizer))


def progress(items: Iterable[Item], what: str, *, total: int | None = None, quiet: bool = False) -> Iterator[Item]:
    """Go through `items` behind a bar, where somebody watches; a pipe or a file gets none."""
    # `disable=None` asks whether the output is a terminal.
    return iter(tqdm(items, desc=what, total=total, disable=True if quiet else None, leave=False))


def in_parts(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Cut a sequence into consecutive parts of at most `size` items."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _is_classifier(model: Any) -> bool:
    if isinstance(model, PreTrainedModel | PeftModel):
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        return base.get_output_embeddings() is None
    source = locate(model, {})
    if source.adapter is not None:
        return source.adapter.task_type == TaskType.SEQ_CLS
    if source.gguf_file is not None:
        return False
    try:
        config, _ = PreTrainedConfig.get_config_dict(source.name, **source.kwargs)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"The model cannot be loaded: {explain(error, source.name)}") from error
    return any("ForSequenceClassification" in name for name in config.get("architectures") or ())


def _on(model: Any, device: torch.device) -> Any:
    return model if is_quantized(model) else model.to(device)
