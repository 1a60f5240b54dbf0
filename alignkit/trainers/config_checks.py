"""What makes a `DPOConfig` wrong: one small function for each reason, run in order before anything is loaded.

An option that would have no effect is an error: its value differs from the default while nothing that reads it is
switched on. What each loss reads and supports comes from `LOSSES`, so a new loss needs no change here.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import numbers
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from alignkit.errors import ConfigError, nearest
from alignkit.functional.divergence import DIVERGENCES
from alignkit.functional.preference import LOSSES, LossSpec
from alignkit.trainers.config_table import REFUSED

if TYPE_CHECKING:
    from alignkit.trainers.config import DPOConfig

logger = logging.getLogger(__name__)

LAYOUTS = ("auto", "prefix_shared", "packed", "padded")
LOW_RANK_OPTIMIZERS = (
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw",
    "apollo_adamw_layerwise",
)
OPTIMIZERS_WITHOUT_ARGUMENTS = ("adamw_torch", "adamw_torch_fused", "adafactor")


class Range(NamedTuple):
    """Numbers that an option accepts."""

    accepts: Callable[[Any], bool]
    text: str
    whole: bool = False
    optional: bool = False


class Need(NamedTuple):
    """An option that only matters while another is on."""

    met: Callable[[DPOConfig], bool]
    remedy: str


AT_LEAST_ONE = Range(lambda n: n >= 1, "a whole number, 1 or more", whole=True)
POSITIVE = Range(lambda x: x > 0, "a positive, finite number")
NOT_NEGATIVE = Range(lambda x: x >= 0, "a finite number, 0 or more")
FRACTION = Range(lambda x: 0 <= x <= 1, "a number from 0 to 1")

RANGES: dict[str, Range] = {
    "learning_rate": NOT_NEGATIVE,
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "dataset_num_proc": AT_LEAST_ONE._replace(optional=True),
    "max_length": Range(
        lambda n: n >= 2, "2 tokens or more (one of prompt, one of completion), or None", whole=True, optional=True
    ),
    "max_drop_fraction": FRACTION,
    "precompute_ref_batch_size": AT_LEAST_ONE._replace(optional=True),
    "ref_model_mixup_alpha": FRACTION,
    "ref_model_sync_steps": AT_LEAST_ONE,
    "beta": POSITIVE,
    "label_smoothing": Range(
        lambda x: 0 <= x < 0.5, "in [0, 0.5): it is the probability that a label is flipped, and at 0.5 nothing is left"
    ),
    "f_alpha_divergence_coef": Range(lambda x: True, "a finite number"),
    "ld_alpha": FRACTION._replace(optional=True),
    "discopop_tau": POSITIVE,
    "simpo_gamma": NOT_NEGATIVE,
    "cpo_alpha": NOT_NEGATIVE,
    "dpop_lambda": NOT_NEGATIVE,
    "desirable_weight": POSITIVE,
    "undesirable_weight": POSITIVE,
}

NEEDS: dict[str, Need] = {
    "f_alpha_divergence_coef": Need(
        lambda args: DIVERGENCES[args.f_divergence_type].reads_coef, "set f_divergence_type='alpha_divergence'"
    ),
    "ref_model_mixup_alpha": Need(lambda args: args.sync_ref_model, "set sync_ref_model=True"),
    "ref_model_sync_steps": Need(lambda args: args.sync_ref_model, "set sync_ref_model=True"),
    "reference_cache_dir": Need(lambda args: args.precompute_ref_log_probs, "set precompute_ref_log_probs=True"),
    "precompute_ref_batch_size": Need(lambda args: args.precompute_ref_log_probs, "set precompute_ref_log_probs=True"),
    "activation_checkpointing_kwargs": Need(
        lambda args: bool(args.activation_checkpointing), "set activation_checkpointing=True"
    ),
    # TrainingArguments itself copies logging_steps into eval_steps, so that value may stay behind in a copied config
    "eval_steps": Need(
        lambda args: args.eval_strategy == "steps" or args.eval_steps == args.logging_steps, "set eval_strategy='steps'"
    ),
    "eval_delay": Need(lambda args: args.eval_strategy != "no", "set eval_strategy to 'steps' or 'epoch'"),
    "logging_steps": Need(
        lambda args: "steps" in (args.logging_strategy, args.eval_strategy), "set logging_strategy='steps'"
    ),
    "save_steps": Need(lambda args: args.save_strategy == "steps", "set save_strategy='steps'"),
    "save_total_limit": Need(lambda args: args.save_strategy != "no", "set save_strategy to 'steps' or 'epoch'"),
    "optim_args": Need(
        lambda args: args.optim not in OPTIMIZERS_WITHOUT_ARGUMENTS, "use adam_beta1, adam_beta2 and adam_epsilon"
    ),
    "optim_target_modules": Need(
        lambda args: args.optim in LOW_RANK_OPTIMIZERS, "set optim to a GaLore or APOLLO optimizer"
    ),
    "hub_strategy": Need(lambda args: args.push_to_hub, "set push_to_hub=True"),
    "hub_always_push": Need(lambda args: args.push_to_hub, "set push_to_hub=True"),
    "dataloader_persistent_workers": Need(lambda args: args.dataloader_num_workers > 0, "set dataloader_num_workers"),
    "dataloader_multiprocessing_context": Need(
        lambda args: args.dataloader_num_workers > 0, "set dataloader_num_workers"
    ),
}


def changed(args: DPOConfig, name: str) -> bool:
    """Whether the option differs from its default."""
    (field,) = (field for field in dataclasses.fields(args) if field.name == name)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return vars(args)[name] != default


def refuse(args: DPOConfig, name: str, why: str) -> None:
    """Raise the error that every check ends in: the option, its value, and what to do."""
    raise ConfigError(f"{name}={vars(args)[name]!r}: {why}.")


def chosen_losses(args: DPOConfig) -> list[LossSpec]:
    """Return the registry's rows for `loss_type`, whose names have been checked."""
    return [LOSSES[name] for name in args.loss_type]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def check_refused(args: DPOConfig) -> None:
    """Inherited options that cannot be honoured here."""
    for name, refusal in REFUSED.items():
        if vars(args)[name] not in refusal.accepted:
            refuse(args, name, refusal.reason)


