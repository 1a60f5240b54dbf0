"""What makes a `PPOConfig` wrong: ranges, contradictions, and options that nothing would read."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from alignkit.errors import ConfigError, nearest
from alignkit.functional.kl import KL_PLACES
from alignkit.trainers.config_rules import (
    AT_LEAST_ONE,
    ENGINE_CHECKS,
    ENGINE_NEEDS,
    ENGINE_RANGES,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Check,
    Need,
    Range,
    Refusal,
    needs,
    ranges,
    refusals,
    refuse,
)
from alignkit.trainers.config_table_engine import ENGINE_DIFFERENCES, ENGINE_REFUSED

if TYPE_CHECKING:
    from alignkit.trainers.ppo_config import PPOConfig

logger = logging.getLogger(__name__)

_NO_LOADER = "rollouts are read by row, without a data loader's workers; leave it at its default"
_NO_PREDICTIONS = "an evaluation completes prompts, and gathers no predictions; leave it at its default"

REFUSED: dict[str, Refusal] = {
    **ENGINE_REFUSED,
    "label_names": Refusal((None,), "batches hold episodes, not label tensors; leave it None"),
    "label_smoothing_factor": Refusal((0.0,), "it smooths a cross-entropy over tokens, which is not computed"),
    "train_sampling_strategy": Refusal(("random",), "every epoch takes the prompts in a random order of its own"),
    "average_tokens_across_devices": Refusal(
        (True,), "the loss is the mean over the tokens of a step on all devices; leave it True"
    ),
    "disable_dropout": Refusal(
        (True,), "with dropout the first importance ratio would not be 1, and the clipping would mean nothing"
    ),
    "dataloader_drop_last": Refusal((False,), "prompts that do not fill a rollout are left out of an epoch anyway"),
    "dataloader_num_workers": Refusal((0,), _NO_LOADER),
    "dataloader_prefetch_factor": Refusal((None,), _NO_LOADER),
    "dataloader_persistent_workers": Refusal((False,), _NO_LOADER),
    "dataloader_multiprocessing_context": Refusal((None,), _NO_LOADER),
    "dataloader_in_order": Refusal((True,), _NO_LOADER),
    "ddp_find_unused_parameters": Refusal((None, False), "every trained parameter has a part in every backward pass"),
    "prediction_loss_only": Refusal((False,), _NO_PREDICTIONS),
    "eval_accumulation_steps": Refusal((None,), _NO_PREDICTIONS),
    "eval_do_concat_batches": Refusal((True,), _NO_PREDICTIONS),
    "eval_use_gather_object": Refusal((False,), _NO_PREDICTIONS),
    "include_for_metrics": Refusal(([],), _NO_PREDICTIONS),
    "batch_eval_metrics": Refusal((False,), _NO_PREDICTIONS),
}

DIFFERENCES: dict[str, str] = {
    **{name: text for name, text in ENGINE_DIFFERENCES.items() if name not in REFUSED},
    "max_length": "of the texts in `ptx_dataset`; an error without `ptx_coef`",
    "logging_steps": "1: an optimizer step holds a rollout's worth of news",
    "save_steps": "rounded up to whole rollouts, between which checkpoints are made",
    "remove_unused_columns": "either way: further columns go to the reward functions",
    "data_seed": "of the order of the prompts; `seed` where it is None",
    "fsdp": "refused when a trainer is made: every process generates with the whole model",
    "fsdp_config": "see `fsdp`",
    "deepspeed": "see `fsdp`",
    "metric_for_best_model": "'reward' where the best model is to be loaded",
    "greater_is_better": "True where `metric_for_best_model` is left to itself",
}

CHOICES = {
    "rollout_engine": ("hf", "merged", "continuous"),
    "on_reward_error": ("raise", "drop"),
    "kl_estimator": ("k1", "k2", "k3"),
    "kl_place": ("reward", "loss"),
    "advantage_estimator": ("gae", "rloo"),
}

RANGES: dict[str, Range] = {
    **ENGINE_RANGES,
    "value_learning_rate": NOT_NEGATIVE._replace(optional=True),
    "num_ppo_epochs": AT_LEAST_ONE,
    "num_mini_batches": AT_LEAST_ONE,
    "num_generations": AT_LEAST_ONE,
    "max_prompt_length": AT_LEAST_ONE._replace(optional=True),
    "max_completion_length": AT_LEAST_ONE,
    "min_completion_length": Range(lambda n: n >= 0, "a whole number, 0 or more", whole=True),
    "temperature": Range(lambda x: x > 0, "positive: greedy completions (0) explore nothing. Usual: 0.7 to 1"),
    "rollout_batch_tokens": AT_LEAST_ONE._replace(optional=True),
    "reward_timeout_s": POSITIVE._replace(optional=True),
    "reward_batch_size": AT_LEAST_ONE._replace(optional=True),
    "reward_clip": POSITIVE._replace(optional=True),
    "missing_eos_penalty": NOT_NEGATIVE._replace(optional=True),
    "overlong_buffer_tokens": Range(lambda n: n >= 0, "a whole number, 0 or more", whole=True),
    "overlong_penalty": POSITIVE,
    "kl_coef": NOT_NEGATIVE,
    "kl_target": POSITIVE._replace(optional=True),
    "kl_horizon": AT_LEAST_ONE,
    "gamma": FRACTION,
    "lam": FRACTION,
    "cliprange": POSITIVE,
    "cliprange_value": POSITIVE,
    "vf_coef": NOT_NEGATIVE,
    "entropy_coef": NOT_NEGATIVE,
    "target_approx_kl": POSITIVE._replace(optional=True),
    "critic_warmup_rollouts": Range(lambda n: n >= 0, "a whole number, 0 or more", whole=True),
    "ptx_coef": NOT_NEGATIVE,
}


def _has_critic(args: PPOConfig) -> bool:
    return args.advantage_estimator == "gae"


_CRITIC = Need(_has_critic, "set advantage_estimator='gae'")
NEEDS: dict[str, Need] = {
    **{name: need for name, need in ENGINE_NEEDS.items() if name not in REFUSED},
    "max_length": Need(lambda args: args.ptx_coef > 0, "set ptx_coef; prompts have max_prompt_length"),
    **dict.fromkeys(
        (
            "value_learning_rate",
            "gamma",
            "lam",
            "cliprange_value",
            "vf_coef",
            "value_adapter",
            "critic_warmup_rollouts",
        ),
        _CRITIC,
    ),
    "whiten_rewards": _CRITIC,
    "kl_horizon": Need(lambda args: args.kl_target is not None, "set kl_target"),
    "overlong_penalty": Need(lambda args: args.overlong_buffer_tokens > 0, "set overlong_buffer_tokens"),
}


def check_choices(args: PPOConfig) -> None:
    """Words that are not among the known ones."""
    for name, known in CHOICES.items():
        value = vars(args)[name]
        if value not in known:
            raise ConfigError(f"{name}={value!r} is unknown.{nearest(str(value), known)} Known: {', '.join(known)}.")


def check_kl_place(args: PPOConfig) -> None:
    """KL terms without the right fixed point, and whitening beside a KL term in the loss."""
    place = KL_PLACES[args.kl_estimator, args.kl_place]
    if place.verdict == "refused":
        raise ConfigError(
            f"kl_estimator={args.kl_estimator!r} with kl_place={args.kl_place!r}: {place.reason}. Use k1 in the "
            "reward, or k2 in the loss."
        )
    if args.kl_place == "loss" and (args.whiten_advantages or args.whiten_rewards):
        raise ConfigError(
            "kl_place='loss': whitening would rescale the score against the KL term, which then no longer holds the "
            "policy. Set whiten_advantages=False and whiten_rewards=False, or kl_place='reward'."
        )
    if args.kl_target is not None and args.kl_coef == 0:
        raise ConfigError("kl_target moves kl_coef by factors, and kl_coef=0 stays 0: give a positive kl_coef")


def check_lengths(args: PPOConfig) -> None:
    """Lengths that leave no room."""
    if args.min_completion_length > args.max_completion_length:
        refuse(args, "min_completion_length", f"is more than max_completion_length={args.max_completion_length}")
    if args.overlong_buffer_tokens >= args.max_completion_length:
        refuse(args, "overlong_buffer_tokens", f"must be less than max_completion_length={args.max_completion_length}")
    if args.min_completion_length:
        logger.warning(
            "min_completion_length=%d: EOS is never drawn before, and the log-probs that are trained on count it as "
            "possible, so the importance ratios of those tokens are slightly off.",
            args.min_completion_length,
        )


def check_stop_strings(args: PPOConfig) -> None:
    """One text where a list is expected, or a text that would stop everything."""
    if isinstance(args.stop_strings, str):
        refuse(args, "stop_strings", f"is one text; write [{args.stop_strings!r}]")
    for text in args.stop_strings or ():
        if not isinstance(text, str) or not text:
            refuse(args, "stop_strings", f"{text!r} ends no completion; give texts of one character or more")


def check_generations(args: PPOConfig) -> None:
    """RLOO compares the completions of one prompt."""
    if args.advantage_estimator == "rloo" and args.num_generations < 2:
        refuse(args, "num_generations", "advantage_estimator='rloo' compares completions of a prompt: set 2 or more")


def check_best_metric(args: PPOConfig) -> None:
    """A measure that evaluations do not have, or one that a schedule would read the wrong way round."""
    by_metric = args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    if by_metric and (args.metric_for_best_model is None or "mode" not in (args.lr_scheduler_kwargs or {})):
        refuse(
            args,
            "lr_scheduler_type",
            "goes by a measure, of which it takes lower values for better ones: set metric_for_best_model='reward' "
            "and lr_scheduler_kwargs={'mode': 'max'}",
        )
    if args.metric_for_best_model in ("loss", "eval_loss"):
        refuse(args, "metric_for_best_model", "evaluations have no loss: choose 'reward' or 'kl'")


def check_weights(args: PPOConfig) -> None:
    """Reward weights that are no numbers."""
    if args.reward_weights is not None and not isinstance(args.reward_weights, list | tuple):
        refuse(args, "reward_weights", "must be a list, with one number for each reward")
    for weight in args.reward_weights or ():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            refuse(args, "reward_weights", f"{weight!r} is not a finite number")


CHECKS: tuple[Check, ...] = (
    refusals(REFUSED),
    check_choices,
    ranges(RANGES),
    needs(NEEDS),
    *ENGINE_CHECKS,
    check_kl_place,
    check_lengths,
    check_generations,
    check_best_metric,
    check_weights,
    check_stop_strings,
)
