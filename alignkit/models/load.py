"""Load a causal language model onto one device, in the dtype that the device computes in, or say why not.

`load_model` and `load_tokenizer` are the only ways in; `nf4` and `int8` describe quantized bases; adapters are put on
top in `alignkit.models.adapters`, whose functions are offered here too.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
)
from transformers.utils import is_bitsandbytes_available

from alignkit.errors import ConfigError, ModelError, printable
from alignkit.models.adapters import (
    CustomModules,
    add_adapter,
    continue_adapter,
    disable_dropout,
    keep_adapters_fp32,
    reference_adapter,
)
from alignkit.models.source import (
    HUB_KWARGS,
    LOADING_ERRORS,
    Source,
    check_whole_model,
    explain,
    hub_kwargs_of,
    locate,
    locate_base,
)
from alignkit.models.tokenizer import load_tokenizer, with_pad_token

__all__ = [
    "add_adapter",
    "compute_dtype",
    "disable_dropout",
    "int8",
    "keep_adapters_fp32",
    "load_model",
    "load_tokenizer",
    "nf4",
    "reference_adapter",
    "training_device",
    "with_pad_token",
]

logger = logging.getLogger(__name__)

# Heads that are no language model's. Loading such a checkpoint as one would invent the output layer at random.
_OTHER_HEADS = re.compile(
    r"For(Sequence|Token|Image|Audio|Video)Classification|ForQuestionAnswering|ForMaskedLM|RewardModel"
)


def training_device() -> torch.device:
    """The one device of this process: the GPU of its local rank, else the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        rank = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
        return torch.device("cuda", rank % torch.cuda.device_count())
    if torch.xpu.is_available():
        return torch.device("xpu", torch.xpu.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def compute_dtype(device: torch.device | None = None) -> torch.dtype:
    """The dtype for frozen weights and activations on `device` (by default this process's device).

    bf16 where the hardware multiplies it natively: CUDA from compute capability 8.0 (Ampere), XPU, CPUs with bf16
    instructions. fp16 on older CUDA cards such as the T4, where bf16 is emulated and slow. fp32 elsewhere, with one
    line of log. Trainable parameters are fp32 whatever this returns.
    """
    device = training_device() if device is None else torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "xpu":
        return torch.bfloat16
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    _log_once(f"No native 16-bit arithmetic on {device.type}: the model is loaded in fp32.")
    return torch.float32


def nf4(compute_dtype: torch.dtype | None = None) -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantization (QLoRA, arXiv 2305.14314): about 0.52 bytes per weight.

    Args:
        compute_dtype: dtype of the products; by default what the device does natively (never fp32 by accident, which is
            what bitsandbytes would choose).

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    _need_bitsandbytes()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_device_dtype() if compute_dtype is None else compute_dtype,
    )


def int8() -> BitsAndBytesConfig:
    """8-bit weights with fp16 outliers (LLM.int8(), arXiv 2208.07339): about 1 byte per weight.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    _need_bitsandbytes()
    return BitsAndBytesConfig(load_in_8bit=True)


def load_model(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    model_init_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    custom_modules: CustomModules | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model by name or path, in evaluation mode.

    An adapter (a folder or repository with `adapter_config.json`) is loaded on top of its base and is trainable: this
    continues from it, and the result is a `PeftModel`. GGUF weights are unpacked. A quantized model is placed on its
    one device; any other stays on the CPU, and the trainer moves it.

    Args:
        model: a name on the Hub, a folder, a `.gguf` file, an adapter, or `"demo"`.
        dtype: of weights that are not quantized; by default what the device does natively.
        quantization_config: `nf4()`, `int8()` or another transformers quantization config.
        trust_remote_code: allow model code from the repository to run.
        model_init_kwargs: further arguments of `from_pretrained` (`revision`, `attn_implementation`, ...).
        device: the device that will train; by default this process's.
        custom_modules: for an adapter: see `add_adapter`.

    Raises:
        ModelError: nothing there, not readable, not a causal language model, or quantized in a way that does not fit.
        ConfigError: arguments that contradict one another.
    """
    device = training_device() if device is None else torch.device(device)
    kwargs = _merged(model_init_kwargs, dtype=dtype, quantization_config=quantization_config)
    trust_remote_code = bool(kwargs.pop("trust_remote_code", False)) or trust_remote_code
    hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
    gguf_file = kwargs.pop("gguf_file", None)
    source = locate(model, hub_kwargs)
    if gguf_file is not None:
        source = Source(source.name, source.kwargs, gguf_file=gguf_file)
    if source.adapter is None:
        return _load_base(source, kwargs, device, trust_remote_code)
    locate_base(source)
    base = load_model(
        source.base,
        trust_remote_code=trust_remote_code,
        model_init_kwargs={**kwargs, **source.base_kwargs},
        device=device,
    )
    assert isinstance(base, PreTrainedModel)
    return continue_adapter(base, source.name, source.adapter, custom_modules=custom_modules, **hub_kwargs_of(source))


