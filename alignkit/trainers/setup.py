"""What a trainer is handed, turned into a policy, a reference and a tokenizer."""

from __future__ import annotations

import copy
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from alignkit.checkpoint.lock import check_output_dir
from alignkit.errors import ConfigError, DataError, ModelError
from alignkit.functional.preference import LOSSES
from alignkit.models.adapters import (
    REFERENCE_ADAPTER,
    add_adapter,
    disable_dropout,
    keep_adapters_fp32,
    reference_adapter,
)
from alignkit.models.bundle import REFERENCE, ModelBundle
from alignkit.models.fused import fuse_frozen_modules
from alignkit.models.load import load_model
from alignkit.models.lora import FUSED_LORA, is_quantized
from alignkit.models.reference_sync import add_synced_reference
from alignkit.models.reward_adapter import load_reward_policy, reward_peft_config, with_reward_head
from alignkit.models.source import locate
from alignkit.models.tokenizer import load_tokenizer, with_pad_token
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.config_engine import EngineConfig
from alignkit.trainers.passes import refuse_data_parallel

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=EngineConfig)


def build_policy(
    model: str | Path | PreTrainedModel | PeftModel,
    args: EngineConfig,
    quantization_config: Any,
    peft_config: PeftConfig | None,
    *,
    reward_heads: int | None = None,
) -> PreTrainedModel | PeftModel:
    """Return the model to train, with fp32 trainable parameters.

    Args:
        model, args, quantization_config, peft_config: as a trainer takes them.
        reward_heads: outputs of the head that makes a reward model of it; `None` for a policy.

    Raises:
        ConfigError: options of loading for a model that is loaded already.
        ModelError: nothing to train, or a quantized model without an adapter.
    """
    if isinstance(model, str | Path):
        adapted = peft_config is not None or locate(model, {}).adapter is not None
        loader = load_model if reward_heads is None else load_reward_policy
        model = _load(model, args, quantization_config, adapted=adapted, loader=loader)
    elif not isinstance(model, PreTrainedModel | PeftModel):
        raise ModelError(f"model must be a name, a path, a PreTrainedModel or a PeftModel, not {type(model).__name__}")
    elif quantization_config is not None or args.model_init_kwargs:
        name = "quantization_config" if quantization_config is not None else "model_init_kwargs"
        raise ConfigError(
            f"{name} applies when the model is loaded; this one is loaded already. Pass its name instead."
        )
    _refuse_classifiers(model)
    if reward_heads is not None:
        model = with_reward_head(model, reward_heads)
        peft_config = None if peft_config is None else reward_peft_config(peft_config)
    if peft_config is not None:
        model = add_adapter(cast(PreTrainedModel, model), peft_config, custom_modules=FUSED_LORA)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ModelError(
            "no parameter of the model is trainable. Pass peft_config=LoraConfig(...), or load the adapter with "
            "is_trainable=True."
        )
    if not isinstance(model, PeftModel) and is_quantized(model):
        raise ModelError("a quantized model cannot be trained whole: pass peft_config=LoraConfig(...)")
    _make_trainable_fp32(model, trainable)
    if isinstance(model, PeftModel):
        fuse_frozen_modules(model.get_base_model())
    if args.disable_dropout:
        if isinstance(peft_config, LoraConfig) and peft_config.lora_dropout:
            warnings.warn(
                f"lora_dropout={peft_config.lora_dropout} has no effect, because disable_dropout=True (TRL's default) "
                "sets every dropout to 0. Set one of the two.",
                UserWarning,
                stacklevel=3,
            )
        disable_dropout(model)
    return model


def _refuse_classifiers(model: PreTrainedModel | PeftModel) -> None:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.get_output_embeddings() is None:
        raise ModelError(
            f"{type(base).__name__} is no causal language model, which every trainer starts from: load it with "
            "AutoModelForCausalLM, or pass its name."
        )


def _load(
    name: str | Path,
    args: EngineConfig,
    quantization_config: Any,
    *,
    adapted: bool,
    loader: Callable[..., PreTrainedModel | PeftModel] = load_model,
) -> PreTrainedModel | PeftModel:
    dtype = None
    if "dtype" not in _init_kwargs(args):
        # Only a frozen base may have the compute dtype: what trains is fp32, under autocast.
        compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        dtype = compute if adapted else torch.float32
    return loader(
        name,
        dtype=dtype,
        quantization_config=quantization_config,
        trust_remote_code=args.trust_remote_code,
        model_init_kwargs=_init_kwargs(args),
        device=args.device,
        custom_modules=FUSED_LORA,
    )


