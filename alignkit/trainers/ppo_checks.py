"""What makes a `PPOConfig` wrong: ranges, contradictions, and options that nothing would read."""

from __future__ import annotations

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
    needs,
    ranges,
    refuse,
)

if TYPE_CHECKING:
    from alignkit.trainers.ppo_config import PPOConfig

CHOICES = {
    "rollout_engine": ("hf", "continuous"),
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
    **ENGINE_NEEDS,
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


def check_generations(args: PPOConfig) -> None:
    """RLOO compares the completions of one prompt."""
    if args.advantage_estimator == "rloo" and args.num_generations < 2:
        refuse(args, "num_generations", "advantage_estimator='rloo' compares completions of a prompt: set 2 or more")


def check_weights(args: PPOConfig) -> None:
    """Reward weights that are no numbers."""
    for weight in args.reward_weights or ():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            refuse(args, "reward_weights", f"{weight!r} is not a finite number")


CHECKS: tuple[Check, ...] = (
    check_choices,
    ranges(RANGES),
    needs(NEEDS),
    *ENGINE_CHECKS,
    check_kl_place,
    check_lengths,
    check_generations,
    check_weights,
)
