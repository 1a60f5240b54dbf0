"""Adapters on a frozen base: adding one, continuing one, keeping a copy as the reference, and their precision.

The base is never prepared with PEFT's `prepare_model_for_kbit_training`: that casts norms, embeddings and the head of
a 16-bit model to fp32, which costs memory, changes the base's numbers, and is needed only where those are trained.
What trains here is the adapter, and it is fp32 always: AdamW at a small learning rate leaves most bf16 weights unmoved.
Gradients through a checkpointed base (`enable_input_require_grads`) are the trainer's affair.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alignkit.errors import ModelError, nearest
from alignkit.models.heads import SCORE, has_head
from alignkit.models.untrusted.adapters import AdapterFiles, check_fits, find_adapter

REFERENCE_ADAPTER = "reference"

# The class of a layer to be wrapped -> a class or function that makes the LoRA layer around it, with PEFT's arguments;
# a function may return None to leave the layer to PEFT.
CustomModules = Mapping[type[nn.Module], Callable[..., nn.Module | None]]

# What PEFT raises over an adapter that is not what its config says.
MISFITS = (ValueError, RuntimeError, OSError, LookupError, TypeError, AttributeError, ImportError, UserWarning)

# Initialisations that move part of the base weights into the adapter.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def add_adapter(
    model: PreTrainedModel,
    peft_config: PeftConfig,
    *,
    custom_modules: CustomModules | None = None,
) -> PeftModel:
    """Put a new trainable adapter on a model, whose own weights are frozen and not changed by a single bit.

    The caller's config is copied. Every trainable parameter (LoRA matrices, DoRA magnitudes, `modules_to_save`) is
    fp32, whatever the base's dtype.

    Args:
        model: a base of any dtype, quantized or not.
        peft_config: a `LoraConfig` (rsLoRA, DoRA, `modules_to_save` included) or another PEFT method that adds weights
            to layers and leaves the base as it is.
        custom_modules: LoRA layers to use in place of PEFT's, by the class of the layer they wrap. The first match by
            `isinstance` wins, so list subclasses (bitsandbytes' layers derive from `nn.Linear`) before their parents.
            PEFT's "all-linear" recognises a wrapped layer later only if the wrapper's class name contains "Linear".

    Raises:
        ModelError: the config is of a wrong type, is prompt learning, changes the base, or matches no layer; or the
            model has an adapter already.
    """
    if isinstance(model, PeftModel) or model._hf_peft_config_loaded:
        raise ModelError(
            "The model has an adapter already. To train that one on, pass the model without peft_config; to start a "
            "new one on top of it, merge it first: model = model.merge_and_unload()."
        )
    config = _checked_copy(peft_config, model)
    if isinstance(config, LoraConfig):
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
        _register(config, custom_modules)
    _check_modules_to_save(model, config)
    try:
        with peft_warnings():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"The adapter does not fit the model: {error}{_nearest_module(model, config)}") from error
    keep_adapters_fp32(adapted)
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise ModelError("The adapter adds no trainable weights to this model. Check target_modules.")
    return adapted.train(model.training)  # PEFT leaves its own modules in training mode, whatever the base's


def continue_adapter(
    base: PreTrainedModel,
    name: str | Path,
    peft_config: PeftConfig,
    *,
    custom_modules: CustomModules | None = None,
    **hub_kwargs: Any,
) -> PeftModel:
    """Load a saved adapter onto its base, trainable and in fp32, exactly as it was saved.

    Raises:
        ModelError: the adapter is of a kind that cannot be trained here, or its weights do not fit the base.
    """
    config = _checked_copy(peft_config, base, f"the adapter '{name}'")
    config.base_model_name_or_path = peft_config.base_model_name_or_path
    _register(config, custom_modules)
    files = find_adapter(name, **hub_kwargs)
    check_fits(files, base, name)
    try:
        with peft_warnings():
            model = PeftModel.from_pretrained(base, str(files.folder), is_trainable=True, config=config)
    except MISFITS as error:
        raise _misfit(name, error) from error
    keep_adapters_fp32(model)
    # Copies of base modules were created in the base's dtype, which rounded the saved fp32 weights: read them again.
    model.load_adapter(str(files.folder), "default", is_trainable=True)
    return model.train(base.training)


def put_saved_adapter(
    base: PreTrainedModel, files: AdapterFiles, name: str | Path, peft_config: PeftConfig
) -> PeftModel:
    """Load a saved adapter onto a base that serves nothing else, frozen, to be used as it was saved.

    Raises:
        ModelError: the adapter is of a kind that no trainer here makes, or its weights do not fit the base.
    """
    if peft_config.is_prompt_learning or peft_config.peft_type in (PeftType.XLORA, PeftType.POLY):
        raise ModelError(
            f"The adapter '{name}' is of the kind {_kind(peft_config)}, which is not loaded here. Give a LoRA adapter."
        )
    if isinstance(peft_config, LoraConfig) and peft_config.layer_replication:
        raise ModelError(f"The adapter '{name}' repeats layers of its base (layer_replication): give the merged model.")
    check_fits(files, base, name)
    try:
        with peft_warnings():
            return PeftModel.from_pretrained(base, str(files.folder))
    except MISFITS as error:
        raise _misfit(name, error) from error


def _misfit(name: str | Path, error: BaseException) -> ModelError:
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # torch lists what does not fit below
    return ModelError(
        f"The adapter '{name}' cannot be put on its base: {reason.rstrip('.')}. Fetch it again, or give another."
    )


def add_frozen_adapter(
    model: PeftModel,
    path: str | Path,
    name: str,
    peft_config: PeftConfig,
    *,
    custom_modules: CustomModules | None = None,
    **hub_kwargs: Any,
) -> None:
    """Load a saved adapter beside those that `model` has, frozen, inactive and in fp32, without its dropout.

    Raises:
        ModelError: there is an adapter of that name, or the saved weights are not those of this base. Then the model
            is left as it was.
    """
    if name in model.peft_config:
        raise ModelError(f"the model has an adapter called '{name}' already; delete it, or load the model anew")
    files = find_adapter(path, **hub_kwargs)
    check_fits(files, model.get_base_model(), path)
    if isinstance(peft_config, LoraConfig):
        _check_lora(peft_config)
        peft_config.lora_dropout = 0.0
    peft_config.inference_mode = True
    _register(peft_config, custom_modules)
    # Their own modes: PEFT leaves the new layers, or the whole model, in another one.
    training = {module for module in model.modules() if module.training}
    try:
        with torch.random.fork_rng(devices=[]), peft_warnings():  # what is drawn here is overwritten
            model.add_adapter(name, peft_config)
        result = model.load_adapter(str(files.folder), name, torch_device=str(model.device))
        misfits = [*result.missing_keys, *result.unexpected_keys]
        if misfits:
            raise ValueError(f"{len(misfits)} weights do not match, such as {misfits[0]}")
    except MISFITS as error:
        if name in model.peft_config:
            model.delete_adapter(name)
        raise ModelError(
            f"The adapter '{path}' does not fit this base, so it was trained on another one: "
            f"{(str(error).splitlines() or [type(error).__name__])[-1].strip()}"
        ) from error
    finally:
        for module in model.modules():
            module.training = module in training


def keep_adapters_fp32(model: PeftModel) -> None:
    """Make every trainable parameter of `model` fp32; those modules still take and give what their neighbours do.

    LoRA layers cast their own input. A whole module in fp32 (`modules_to_save`) inside a 16-bit model does not, so
    hooks cast at its two ends. Calling this twice does no harm.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            outside = next(wrapper.original_module.parameters()).dtype
            for module in wrapper.modules_to_save.values():
                inside = next(module.parameters()).dtype
                if inside != outside:
                    module.register_forward_pre_hook(_CastInputs(inside), with_kwargs=True)
                    module.register_forward_hook(_CastOutputs(outside))


def reference_adapter(model: PeftModel) -> str:
    """Add a frozen copy of the active adapter, to be the reference of a run that continues from it; return its name.

    The copy has the same weights to the bit, no dropout, and stays inactive. The global random generator is untouched.
    Save the policy alone with `model.save_pretrained(folder, selected_adapters=["default"])`: PEFT saves every adapter
    otherwise.

    Raises:
        ModelError: the model has a reference adapter already, or more than one active adapter.
    """
    if REFERENCE_ADAPTER in model.peft_config:
        raise ModelError(
            f"The model has an adapter called '{REFERENCE_ADAPTER}' already, perhaps from an earlier trainer. Remove "
            f"it with model.delete_adapter('{REFERENCE_ADAPTER}'), or load the model anew."
        )
    if len(model.active_adapters) != 1:
        raise ModelError(f"One adapter must be active to be copied; active are: {model.active_adapters}.")
    policy = model.active_adapters[0]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    config = copy.deepcopy(model.peft_config[policy])
    if isinstance(config, LoraConfig):
        config.lora_dropout = 0.0
        config.init_lora_weights = True  # overwritten below; others may need data or an SVD
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(REFERENCE_ADAPTER, config)
    parameters = dict(model.named_parameters())
    for name, source in list(parameters.items()):
        if f".{policy}." in f"{name}." and name in trainable:
            target_name = f"{name}.".replace(f".{policy}.", f".{REFERENCE_ADAPTER}.").removesuffix(".")
            target = parameters[target_name]
            target.data = source.detach().clone()
            target.requires_grad_(False)
    keep_adapters_fp32(model)
    return REFERENCE_ADAPTER


def disable_dropout(model: nn.Module) -> None:
    """Switch every kind of dropout off, for good, so that a training forward equals an evaluation forward.

    Policy and reference must see the same network. Three places hold a rate: `nn.Dropout` modules (GPT-2, LoRA's own);
    plain float attributes of modules, given to the attention function or to `F.dropout` (Llama's `attention_dropout`,
    OPT's `dropout` and `layerdrop`, Bloom's `hidden_dropout`); and config fields that modules read in each forward
    (GPT-J's `attn_pdrop`, Falcon's and GPT-Neo's `attention_dropout`). All three are set to zero; the config of a fully
    fine-tuned model is saved that way.
    """
    configs: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                configs[id(value)] = value
            elif _is_rate(name, value):
                setattr(module, name, 0.0)
    for config in configs.values():
        for name, value in vars(config).items():
            if _is_rate(name, value):
                setattr(config, name, 0.0)


class _CastInputs:
    """A forward pre-hook that casts floating-point tensors to the module's own dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return tuple(_cast(arg, self.dtype) for arg in args), {k: _cast(v, self.dtype) for k, v in kwargs.items()}


class _CastOutputs:
    """A forward hook that casts floating-point tensors to the dtype of the surrounding model."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(_cast(value, self.dtype) for value in output)
        return _cast(output, self.dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@contextlib.contextmanager
def peft_warnings() -> Iterator[None]:
    """Turn the one warning of PEFT's that must stop a run into an error, and drop the one that concerns PEFT alone."""
    with warnings.catch_warnings():
        # Weights missing from an adapter's file: PEFT would go on with random ones.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        # PEFT reads a property of the base that transformers has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _is_rate(name: str, value: Any) -> bool:
    return isinstance(value, float) and value != 0.0 and ("drop" in name)


def _register(config: PeftConfig, custom_modules: CustomModules | None) -> None:
    # The call site for alignkit.models.lora.FUSED_LORA. PEFT keeps the mapping outside the dataclass fields, so it is
    # never saved: the adapter's files are the same with and without it.
    if custom_modules and isinstance(config, LoraConfig):
        # PEFT's annotation says classes; it calls them, and accepts None from the call.
        config._register_custom_module(cast("dict[type[nn.Module], type[nn.Module]]", dict(custom_modules)))


def _checked_copy(peft_config: PeftConfig, model: PreTrainedModel, what: str = "peft_config") -> PeftConfig:
    """Return a copy that is ready to train, or refuse it with a reason; `what` is where it came from."""
    if not isinstance(peft_config, PeftConfig):
        raise ModelError(
            f"peft_config must be a PEFT config such as LoraConfig(r=16, target_modules='all-linear'), "
            f"not {type(peft_config).__name__}."
        )
    if peft_config.is_prompt_learning:
        raise ModelError(
            f"{what} is prompt learning ({_kind(peft_config)}): its virtual tokens shift every position, so "
            "log-probs and prefix sharing would be wrong. Use LoraConfig."
        )
    if peft_config.peft_type in (PeftType.ADALORA, PeftType.XLORA, PeftType.POLY):
        raise ModelError(
            f"{_kind(peft_config)} needs steps of its own during training, which are not done. Use LoraConfig."
        )
    config = copy.deepcopy(peft_config)
    if isinstance(config, LoraConfig):
        _check_lora(config)
    task = None
    if model.get_output_embeddings() is not None:
        task = TaskType.SEQ_CLS if has_head(model, SCORE) else TaskType.CAUSAL_LM
    if config.task_type is None:
        config.task_type = task
    elif task is not None and config.task_type != task:
        kind = "reward model" if task is TaskType.SEQ_CLS else "causal language model"
        raise ModelError(f"{what} has task_type '{config.task_type}' for a {kind}: use '{task.value}'.")
    config.inference_mode = False  # configs read from disk say True, which would train nothing
    config.base_model_name_or_path = None  # PEFT writes the name of the model it is put on
    return config


def _check_lora(config: LoraConfig) -> None:
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise ModelError(
            f"init_lora_weights='{init}' changes the base weights, so switching the adapter off would no longer give "
            "the reference. Use True, 'gaussian', 'orthogonal' or 'eva'."
        )
    if config.bias != "none":
        raise ModelError(
            f"bias='{config.bias}' trains biases of the base itself, so switching the adapter off would no longer "
            "give the reference. Use bias='none' (lora_bias=True trains biases inside the adapter)."
        )
    if config.alora_invocation_tokens is not None:
        raise ModelError("Activated LoRA (alora_invocation_tokens) depends on token positions: use plain LoRA.")
    if config.kasa_config is not None or config.layer_replication:
        option = "kasa_config" if config.kasa_config is not None else "layer_replication"
        raise ModelError(f"{option} changes the base itself, so it cannot serve as the reference. Leave it out.")


def _check_modules_to_save(model: PreTrainedModel, config: PeftConfig) -> None:
    names = (config.modules_to_save or ()) if isinstance(config, LoraConfig) else ()
    for name, module in model.named_modules():
        quantized = any(not parameter.is_floating_point() for parameter in module.parameters())
        if quantized and name.split(".")[-1] in names:
            raise ModelError(f"modules_to_save names '{name}', which is quantized and cannot be trained whole.")


def _nearest_module(model: nn.Module, config: PeftConfig) -> str:
    targets = config.target_modules if isinstance(config, LoraConfig) else None
    if not targets or isinstance(targets, str):
        return ""
    names = {name.split(".")[-1] for name, module in model.named_modules() if name}
    unknown = [target for target in targets if target.split(".")[-1] not in names]
    return nearest(unknown[0], names) if unknown else ""


def _kind(config: PeftConfig) -> str:
    return type(config).__name__.removesuffix("Config")
