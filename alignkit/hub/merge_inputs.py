"""What a merge starts from, an adapter and its whole base, and where it ends: a folder that appears when complete."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, TaskType
from torch import nn
from transformers import PreTrainedConfig, Trainer

from alignkit.errors import ConfigError, ModelError
from alignkit.models.source import ADAPTER_CONFIG, Source, locate


@contextlib.contextmanager
def new_folder(output_dir: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `output_dir`, which becomes it at the end, or vanishes if something was raised.

    Raises:
        ConfigError: `output_dir` is a file, or a folder with something in it.
    """
    target = Path(output_dir).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            f"The output directory '{output_dir}' exists and is not empty. Give another one, or remove it first."
        )
    unfinished = target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if target.is_dir():
            target.rmdir()
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def adapter_folder(adapter: str | Path | Trainer) -> Iterator[str | Path]:
    """Give the place of an adapter; a trainer's is saved to a temporary folder for the time being.

    Raises:
        ModelError: the trainer trains a whole model.
    """
    if not isinstance(adapter, Trainer):
        yield adapter
        return
    model: Any = adapter.accelerator.unwrap_model(cast(nn.Module, adapter.model))
    if not isinstance(model, PeftModel):
        raise ModelError("This trainer trains a whole model: there is nothing to merge. save_model() saves it whole.")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=model.active_adapters[:1])
        if adapter.processing_class is not None:
            cast(Any, adapter.processing_class).save_pretrained(folder)
        yield folder


def adapter_source(adapter: str | Path, hub_kwargs: dict[str, Any]) -> Source:
    """Find an adapter that can be merged.

    Raises:
        ModelError: there is none, or it is of a kind that cannot be merged.
    """
    source = locate(adapter, hub_kwargs)
    if source.adapter is None:
        raise ModelError(
            f"'{adapter}' holds no adapter ({ADAPTER_CONFIG}) but a whole model, so there is nothing to merge."
        )
    if source.adapter.task_type == TaskType.SEQ_CLS:
        raise ModelError(
            f"'{adapter}' is a reward model's adapter. Merged, it would be a sequence classifier and no model that "
            "writes: publish the adapter itself; alignkit.load_reward_model and PEFT load it."
        )
    if source.adapter.is_prompt_learning:
        raise ModelError(
            f"'{adapter}' is prompt learning ({source.adapter.peft_type}): it adds virtual tokens and changes no "
            "weight, so nothing can be merged. Publish the adapter itself, or train a LoRA adapter."
        )
    return source


def base_of(source: Source, base: str | Path | None) -> Source:
    """Find the whole model that belongs to an adapter, which may be given in place of the one that it names.

    Raises:
        ModelError: it is an adapter itself, or quantized on disk.
    """
    found = locate(source.base, source.base_kwargs) if base is None else locate(base, {})
    if found.adapter is not None:
        raise ModelError(
            f"The base '{found.name}' is itself an adapter. Merge that one first, and give the result as the base."
        )
    if found.gguf_file is None:
        stored, _ = PreTrainedConfig.get_config_dict(found.name, **found.kwargs)
        quantization = stored.get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method", "an unknown method")
            raise ModelError(
                f"The base '{found.name}' is quantized on disk ({method}), and an adapter is merged into 16-bit "
                "weights only. Give the checkpoint that it was made from as the base (base=..., or --base)."
            )
    return found


def stored_dtype(base: Source) -> torch.dtype:
    """The dtype of a base on disk where it has 16 bits, else bf16."""
    if base.gguf_file is not None:
        return torch.bfloat16
    stored, _ = PreTrainedConfig.get_config_dict(base.name, **base.kwargs)
    named = stored.get("dtype") or stored.get("torch_dtype")
    return torch.float16 if named == "float16" else torch.bfloat16
