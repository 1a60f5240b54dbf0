"""Short runs, each with something that has a state of its own: what a resume must not forget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import EarlyStoppingCallback, Trainer

from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from alignkit.trainers.ppo_callbacks import StopOnKL
from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig
from tests.model_factory import tiny_model
from tests.ppo_factory import ppo_trainer, prompts, scaling_on_a_cpu
from tests.tiny_preferences import QUIET, character_tokenizer, lora, randomise_adapter, text_rows

# Five rows in steps of two: the last step of an epoch is ragged. Windows of four steps are open at most saves.
ROWS, GLOBAL_BATCH, EPOCHS = 5, 2, 2
OPTIONS: dict[str, Any] = {
    **QUIET,
    "use_cpu": True,
    "num_train_epochs": EPOCHS,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "activation_checkpointing": False,
}
DROPOUT = lora(lora_dropout=0.2, target_modules=["q_proj", "down_proj"])
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
BEST = {**EVALUATED, "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
PRECOMPUTED = {"precompute_ref_log_probs": True, "reference_cache_dir": "{folder}/cache"}
TEXTS = [{"prompt": "abc", "completion": "de"}, {"prompt": "xy", "completion": "zzz"}]


def preference_run(
    folder: Path,
    *,
    is_whole: bool = False,
    is_unpaired: bool = False,
    is_stream: bool = False,
    is_evaluated_before: bool = False,
    callbacks: Callable[[], list[Any]] = list,
    **options: Any,
) -> Trainer:
    """DPO or KTO on LoRA with dropout, or on a model that is trained whole.

    Args:
        folder: where it writes.
        is_whole: train the model itself.
        is_unpaired: rows of one completion and a label.
        is_stream: read the rows as a stream, which has no length.
        is_evaluated_before: evaluate before training.
        callbacks: makes further ones.
        **options: of the configuration.
    """
    rows: list[dict[str, Any]] = text_rows(ROWS)
    if is_unpaired:
        rows = [
            {"prompt": row["prompt"], "completion": row[("chosen", "rejected")[i % 2]], "label": i % 2 == 0}
            for i, row in enumerate(rows)
        ]
    data: Any = Dataset.from_list(rows)
    trainer = DPOTrainer(
        tiny_model("llama"),
        args=DPOConfig(str(folder), **{**OPTIONS, "disable_dropout": False, "beta": 0.5, **options}),
        train_dataset=data.to_iterable_dataset() if is_stream else data,
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=character_tokenizer(),
        peft_config=None if is_whole else DROPOUT,
        callbacks=callbacks(),
    )
    if not is_whole:
        randomise_adapter(trainer.model)
    if is_evaluated_before:
        trainer.evaluate()
    return trainer


def reward_run(folder: Path, **options: Any) -> Trainer:
    """A reward model of two heads."""
    settings = {"disable_dropout": False, "num_heads": 2, "center_rewards_coefficient": 0.1}
    trainer = RewardTrainer(
        tiny_model("llama"),
        args=RewardConfig(str(folder), **{**OPTIONS, **settings, **options}),
        train_dataset=Dataset.from_list(text_rows(ROWS)),
        eval_dataset=Dataset.from_list(text_rows(4, seed=1)),
        processing_class=character_tokenizer(),
        peft_config=DROPOUT,
    )
    randomise_adapter(trainer.model)
    return trainer


def ppo_run(folder: Path, *, callbacks: Callable[[], list[Any]] = list, **options: Any) -> Trainer:
    """Rollouts of two optimizer steps or more, over two epochs of the prompts."""
    settings = {"num_ppo_epochs": 2, "max_completion_length": 4, "max_steps": -1, "kl_target": 3.0, "kl_horizon": 20}
    given = {**OPTIONS, **settings, **options}
    steps = given["num_ppo_epochs"] * given.get("num_mini_batches", 1)
    extra = {"ptx_dataset": TEXTS} if "ptx_coef" in given else {}
    return ppo_trainer(
        folder,
        train_dataset=prompts(4),
        eval_dataset=prompts(2, seed=3),
        peft_config=lora(target_modules=["q_proj", "down_proj"]),
        callbacks=callbacks(),
        **extra,
        **{**given, "save_steps": steps, **({"eval_steps": steps} if "eval_steps" in given else {})},
    )


@dataclass(frozen=True)
class Case:
    """A run and its options; text in these may hold `{folder}`, the one above the run's own.

    Attributes:
        make: builds the trainer.
        options: of `make`.
        context: what it is built and trained in.
    """

    make: Callable[..., Trainer]
    options: Mapping[str, Any] = field(default_factory=dict)
    context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def trainer(self, folder: Path, accumulation: int, workers: int, processes: int = 1, **options: Any) -> Trainer:
        """Build the trainer, with the same rows in every step however they are split."""
        batch = {
            "per_device_train_batch_size": GLOBAL_BATCH // accumulation,
            "gradient_accumulation_steps": accumulation,
            "dataloader_num_workers": workers,
        }
        if processes > 1:  # twice the rows in a step
            batch["per_device_train_batch_size"] = 1
        if self.make is ppo_run:  # its batches are row numbers, which no worker loads
            del batch["dataloader_num_workers"]
        given = {
            name: value.format(folder=folder.parent) if isinstance(value, str) else value
            for name, value in {**batch, **self.options, **options}.items()
        }
        return self.make(folder, **given)


def _stopping() -> list[Any]:
    return [EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1.0)]


PREFERENCE: dict[str, Case] = {
    "sigmoid": Case(preference_run),
    "synced adapter": Case(preference_run, {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "synced model": Case(
        preference_run, {"is_whole": True, "sync_ref_model": True, "ref_model_sync_steps": 2, "learning_rate": 1e-3}
    ),
    "precomputed reference": Case(preference_run, PRECOMPUTED),
    "bco": Case(preference_run, {"loss_type": ["bco_pair", "sft"], "loss_weights": [1.0, 0.3]}),
    "aot": Case(preference_run, {"loss_type": "aot"}),
    "kto": Case(preference_run, {"loss_type": "kto", "is_unpaired": True, "desirable_weight": 1.5}),
    "kto on pairs": Case(preference_run, {"loss_type": "kto"}),
    "weighted": Case(preference_run, {"use_weighting": True}),
    "f-divergence": Case(preference_run, {"f_divergence_type": "js_divergence"}),
    "stopped early": Case(preference_run, {**BEST, "callbacks": _stopping}),
    "best at the end": Case(preference_run, {**BEST, "save_total_limit": 2}),
    "evaluated before": Case(preference_run, {"is_evaluated_before": True}),
    "evaluated by epoch": Case(preference_run, {"eval_strategy": "epoch", "logging_first_step": True}),
    "rate by plateau": Case(
        preference_run,
        {**EVALUATED, "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}},
    ),
    "logged by epoch": Case(preference_run, {"logging_strategy": "epoch", "logging_steps": 10, "save_total_limit": 3}),
    "pieces": Case(preference_run, {"max_tokens_per_forward": 40, "loss_type": "bco_pair"}),
    "adafactor": Case(preference_run, {"optim": "adafactor"}),
    "stream": Case(preference_run, {"is_stream": True, "max_steps": 8}),
    "saved by epoch": Case(preference_run, {"save_strategy": "epoch", "save_steps": 500, "num_train_epochs": 3}),
    "last left out": Case(preference_run, {"dataloader_drop_last": True, "train_sampling_strategy": "sequential"}),
    "fraction of an epoch": Case(preference_run, {"num_train_epochs": 1.5, "lr_scheduler_type": "linear"}),
    "scaled gradients": Case(preference_run, {}, scaling_on_a_cpu),
    "rewards": Case(reward_run, EVALUATED),
    "rewards, best at the end": Case(reward_run, {**BEST, "save_total_limit": 1}),
}
PPO: dict[str, Case] = {
    "adaptive kl": Case(ppo_run, {"normalize_rewards": True}),
    "a critic of its own": Case(ppo_run, {"value_adapter": True, "value_learning_rate": 3e-2, "whiten_rewards": True}),
    "critic alone first": Case(ppo_run, {"critic_warmup_rollouts": 2, "num_mini_batches": 2, "num_ppo_epochs": 1}),
    "rollouts cut short": Case(ppo_run, {"num_ppo_epochs": 3, "target_approx_kl": 1e-4}),
    "texts": Case(ppo_run, {"ptx_coef": 0.3, "num_generations": 2}),
    "rloo": Case(ppo_run, {"advantage_estimator": "rloo", "num_generations": 2, "num_ppo_epochs": 1}),
    "best of evaluations": Case(ppo_run, {**EVALUATED, "load_best_model_at_end": True, "value_adapter": True}),
    "stopped by kl": Case(ppo_run, {"callbacks": lambda: [StopOnKL(1e-6)]}),
    "scaled ppo": Case(ppo_run, {"normalize_rewards": True}, scaling_on_a_cpu),
}
CASES = PREFERENCE | PPO

# Every option once, several in one run, for a test that everybody has time for: accumulation and workers with each.
QUICK: dict[str, tuple[Case, int, int]] = {
    "dpo, a reference that follows, weighted, the best of evaluations": (
        Case(
            preference_run,
            {
                **BEST,
                "sync_ref_model": True,
                "ref_model_sync_steps": 2,
                "use_weighting": True,
                "save_total_limit": 2,
                "callbacks": _stopping,
            },
        ),
        2,
        0,
    ),
    "dpo, trained whole, evaluated by epoch": (
        Case(preference_run, {**PREFERENCE["synced model"].options, "eval_strategy": "epoch"}),
        1,
        0,
    ),
    "dpo, precomputed reference, coupled rows in pieces, by workers": (
        Case(
            preference_run,
            {**PRECOMPUTED, "loss_type": ["bco_pair", "aot"], "loss_weights": [1, 1], "max_tokens_per_forward": 40},
        ),
        2,
        2,
    ),
    "kto": (PREFERENCE["kto"], 1, 0),
    "dpo, another divergence, rate by plateau, scaled gradients": (
        Case(
            preference_run,
            {**PREFERENCE["rate by plateau"].options, **PREFERENCE["f-divergence"].options},
            scaling_on_a_cpu,
        ),
        1,
        0,
    ),
    "rewards": (PREFERENCE["rewards, best at the end"], 2, 0),
    "ppo, adaptive, normalised, cut short": (
        Case(
            ppo_run, {"normalize_rewards": True, "value_adapter": True, "num_ppo_epochs": 3, "target_approx_kl": 1e-4}
        ),
        1,
        0,
    ),
    "ppo, critic alone first, texts": (
        Case(ppo_run, {**PPO["critic alone first"].options, "ptx_coef": 0.3, **EVALUATED}),
        2,
        0,
    ),
}
