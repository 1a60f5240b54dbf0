"""`PPOConfig`: what a run of `PPOTrainer` can be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from alignkit.trainers.config_engine import EngineConfig
from alignkit.trainers.ppo_checks import CHECKS


@dataclass(repr=False)
class PPOConfig(EngineConfig):
    """Options of `PPOTrainer`: `TrainingArguments`, the engine's, and these. Names are TRL's where it had them.

    One rollout takes `per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches × processes`
    prompts, times `num_generations` completions; it is then trained on for `num_ppo_epochs × num_mini_batches`
    optimizer steps.

    Raises:
        ConfigError: for an option that is out of range, contradicts another, or would have no effect.
    """

    CHECKS: ClassVar[tuple[Callable[[Any], None], ...]] = CHECKS
    LENGTH_OPTIONS = "max_prompt_length, max_completion_length or num_generations"

    logging_steps: float = field(
        default=1, metadata={"help": "Optimizer steps between two log entries; below 1, a fraction of the run."}
    )
    learning_rate: float = field(default=3e-6, metadata={"help": "Peak rate of the policy. LoRA: 1e-5 to 1e-4."})
    value_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Rate of the value head (usually 3 to 30 times the policy's). None: the policy's."},
    )

    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest text of ptx_dataset, in tokens; the rest is cut. None: no limit."},
    )

    # --- rollouts ---
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout. Usual: 1 to 4."})
    num_mini_batches: int = field(
        default=1, metadata={"help": "Optimizer steps per pass over a rollout. Usual: 1 to 8."}
    )
    num_generations: int = field(
        default=1,
        metadata={"help": "Completions per prompt; they share its prefix. 'rloo' needs 2 or more, usually 4."},
    )
    max_prompt_length: int | None = field(
        default=512, metadata={"help": "Longest prompt in tokens; longer ones are dropped and counted. None: no limit."}
    )
    max_completion_length: int = field(default=53, metadata={"help": "Most tokens of a completion."})
    min_completion_length: int = field(
        default=0, metadata={"help": "Tokens before EOS may be drawn; log-probs are not adjusted for it."}
    )
    temperature: float = field(
        default=0.7, metadata={"help": "Of sampling, and of the log-probs that are trained on. Usual: 0.7 to 1."}
    )
    stop_strings: list[str] | None = field(default=None, metadata={"help": "Texts that end a completion, besides EOS."})
    rollout_engine: str = field(
        default="hf",
        metadata={
            "help": "hf: batched generation with a cache. merged: the same with merged copies of the adapted weights, "
            "faster, for the memory of one more copy of them; not on quantized bases. continuous: transformers' "
            "continuous batching.",
            "choices": ["hf", "merged", "continuous"],
        },
    )
    rollout_batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Most tokens (prompt and completion) that generate at once. None: 16,384."},
    )

    # --- rewards ---
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each reward. None: 1 each."}
    )
    on_reward_error: str = field(
        default="raise",
        metadata={
            "help": "What a failing reward does: stop the run (raise), or drop and count the samples (drop).",
            "choices": ["raise", "drop"],
        },
    )
    reward_timeout_s: float | None = field(
        default=None, metadata={"help": "Seconds that a reward may take. None: no limit."}
    )
    reward_batch_size: int | None = field(
        default=None,
        metadata={"help": "Samples that a reward function gets in one call, and loses if it fails. None: a rollout's."},
    )
    reward_clip: float | None = field(default=None, metadata={"help": "Clip scores to ± this. Usual: 5 to 10."})
    normalize_rewards: bool = field(
        default=False, metadata={"help": "Divide scores by their running deviation, less their running mean."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a completion that did not end. Usual: about 1."}
    )
    overlong_buffer_tokens: int = field(
        default=0,
        metadata={"help": "Last tokens before max_completion_length in which overlong_penalty grows from 0 to full."},
    )
    overlong_penalty: float = field(default=1.0, metadata={"help": "Largest penalty within overlong_buffer_tokens."})

    # --- KL from the reference ---
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL penalty. Usual: 0.01 to 0.2."})
    kl_estimator: str = field(
        default="k1",
        metadata={
            "help": "k1 = log-ratio, k2 = its square / 2, k3 = exp(-k1) - 1 + k1.",
            "choices": ["k1", "k2", "k3"],
        },
    )
    kl_place: str = field(
        default="reward",
        metadata={
            "help": "Where it is charged: in each token's reward (with k1), or as a term of the loss (with k2, of "
            "whole completions; k3 is biased).",
            "choices": ["reward", "loss"],
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "Move kl_coef so that the KL per completion comes to this (nats). Usual: 3 to 10."},
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes over which kl_coef follows kl_target."})

    # --- advantages and losses ---
    advantage_estimator: str = field(
        default="gae",
        metadata={
            "help": "gae: with a learned critic. rloo: without one, against the other completions of the prompt.",
            "choices": ["gae", "rloo"],
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount. Usual: 1."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda. Usual: 0.95 to 1."})
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Divide shaped rewards by their deviation; their mean stays."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Bring advantages to mean 0 and deviation 1 over the rollout."}
    )
    cliprange: float = field(
        default=0.2, metadata={"help": "How far the importance ratio counts from 1. Usual: 0.1 to 0.3."}
    )
    cliprange_value: float = field(
        default=0.2, metadata={"help": "How far a value counts from its old one. Usual: 0.2."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss. Usual: 0.1 to 1."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of an entropy bonus. Usual: 0 to 0.01."})
    target_approx_kl: float | None = field(
        default=None,
        metadata={"help": "Skip the rest of a rollout's steps once approx_kl exceeds this. Usual: 0.01 to 0.1."},
    )
    value_adapter: bool = field(
        default=False,
        metadata={"help": "Give the critic an adapter of its own instead of a head on the policy's trunk."},
    )
    critic_warmup_rollouts: int = field(
        default=0, metadata={"help": "First rollouts that train the critic alone. Usual: 0 to 10."}
    )
    ptx_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of a language-modelling loss on ptx_dataset (PPO-ptx). Usual: 0.01 to 1."},
    )

    def __post_init__(self) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model is None:  # there is no loss to evaluate
            self.metric_for_best_model, self.greater_is_better = "reward", True
        super().__post_init__()