def _init_kwargs(args: EngineConfig) -> dict[str, Any]:
    """`model_init_kwargs` as the mapping that the configuration has made of it."""
    return cast("dict[str, Any]", args.model_init_kwargs or {})


def _make_trainable_fp32(model: PreTrainedModel | PeftModel, trainable: list[torch.nn.Parameter]) -> None:
    if isinstance(model, PeftModel):
        keep_adapters_fp32(model)
        return
    narrow = [parameter for parameter in trainable if parameter.dtype in (torch.bfloat16, torch.float16)]
    if narrow:
        logger.warning(
            "%d trainable parameters are %s; they train in fp32 from here on, since small steps vanish in 16 bits.",
            len(narrow),
            str(narrow[0].dtype).removeprefix("torch."),
        )
        model.float()


def build_bundle(
    policy: PreTrainedModel | PeftModel,
    ref_model: str | Path | PreTrainedModel | PeftModel | None,
    args: DPOConfig,
    *,
    is_new_adapter: bool,
) -> ModelBundle:
    """Give the policy its reference: adapters off, a copy of the adapter that training continues from, or a model.

    Raises:
        ConfigError: a reference for losses that need none, or TR-DPO with a reference that cannot be moved.
    """
    needs_reference = any(LOSSES[name].needs_reference for name in args.loss_type)
    if ref_model is not None:
        if not needs_reference:
            raise ConfigError(f"ref_model is given, but loss_type={args.loss_type} compares with no reference")
        if isinstance(policy, PeftModel) and args.sync_ref_model:
            raise ConfigError("sync_ref_model moves the adapter's own reference; leave ref_model out")
        if isinstance(ref_model, str | Path):
            ref_model = _load(ref_model, args, None, adapted=isinstance(policy, PeftModel))
        return _with_model(policy, ref_model, args)
    if not needs_reference:
        return ModelBundle(policy)
    if isinstance(policy, PeftModel):
        if args.sync_ref_model:
            return ModelBundle(policy, adapters={REFERENCE: add_synced_reference(policy, continued=not is_new_adapter)})
        return ModelBundle(policy, adapters={REFERENCE: None if is_new_adapter else reference_adapter(policy)})
    if args.precompute_ref_log_probs:
        return ModelBundle(policy)
    return _with_model(policy, copy.deepcopy(policy), args)


def _with_model(
    policy: PreTrainedModel | PeftModel, reference: PreTrainedModel | PeftModel, args: DPOConfig
) -> ModelBundle:
    if policy.config.get_text_config().vocab_size != reference.config.get_text_config().vocab_size:
        raise ModelError(
            "the reference has another vocabulary than the policy "
            f"({reference.config.get_text_config().vocab_size} and {policy.config.get_text_config().vocab_size} tokens)"
        )
    if args.disable_dropout:
        disable_dropout(reference)
    return ModelBundle(policy, reference=reference)


AnyDataset = Dataset | IterableDataset | list


def own_copy(args: ConfigT, kind: type[ConfigT]) -> ConfigT:
    """Copy a configuration, so that the caller's stays as it is, with batches that no process deals out to others.

    Raises:
        ConfigError: it is not of the trainer's own kind.
        CheckpointError: its output directory cannot be made; Trainer makes it, but only after data preparation.
    """
    if not isinstance(args, kind):
        raise ConfigError(f"args must be a {kind.__name__}, not a {type(args).__name__}")
    args = copy.copy(args)
    config: Any = copy.copy(args.accelerator_config)
    if not config.use_seedable_sampler:
        raise ConfigError(
            "accelerator_config: use_seedable_sampler=False draws an epoch's order from what random numbers were used "
            "before, which no resumed run could draw again. Leave it True."
        )
    config.dispatch_batches = False  # a stream's too: batches hold tensors of several lengths
    args.accelerator_config = config
    if args.should_save:
        check_output_dir(Path(str(args.output_dir)))
    return args