def _merged(
    model_init_kwargs: Mapping[str, Any] | None, *, dtype: torch.dtype | None, quantization_config: Any
) -> dict[str, Any]:
    """Join `model_init_kwargs` with the arguments that have a name of their own; the two must not contradict."""
    kwargs = dict(model_init_kwargs or {})
    if kwargs.get("use_safetensors") is False:
        raise ConfigError("use_safetensors=False would load pickles, which can run anything: weights are safetensors.")
    if "torch_dtype" in kwargs:
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    kwargs["dtype"] = _parse_dtype(kwargs.get("dtype"))
    for name, value in (("dtype", dtype), ("quantization_config", quantization_config)):
        given = kwargs.get(name)
        if value is not None and given is not None and given != value:
            raise ConfigError(
                f"{name} is given twice: {value} as an argument and {given} in model_init_kwargs. Keep one of them."
            )
        kwargs[name] = given if value is None else value
    return kwargs


def _parse_dtype(dtype: Any) -> torch.dtype | str | None:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    names = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in names:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(names)}, auto.")
    return names[dtype]


def _load_base(
    source: Source, kwargs: dict[str, Any], device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """Load a whole model; `kwargs` holds `dtype` and `quantization_config` besides what the user passed."""
    if source.gguf_file is not None:
        quantized = _prepare_gguf(source, kwargs)
    else:
        checkpoint = check_whole_model(source, trust_remote_code=trust_remote_code, variant=kwargs.get("variant"))
        _check_architecture(source.name, checkpoint, trust_remote_code)
        quantized = _prepare_quantization(source.name, checkpoint, kwargs)
        kwargs["use_safetensors"] = True  # else pickles would be the way back
    kwargs["dtype"] = compute_dtype(device) if kwargs.get("dtype") is None else kwargs["dtype"]
    device_map = _device_map(kwargs.pop("device_map", None), device, quantized=quantized)
    if device_map is not None:
        kwargs["device_map"] = device_map
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.name, trust_remote_code=trust_remote_code, output_loading_info=True, **source.kwargs, **kwargs
        )
    except torch.OutOfMemoryError:
        raise
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise _unloadable(source, error) from error
        raise ConfigError(f"model_init_kwargs holds something that the model does not take: {error}") from error
    except LOADING_ERRORS as error:
        raise _unloadable(source, error) from error
    model, info = loaded
    _check_complete(source.name, info["missing_keys"], trust_remote_code)
    if quantized and kwargs.get("quantization_config") is None:
        _compute_in(model, compute_dtype(device))
    return model.eval()


def _unloadable(source: Source, error: BaseException) -> ModelError:
    where = source.name if source.gguf_file is None else str(Path(source.name) / source.gguf_file)
    reason = explain(error, source.name)
    return ModelError(f"The model '{where}' cannot be loaded: {reason} Fetch it again, or give another.")