def check_ranges(args: DPOConfig) -> None:
    """Numbers that are none, not finite, or out of range."""
    for name, allowed in RANGES.items():
        value = vars(args)[name]
        if value is None and allowed.optional:
            continue
        kind = numbers.Integral if allowed.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            refuse(args, name, f"must be {allowed.text}")
        if not allowed.accepts(value):
            refuse(args, name, f"must be {allowed.text}")


def check_loss_names(args: DPOConfig) -> None:
    """Losses that the registry does not know."""
    if not isinstance(args.loss_type, (list, tuple)) or not args.loss_type:
        refuse(args, "loss_type", f"name at least one loss. Known: {_listed(LOSSES)}")
    for name in args.loss_type:
        if name not in LOSSES:
            raise ConfigError(
                f"loss_type: unknown loss {name!r}.{nearest(str(name), LOSSES)} Known: {_listed(LOSSES)}."
            )


def check_loss_weights(args: DPOConfig) -> None:
    """One positive weight for each loss."""
    if args.loss_weights is None:
        return
    if not isinstance(args.loss_weights, (list, tuple)) or len(args.loss_weights) != len(args.loss_type):
        refuse(args, "loss_weights", f"must be a list with one weight for each of the {len(args.loss_type)} losses")
    for weight in args.loss_weights:
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not 0 < weight < math.inf:
            refuse(args, "loss_weights", "every weight must be a positive, finite number; drop a loss instead of 0")


def check_loss_mix(args: DPOConfig) -> None:
    """Unpaired losses read other rows than paired ones, so one batch cannot serve both."""
    unpaired = [spec.name for spec in chosen_losses(args) if spec.unpaired]
    if unpaired and len(unpaired) < len(args.loss_type):
        refuse(args, "loss_type", f"{_listed(unpaired)} reads unpaired rows and cannot be mixed with paired losses")
    if unpaired and args.ld_alpha is not None:
        refuse(args, "ld_alpha", f"compares the lengths of a pair, and {_listed(unpaired)} has no pairs; set None")


def check_loss_options(args: DPOConfig) -> None:
    """An option of one loss, changed while that loss is not used."""
    read = frozenset[str]().union(*(spec.options for spec in chosen_losses(args)))
    known = frozenset[str]().union(*(spec.options for spec in LOSSES.values()))
    for name in sorted(known - read):
        if changed(args, name):
            readers = _listed(spec.name for spec in LOSSES.values() if name in spec.options)
            refuse(args, name, f"has no effect with loss_type={list(args.loss_type)}; it is read by {readers}")


def check_exo_smoothing(args: DPOConfig) -> None:
    """EXO takes the logarithm of the smoothing itself."""
    if "exo_pair" in args.loss_type and args.label_smoothing == 0:
        refuse(args, "label_smoothing", "the loss 'exo_pair' needs a value above 0; its paper uses 1e-3")