def check_optimizer(optimizer: Any, model: torch.nn.Module) -> None:
    """See that an optimizer which the caller made trains everything that is to be trained.

    Adapters and heads that the trainer adds come after it was made, and would never move, without a word.

    Raises:
        ConfigError: a trainable parameter is not among the optimizer's.
    """
    if optimizer is None:
        return
    known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in wanted.items() if parameter not in known]
    if missing:
        raise ConfigError(
            f"the optimizer in `optimizers` lacks {len(missing)} of {len(wanted)} trainable parameters, such as "
            f"'{missing[-1]}', which would never move: the trainer adds new adapters and heads to the model. Leave it "
            "out, and choose with optim, learning_rate and the like."
        )


def short_name(model: str | Path | PreTrainedModel | PeftModel) -> str:
    """The last part of a model's name, to call a run by."""
    name = str(model) if isinstance(model, str | Path) else model.config._name_or_path
    return Path(name).name or type(model).__name__


def each_dataset(datasets: Any, function: Callable[[Any, str], Any], name: str) -> Any:
    """Apply `function` to a dataset, or to each of a dict of them; `None` stays `None`."""
    if datasets is None:
        return None
    if isinstance(datasets, Mapping):
        return {key: function(dataset, f"{name}_{key}") for key, dataset in datasets.items()}
    return function(datasets, name)


def check_dataset(dataset: Dataset | IterableDataset, args: DPOConfig) -> None:
    """See that the prepared training set has an end, and columns that the losses can use.

    Raises:
        ConfigError: a stream without `max_steps`.
        DataError: a `weight` column with losses that re-order the rows.
    """
    if isinstance(dataset, IterableDataset) and args.max_steps <= 0:
        raise ConfigError("the training set is a stream, whose length is not known: set max_steps, e.g. max_steps=1000")
    columns, specs = dataset.column_names or [], [LOSSES[name] for name in args.loss_type]
    ordered = [spec.name for spec in specs if not spec.supports_weighting and not spec.unpaired]
    if "weight" in columns and ordered:
        raise DataError(f"the `weight` column cannot be used with {ordered}, which re-order the rows: remove it")
    if "margin" in columns and not any("margin" in spec.reads for spec in specs):
        logger.warning("The `margin` column is not used: only %s reads it.", _readers("margin"))


def _readers(tensor: str) -> str:
    return ", ".join(spec.name for spec in LOSSES.values() if tensor in spec.reads)


def build_tokenizer(
    processing_class: Any, model: str | Path | PreTrainedModel | PeftModel, args: EngineConfig
) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with a padding token; one that the caller passed is not changed.

    Raises:
        ModelError: not a tokenizer, or none can be found for the model.
    """
    if isinstance(processing_class, ProcessorMixin):
        raise ModelError("alignkit trains on text: pass the processor's tokenizer as processing_class")
    if processing_class is None:
        kwargs = _init_kwargs(args)
        name = model if isinstance(model, str | Path) else model.config._name_or_path
        return load_tokenizer(name, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ModelError(f"processing_class must be a tokenizer, not {type(processing_class).__name__}")
    return with_pad_token(processing_class)


def check_devices(args: DPOConfig, distributed: DistributedType, *, has_reference: bool) -> None:
    """Refuse what would run wrong on the processes and devices that Trainer found.

    Args:
        args: of the run.
        distributed: how the processes share the policy.
        has_reference: whether the reference is a model of its own.

    Raises:
        ConfigError: DataParallel, or a reference that the sharding cannot serve.
    """
    refuse_data_parallel(args)
    if is_deepspeed_zero3_enabled() and (has_reference or args.precompute_ref_log_probs):
        raise ConfigError("ZeRO-3 works with neither a separate reference nor precompute_ref_log_probs: use LoRA")
    if distributed == DistributedType.DEEPSPEED and args.sync_ref_model:
        raise ConfigError(
            "sync_ref_model moves weights that DeepSpeed's checkpoints leave out, so the run could not go on from one: "
            "use DDP or FSDP2, or leave sync_ref_model out"
        )
    if distributed == DistributedType.FSDP and has_reference:
        raise ConfigError("a separate reference model is not sharded by FSDP: use LoRA, or precompute_ref_log_probs")


def remove_reference(folder: Path, bundle: ModelBundle) -> None:
    """Remove the reference adapter that PEFT saved beside the policy's.

    A reference that never moves belongs to the run's start, not to its results. One that the user made stays.
    """
    if bundle.adapters.get(REFERENCE) == REFERENCE_ADAPTER:
        shutil.rmtree(folder / REFERENCE_ADAPTER, ignore_errors=True)
