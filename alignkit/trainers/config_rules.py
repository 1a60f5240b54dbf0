"""What makes a configuration wrong, for every trainer: numbers out of range, options that cannot be honoured or would
have no effect, and layouts that contradict one another.

A check is a small function that raises; `refusals`, `ranges` and `needs` make one of a table. An option that would have
no effect is an error: its value differs from the default while nothing that reads it is switched on.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from alignkit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from alignkit.trainers.config_engine import EngineConfig

Check = Callable[[Any], None]

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


class Refusal(NamedTuple):
    """An inherited option with only some of its values accepted, because no other could be honoured."""

    accepted: tuple[object, ...]
    reason: str


class Range(NamedTuple):
    """Numbers that an option accepts."""

    accepts: Callable[[Any], bool]
    text: str
    whole: bool = False
    optional: bool = False


class Need(NamedTuple):
    """An option that only matters while another is on."""

    met: Callable[[Any], bool]
    remedy: str


AT_LEAST_ONE = Range(lambda n: n >= 1, "a whole number, 1 or more", whole=True)
POSITIVE = Range(lambda x: x > 0, "a positive, finite number")
COUNT = Range(lambda n: n >= 0, "a whole number, 0 or more", whole=True)
NOT_NEGATIVE = Range(lambda x: x >= 0, "a finite number, 0 or more")
FRACTION = Range(lambda x: 0 <= x <= 1, "a number from 0 to 1")

LABEL_SMOOTHING = Range(
    lambda x: 0 <= x < 0.5, "in [0, 0.5): it is the probability that a label is flipped, and at 0.5 nothing is left"
)

ENGINE_RANGES: dict[str, Range] = {
    "learning_rate": NOT_NEGATIVE,
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "num_train_epochs": POSITIVE,
    "dataset_num_proc": AT_LEAST_ONE._replace(optional=True),
    "max_length": Range(
        lambda n: n >= 2, "2 tokens or more (one of prompt, one of completion), or None", whole=True, optional=True
    ),
    "max_drop_fraction": FRACTION,
    "max_skipped_steps": COUNT,
}

ENGINE_NEEDS: dict[str, Need] = {
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


def changed(args: EngineConfig, name: str) -> bool:
    """Whether the option differs from its default."""
    (field,) = (field for field in dataclasses.fields(args) if field.name == name)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return vars(args)[name] != default


def refuse(args: EngineConfig, name: str, why: str) -> None:
    """Raise the error that every check ends in: the option, its value, and what to do."""
    raise ConfigError(f"{name}={vars(args)[name]!r}: {why}.")


def refusals(table: Mapping[str, Refusal]) -> Check:
    """Check that inherited options have values that can be honoured."""

    def check_refused(args: EngineConfig) -> None:
        for name, refusal in table.items():
            if vars(args)[name] not in refusal.accepted:
                refuse(args, name, refusal.reason)

    return check_refused


def ranges(table: Mapping[str, Range]) -> Check:
    """Check that numbers are numbers, finite, and in range."""

    def check_ranges(args: EngineConfig) -> None:
        for name, allowed in table.items():
            value = vars(args)[name]
            if value is None and allowed.optional:
                continue
            kind = numbers.Integral if allowed.whole else numbers.Real
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
                refuse(args, name, f"must be {allowed.text}")
            if not allowed.accepts(value):
                refuse(args, name, f"must be {allowed.text}")

    return check_ranges


def needs(table: Mapping[str, Need]) -> Check:
    """Check that options which only matter while another is on were left alone while it is off."""

    def check_needs(args: EngineConfig) -> None:
        for name, need in table.items():
            if changed(args, name) and not need.met(args):
                refuse(args, name, f"has no effect; {need.remedy}, or leave {name} at its default")

    return check_needs


def check_switches(args: EngineConfig) -> None:
    """Text where True or False is expected: every text counts as True, "no" too."""
    for field in dataclasses.fields(args):
        if isinstance(field.default, bool) and isinstance(vars(args)[field.name], str):
            refuse(args, field.name, "must be True or False, and any text would count as True")


def check_output_dir(args: EngineConfig) -> None:
    """Text that names no folder, such as that of a variable which was never set; None is transformers' default."""
    if args.output_dir is not None and (not str(args.output_dir) or "\0" in str(args.output_dir)):
        refuse(args, "output_dir", "names no folder; give a path, or '.' for the folder that you are in")


def check_layout(args: EngineConfig) -> None:
    """Layouts that are unknown."""
    if args.layout not in LAYOUTS:
        raise ConfigError(f"layout={args.layout!r} is unknown.{nearest(str(args.layout), LAYOUTS)} Known: {LAYOUTS}.")


def check_padding_multiple(args: EngineConfig) -> None:
    """Padding is rounded up only where there is any."""
    multiple = args.pad_to_multiple_of
    if multiple is None:
        return
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        refuse(args, "pad_to_multiple_of", "must be a whole number of tokens, 1 or more, 'auto' or None")
    if args.layout != "padded":
        refuse(args, "pad_to_multiple_of", f"has no effect: layout={args.layout!r} does not pad; set layout='padded'")


def check_token_budget(args: EngineConfig) -> None:
    """A number of tokens, or one of the two words for 'no fixed number'."""
    budget = args.max_tokens_per_forward
    if budget is None or budget == "auto":
        return
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        refuse(args, "max_tokens_per_forward", "must be a number of tokens, 1 or more, 'auto' or None")


def check_precision(args: EngineConfig) -> None:
    """Two compute dtypes at once."""
    if args.fp16 and args.bf16:
        refuse(args, "fp16", "cannot be combined with bf16=True; set one of them to False")


def check_hub_strategy(args: EngineConfig) -> None:
    """Publishing whole checkpoints, which hold optimizer states and pickled arguments."""
    if args.hub_strategy in ("checkpoint", "all_checkpoints"):
        why = "whole checkpoints hold optimizer states and pickled arguments and never go up; use 'every_save' or 'end'"
        refuse(args, "hub_strategy", why)


def check_model_init_kwargs(args: EngineConfig) -> None:
    """JSON that is valid but not a mapping."""
    if args.model_init_kwargs is not None and not isinstance(args.model_init_kwargs, dict):
        refuse(args, "model_init_kwargs", "must be a mapping of argument names to values")


ENGINE_CHECKS: tuple[Check, ...] = (
    check_switches,
    check_output_dir,
    check_layout,
    check_padding_multiple,
    check_token_budget,
    check_precision,
    check_hub_strategy,
    check_model_init_kwargs,
)