def check_divergence(args: DPOConfig) -> None:
    """Divergences that are unknown, undefined for a loss, or read by none."""
    if args.f_divergence_type not in DIVERGENCES:
        hint = nearest(str(args.f_divergence_type), DIVERGENCES)
        raise ConfigError(
            f"f_divergence_type: unknown divergence {args.f_divergence_type!r}.{hint} Known: {_listed(DIVERGENCES)}."
        )
    unable = [spec.name for spec in chosen_losses(args) if not spec.supports_f_divergence]
    if args.f_divergence_type != "reverse_kl" and unable:
        refuse(args, "f_divergence_type", f"is not defined for {_listed(unable)}; use 'reverse_kl' with these losses")
    if args.f_divergence_type != "reverse_kl" and not any(spec.reads_divergence for spec in chosen_losses(args)):
        refuse(args, "f_divergence_type", f"has no effect with {_listed(args.loss_type)}; use 'reverse_kl'")


def check_weighting(args: DPOConfig) -> None:
    """WPO weights multiply the loss of a pair, so there must be one."""
    unable = [spec.name for spec in chosen_losses(args) if not spec.supports_weighting]
    if args.use_weighting and unable:
        refuse(args, "use_weighting", f"is not defined for {_listed(unable)}, which have no term for a single pair")


def check_reference(args: DPOConfig) -> None:
    """Options of the reference, with losses that have none or with each other."""
    if not any(spec.needs_reference for spec in chosen_losses(args)):
        for name in ("precompute_ref_log_probs", "sync_ref_model"):
            if vars(args)[name]:
                refuse(args, name, f"has no effect: {_listed(args.loss_type)} does not read a reference")
    if args.precompute_ref_log_probs and args.sync_ref_model:
        refuse(args, "precompute_ref_log_probs", "cannot be combined with sync_ref_model, which changes the reference")


def check_needs(args: DPOConfig) -> None:
    """Options that only matter while another is on."""
    for name, need in NEEDS.items():
        if changed(args, name) and not need.met(args):
            refuse(args, name, f"has no effect; {need.remedy}, or leave {name} at its default")


def check_layout(args: DPOConfig) -> None:
    """Layouts that are unknown or contradict `padding_free`."""
    if args.layout not in LAYOUTS:
        raise ConfigError(f"layout={args.layout!r} is unknown.{nearest(str(args.layout), LAYOUTS)} Known: {LAYOUTS}.")
    if args.padding_free and args.layout == "padded":
        refuse(args, "padding_free", "contradicts layout='padded'; choose one of them")
    if args.padding_free:
        logger.info("padding_free=True changes nothing: the layout %r holds no padding.", args.layout)


def check_padding_multiple(args: DPOConfig) -> None:
    """Padding is rounded up only where there is any."""
    multiple = args.pad_to_multiple_of
    if multiple is None:
        return
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        refuse(args, "pad_to_multiple_of", "must be a whole number of tokens, 1 or more, 'auto' or None")
    if args.layout != "padded":
        refuse(args, "pad_to_multiple_of", f"has no effect: layout={args.layout!r} does not pad; set layout='padded'")


def check_token_budget(args: DPOConfig) -> None:
    """A number of tokens, or one of the two words for 'no fixed number'."""
    budget = args.max_tokens_per_forward
    if budget is None or budget == "auto":
        return
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        refuse(args, "max_tokens_per_forward", "must be a number of tokens, 1 or more, 'auto' or None")


def check_precision(args: DPOConfig) -> None:
    """Two compute dtypes at once."""
    if args.fp16 and args.bf16:
        refuse(args, "fp16", "cannot be combined with bf16=True; set one of them to False")


def check_model_init_kwargs(args: DPOConfig) -> None:
    """JSON that is valid but not a mapping."""
    if args.model_init_kwargs is not None and not isinstance(args.model_init_kwargs, dict):
        refuse(args, "model_init_kwargs", "must be a mapping of argument names to values")


CHECKS: tuple[Callable[[DPOConfig], None], ...] = (
    check_refused,
    check_ranges,
    check_loss_names,
    check_loss_weights,
    check_loss_mix,
    check_loss_options,
    check_exo_smoothing,
    check_divergence,
    check_weighting,
    check_reference,
    check_needs,
    check_layout,
    check_padding_multiple,
    check_token_budget,
    check_precision,
    check_model_init_kwargs,
)
