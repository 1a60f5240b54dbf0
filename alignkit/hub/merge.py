"""Merge an adapter into its 16-bit base, and prove that the merged model says what the adapter said."""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import psutil
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.utils import cached_file

from alignkit.errors import ConfigError, ModelError
from alignkit.hub.agreement import Agreement, check_ids, check_texts, compare, next_token_logps
from alignkit.hub.identity import describe_base, quantization_of
from alignkit.hub.merge_inputs import adapter_folder, adapter_source, base_of, new_folder, stored_dtype
from alignkit.hub.record import RECORD_FILE, RunRecord, write_json
from alignkit.models.adapters import continue_adapter
from alignkit.models.load import load_model, load_tokenizer
from alignkit.models.source import Source, check_whole_model, hub_kwargs_of

MERGE_FILE = "merge_check.json"

# Mean KL in nats that rounding the merged weights to a dtype may make: ten times what it made in a model of 30 layers.
# What a merge may lose is this, or a hundredth of what the adapter changes, whichever is more: rounding loses less than
# a thousandth of a strong adapter, and one module of 84 that was left out some hundredths.
ROUNDING_KL = {torch.bfloat16: 2e-3, torch.float16: 1e-4, torch.float32: 1e-6}
MAX_LOST_SHARE = 0.01