def _compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let 4-bit layers compute in `dtype`: a checkpoint records what it was made with, fp32 by default."""
    if not is_bitsandbytes_available():
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype


def _check_architecture(name: str, config: dict[str, Any], trust_remote_code: bool) -> None:
    architectures = config.get("architectures") or []
    found = ", ".join(architectures) or config.get("model_type")
    wrong = [architecture for architecture in architectures if _OTHER_HEADS.search(architecture)]
    if wrong:
        raise ModelError(
            f"'{name}' is no causal language model but {found}; loaded as one, its output layer would be random. Give "
            "a ...ForCausalLM model (a classifier can be a reward model, not a policy)."
        )
    if config.get("is_encoder_decoder"):
        raise ModelError(f"'{name}' is an encoder-decoder model ({found}); alignkit trains decoder-only models.")
    model_type = config.get("model_type", "")
    if model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if "AutoModelForCausalLM" in config.get("auto_map", {}) and trust_remote_code:
            return
        raise ModelError(f"'{name}' ({found}) is of a kind that transformers cannot load as a causal language model.")


def _prepare_gguf(source: Source, kwargs: dict[str, Any]) -> bool:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"'{source.gguf_file}' is a GGUF file; reading it needs the package gguf: pip install gguf")
    if kwargs.get("quantization_config") is not None and not isinstance(kwargs["quantization_config"], GgufConfig):
        raise ModelError(
            f"'{source.gguf_file}' is a GGUF file and cannot be quantized again while it is read. Load it without "
            "quantization_config, save it with save_pretrained, and quantize that folder."
        )
    # Packed GGUF weights take no gradient and cannot be saved.
    kwargs["quantization_config"] = GgufConfig(dequantize=True)
    kwargs["gguf_file"] = source.gguf_file
    return False


def _prepare_quantization(name: str, checkpoint: dict[str, Any], kwargs: dict[str, Any]) -> bool:
    """Check the wish against what the checkpoint is; return whether the loaded model will be quantized."""
    wanted = kwargs.get("quantization_config")
    if wanted is None:
        kwargs.pop("quantization_config", None)
    stored = checkpoint.get("quantization_config")
    if stored is not None:
        method = stored.get("quant_method", "an unknown method")
        if wanted is not None:
            raise ModelError(
                f"'{name}' is quantized already ({method}). Leave out quantization_config (or --load_in_4bit), or give "
                "the original checkpoint."
            )
        return True
    if isinstance(wanted, BitsAndBytesConfig):
        _need_bitsandbytes()
        if wanted.load_in_8bit:
            logging.getLogger("bitsandbytes.autograd._functions").addFilter(_QUIET_INT8)
        if wanted.load_in_4bit and wanted.bnb_4bit_compute_dtype == torch.float32 != _device_dtype():
            logger.warning(
                "quantization_config computes in fp32, the slow default of bitsandbytes. alignkit.nf4() computes in %s "
                "on this device.",
                str(_device_dtype()).removeprefix("torch."),
            )
    return wanted is not None


def _device_map(given: Any, device: torch.device, *, quantized: bool) -> dict[str, Any] | None:
    """Turn what the user asked for into a map to one device, or None for "the CPU, the trainer moves it"."""
    if isinstance(given, Mapping):
        places = {str(place) for place in given.values()}
        if len(places) != 1 or "disk" in places:
            raise ConfigError(
                f"device_map spreads the model over {', '.join(sorted(places))}. Training uses one device per process: "
                "leave device_map out and start one process per GPU with `accelerate launch`."
            )
        return dict(given)
    if given in ("balanced", "balanced_low_0", "sequential"):
        raise ConfigError(
            f"device_map={given!r} would spread the model over several devices. Training uses one device per process: "
            "leave device_map out and start one process per GPU with `accelerate launch`."
        )
    if given is not None and given != "auto":  # "auto" leaves the choice to us
        return {"": given}
    # bitsandbytes packs weights where they will be used; on a machine without an accelerator nothing needs placing.
    return {"": device} if quantized and device.type != "cpu" else None


def _check_complete(name: str, missing_keys: set[str], trust_remote_code: bool) -> None:
    """Refuse a model of which a part was not in the checkpoint: it would be random, and only the results would tell."""
    if not missing_keys:
        return
    shown = ", ".join(sorted(missing_keys)[:4]) + (", ..." if len(missing_keys) > 4 else "")
    message = f"'{name}' lacks {len(missing_keys)} of the model's weights ({shown}); they would be random."
    if not trust_remote_code:
        raise ModelError(f"{message} Is this the whole checkpoint of a causal language model?")
    # Code from a repository may fill such weights itself, so this is not certain to be wrong.
    logger.warning("%s Check that the model's own code sets them.", printable(message))


def _need_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError('4-bit and 8-bit models need bitsandbytes. Install it: pip install "alignkit[quantized]"')


class _OncePerMessage(logging.Filter):
    """Let each message of a logger through once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.getMessage() not in self.seen
        self.seen.add(record.getMessage())
        return new


# bitsandbytes writes a line for each 8-bit layer in each forward pass.
_QUIET_INT8 = _OncePerMessage()


@functools.lru_cache
def _log_once(message: str) -> None:
    logger.warning(message)


# `nf4` has an argument called compute_dtype, as the field has.
_device_dtype = compute_dtype
