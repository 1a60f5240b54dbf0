"""What makes a `DPOConfig` wrong besides what `config_rules.py` checks for every trainer.

What each loss reads and supports comes from `LOSSES`, so a new loss needs no change here.
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Iterable
from typing import TYPE_CHECKING

from alignkit.errors import ConfigError, nearest
from alignkit.functional.divergence import DIVERGENCES
from alignkit.functional.preference import LOSSES, LossSpec
from alignkit.trainers.config_rules import (
    AT_LEAST_ONE,
    ENGINE_CHECKS,
    ENGINE_NEEDS,
    ENGINE_RANGES,
    FRACTION,
    LABEL_SMOOTHING,
    NOT_NEGATIVE,
    POSITIVE,
    Check,
    Need,
    Range,
    changed,
    needs,
    ranges,
    refusals,
    refuse,
)
from alignkit.trainers.config_table import REFUSED

if TYPE_CHECKING:
    from alignkit.trainers.config import DPOConfig

logger = logging.getLogger(__name__)

RANGES: dict[str, Range] = {
    **ENGINE_RANGES,
    "precompute_ref_batch_size": AT_LEAST_ONE._replace(optional=True),
    "ref_model_mixup_alpha": FRACTION,
    "ref_model_sync_steps": AT_LEAST_ONE,
    "beta": POSITIVE,
    "label_smoothing": LABEL_SMOOTHING,
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
    **ENGINE_NEEDS,
    "f_alpha_divergence_coef": Need(
        lambda args: DIVERGENCES[args.f_divergence_type].reads_coef, "set f_divergence_type='alpha_divergence'"
    ),
    "ref_model_mixup_alpha": Need(lambda args: args.sync_ref_model, "set sync_ref_model=True"),
    "ref_model_sync_steps": Need(lambda args: args.sync_ref_model, "set sync_ref_model=True"),
    "reference_cache_dir": Need(lambda args: args.precompute_ref_log_probs, "set precompute_ref_log_probs=True"),
    "precompute_ref_batch_size": Need(lambda args: args.precompute_ref_log_probs, "set precompute_ref_log_probs=True"),
}


def chosen_losses(args: DPOConfig) -> list[LossSpec]:
    """Return the registry's rows for `loss_type`, whose names have been checked."""
    return [LOSSES[name] for name in args.loss_type]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


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


def check_padding_free(args: DPOConfig) -> None:
    """`padding_free` asked for together with a layout that pads."""
    if args.padding_free and args.layout == "padded":
        refuse(args, "padding_free", "contradicts layout='padded'; choose one of them")
    if args.padding_free:
        logger.info("padding_free=True changes nothing: the layout %r holds no padding.", args.layout)


CHECKS: tuple[Check, ...] = (
    refusals(REFUSED),
    ranges(RANGES),
    check_loss_names,
    check_loss_weights,
    check_loss_mix,
    check_loss_options,
    check_exo_smoothing,
    check_divergence,
    check_weighting,
    check_reference,
    needs(NEEDS),
    *ENGINE_CHECKS,
    check_padding_free,
)