_SHARD = "4GB"
_CPU = torch.device("cpu")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model on disk.

    Attributes:
        path: its folder: safetensors, config, generation config, tokenizer with chat template, and `merge_check.json`.
        base: what it was merged into: see `alignkit.hub.identity.describe_base`.
        dtype: of its weights.
        bytes: size of its weights on disk.
        agreement: of the adapter on its base (first) with the merged model as it was loaded back from disk.
        effect: mean KL in nats of the adapter from its bare base, on the same texts: what the merge had to carry.
        tolerance: the mean KL in nats above which the merge would have been refused.
        notes: what a user of the model should know.
    """

    path: Path
    base: dict[str, Any]
    dtype: str
    bytes: int
    agreement: Agreement
    effect: float
    tolerance: float
    notes: tuple[str, ...]


def merge_adapter(
    adapter: str | Path | Trainer,
    output_dir: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    texts: Sequence[str] | None = None,
    tolerance: float | None = None,
    trust_remote_code: bool = False,
    **hub_kwargs: Any,
) -> Merged:
    """Merge an adapter into its base and save the whole model; 4-bit weights are never merged into.

    The base is loaded in 16 bits whatever the adapter was trained on. The merged model is written to a temporary folder
    beside `output_dir`, loaded back from there, compared with the adapter on its base, and renamed when all is well: on
    any error nothing is left at `output_dir`. Memory: the model in `dtype` once, on the CPU, and as much disk.

    Args:
        adapter: an adapter's folder or Hub id, or a trainer, whose policy is taken as it is now.
        output_dir: a folder that does not exist yet, or is empty.
        base: the base model, where it is not the one that the adapter's config names: a Hub id, folder, `.gguf` file or
            `"demo"`.
        dtype: of the merged weights; by default the base's own where that has 16 bits, else bf16.
        texts: what the two are compared on; by default a few short conversations.
        tolerance: largest mean KL in nats between the two; by default `ROUNDING_KL` of the dtype, or a hundredth of
            what the adapter changes, whichever is more.
        trust_remote_code: allow model code from the base's repository to run.
        hub_kwargs: `revision`, `token`, `cache_dir`, ... of the adapter.

    Raises:
        ConfigError: `output_dir` is not empty.
        ModelError: no adapter, a reward model's, prompt learning, a base that is quantized on disk, too little disk
            space, or a merged model that says something else than the adapter.
    """
    with contextlib.ExitStack() as stack:
        unfinished = stack.enter_context(new_folder(output_dir))
        source = adapter_source(stack.enter_context(adapter_folder(adapter)), hub_kwargs)
        base_source = base_of(source, base)
        dtype = dtype or stored_dtype(base_source)
        _say_what_is_needed(base_source, dtype, unfinished, trust_remote_code)
        found = _merge_into(unfinished, source, base_source, dtype, texts, trust_remote_code)
        result = Merged(
            path=Path(output_dir).expanduser(),
            base=found.base,
            dtype=_name(dtype),
            bytes=sum(file.stat().st_size for file in unfinished.glob("*.safetensors")),
            agreement=found.agreement,
            effect=found.effect,
            tolerance=max(ROUNDING_KL[dtype], MAX_LOST_SHARE * found.effect) if tolerance is None else tolerance,
            notes=_notes(adapter, source, base_source, dtype),
        )
        _check(result)
        write_json(unfinished / MERGE_FILE, summary(result))
    return result


class _Found(NamedTuple):
    base: dict[str, Any]
    agreement: Agreement
    effect: float


def _merge_into(
    folder: Path,
    source: Source,
    base: Source,
    dtype: torch.dtype,
    texts: Sequence[str] | None,
    trust_remote_code: bool,
) -> _Found:
    """Write the merged model and its tokenizer to `folder`; compare what lies there with the adapter on its base."""
    model = _adapter_on_base(source, base, dtype, trust_remote_code)
    described = describe_base(model)
    tokenizer = load_tokenizer(_tokenizer_place(source, base), trust_remote_code=trust_remote_code)
    rows = check_ids(tokenizer, check_texts(tokenizer) if texts is None else texts)
    wanted = next_token_logps(model, rows)
    with model.disable_adapter():
        effect = compare(wanted, next_token_logps(model, rows)).mean_kl
    _save_merged(model, dtype, folder)
    tokenizer.save_pretrained(folder)
    _copy_sentencepiece(base, folder)
    del model  # so that there is one model in memory at a time
    gc.collect()
    again = load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code, device=_CPU)
    return _Found(described, compare(wanted, next_token_logps(again, rows)), effect)


def summary(merged: Merged) -> dict[str, Any]:
    """Plain values for JSON: everything but where the model lies."""
    return {
        "base": merged.base,
        "dtype": merged.dtype,
        "weight_bytes": merged.bytes,
        "kl_unit": "nats per token, KL(adapter on base || merged)",
        "agreement": merged.agreement,
        "effect_of_the_adapter": merged.effect,
        "tolerance": merged.tolerance,
        "notes": list(merged.notes),
    }


def _say_what_is_needed(base: Source, dtype: torch.dtype, folder: Path, trust_remote_code: bool) -> None:
    """Log memory and disk; refuse where the disk is too small, warn where the memory is."""
    if dtype not in ROUNDING_KL:
        raise ConfigError(f"dtype {dtype} cannot be merged into: use torch.bfloat16, float16 or float32.")
    if base.gguf_file is not None:
        return  # its size says little about that of the model
    check_whole_model(base, trust_remote_code=trust_remote_code)
    config = AutoConfig.from_pretrained(base.name, trust_remote_code=trust_remote_code, **base.kwargs)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    needed = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(folder).free
    logger.info(
        "Merging takes about %.1f GB of memory (%.1f GB are free) and %.1f GB of disk (%.1f GB are free).",
        1.1 * needed / 1e9,
        memory / 1e9,
        needed / 1e9,
        disk / 1e9,
    )
    if needed > disk:
        raise ModelError(
            f"The merged model takes {needed / 1e9:.1f} GB, and {disk / 1e9:.1f} GB are free where it would be "
            "written. Make room, or give an output directory on another disk."
        )
    if 1.1 * needed > memory:
        logger.warning(
            "The model may not fit into memory: %.1f GB are needed, %.1f GB are free.", 1.1 * needed / 1e9, memory / 1e9
        )


def _adapter_on_base(source: Source, base: Source, dtype: torch.dtype, trust_remote_code: bool) -> PeftModel:
    name = base.name if base.gguf_file is None else Path(base.name) / base.gguf_file
    model = load_model(
        name, dtype=dtype, trust_remote_code=trust_remote_code, model_init_kwargs=base.kwargs, device=_CPU
    )
    config = source.adapter
    if not isinstance(model, PreTrainedModel) or config is None or quantization_of(model) is not None:
        raise ModelError(f"'{name}' is no whole 16-bit model.")
    with _tied_weights_are_handled():
        return continue_adapter(model, source.name, config, **hub_kwargs_of(source)).eval()


def _save_merged(model: PeftModel, dtype: torch.dtype, folder: Path) -> None:
    _untie(model)
    try:
        with _tied_weights_are_handled():
            merged: Any = cast(Any, model).merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        kind = model.peft_config[model.active_adapters[0]].peft_type
        raise ModelError(
            f"PEFT cannot merge this adapter ({kind}): {str(error).splitlines()[0]} Publish the adapter itself."
        ) from error
    merged.to(dtype)  # whole modules that were trained (modules_to_save) are fp32 until here
    merged.config.dtype = dtype
    merged.save_pretrained(folder, max_shard_size=_SHARD)


def _untie(model: PeftModel) -> None:
    """Give the output layer weights of its own where an adapter changes it, or the embedding that has the same."""
    base = cast(Any, model.get_base_model())
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if not base.config.get_text_config().tie_word_embeddings or ends[1] is None:
        return
    if not any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends):
        return
    head: Any = ends[1]
    if isinstance(head, BaseTunerLayer):
        head = head.get_base_layer()
    elif isinstance(head, AuxiliaryTrainingWrapper):
        head = head.original_module
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = False
    base.config.get_text_config().tie_word_embeddings = False


@contextlib.contextmanager
def _tied_weights_are_handled() -> Iterator[None]:
    """Drop PEFT's warnings about adapters on tied weights: `_untie` does what they ask for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


def _tokenizer_place(source: Source, base: Source) -> str | Path:
    """The adapter's own tokenizer where one was saved with it, else the base's."""
    folder = Path(source.name)
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        return folder
    return base.name if base.gguf_file is None else Path(base.name) / base.gguf_file


def _copy_sentencepiece(base: Source, folder: Path) -> None:
    """Copy `tokenizer.model`, which GGUF converters read for Llama 2 or Gemma, and which transformers never writes."""
    found = cached_file(
        base.name,
        "tokenizer.model",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **base.kwargs,
    )
    if found is not None:
        shutil.copyfile(found, folder / "tokenizer.model")


def _notes(adapter: str | Path | Trainer, source: Source, base: Source, dtype: torch.dtype) -> tuple[str, ...]:
    notes = []
    packed = _trained_on(adapter, source)
    if packed is not None:
        notes.append(
            f"The adapter was trained on a base packed as {packed} and is merged into the {_name(dtype)} base, never "
            "into packed weights. So the merged model differs from what was trained by the base's packing error. What "
            "is compared here is the adapter on the unpacked base; evaluate the merged model to know its own scores."
        )
    if base.gguf_file is not None:
        notes.append(f"The base is a GGUF file ({base.gguf_file}), unpacked to {_name(dtype)}.")
    return tuple(notes)


def _trained_on(adapter: str | Path | Trainer, source: Source) -> str | None:
    """How the base was packed in training, where the trainer or its run record tells."""
    if isinstance(adapter, Trainer):
        model: Any = adapter.accelerator.unwrap_model(cast(nn.Module, adapter.model))
        return quantization_of(model.get_base_model())
    if (Path(source.name) / RECORD_FILE).is_file():
        return RunRecord.load(source.name).base.get("quantization")
    return None


def _check(merged: Merged) -> None:
    agreement = merged.agreement
    figures = (
        f"mean KL {agreement.mean_kl:.2g} nats per token (largest {agreement.max_kl:.2g}), the same most likely token "
        f"at {agreement.same_top:.1%} of {agreement.tokens} positions; the adapter's own effect is "
        f"{merged.effect:.2g} nats"
    )
    if not agreement.mean_kl <= merged.tolerance:  # a NaN is refused too
        raise ModelError(
            f"The merged model does not say what the adapter says: {figures}; allowed are {merged.tolerance:.2g}. "
            "Nothing was kept. Rounding may be the cause where the adapter changes little: try dtype=torch.float32. "
            "Else the adapter may belong to another base: give that one (base=...)."
        )
    if agreement.mean_kl > merged.effect / 4 and merged.effect > 0:
        logger.warning(
            "Rounding to %s costs much of what the adapter changes: %s. dtype=torch.float32 keeps it.",
            merged.dtype,
            figures,
        )
    logger.info("Merged: %s.", figures)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
