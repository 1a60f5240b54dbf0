"""A run that one process or several can make: `python -m torch.distributed.run ... -m <this module> FOLDER`.

Every scenario trains on the same global batches, whatever the number of processes, and leaves its gradients, final
adapter and logs in FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch.distributed.tensor import DTensor

from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig
from tests.model_factory import tiny_model
from tests.tiny_preferences import (
    QUIET,
    RecordGradients,
    adapter_weights,
    character_tokenizer,
    lora,
    randomise_adapter,
    token_rows,
)
from tests.two_processes import whole

GLOBAL_BATCH = 8
SCENARIOS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "accumulation in pieces": {"gradient_accumulation_steps": 2, "max_tokens_per_forward": 40, "ld_alpha": 0.5},
    # The KL estimate is a mean over all processes' rows, as in TRL.
    "kto": {"loss_type": "kto", "beta": 0.5},
    "kto in pieces": {"loss_type": "kto", "beta": 0.5, "max_tokens_per_forward": 40},
    "reward": {"num_heads": 2, "center_rewards_coefficient": 0.1},
    "reward in pieces": {"gradient_accumulation_steps": 2, "max_tokens_per_forward": 40},
}
# Without `max_tokens_per_forward`, which is refused where weights are sharded.
SHARDED: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "activation checkpointing": {"activation_checkpointing": True, "tie_word_embeddings": True},
    "accumulation": {"gradient_accumulation_steps": 2, "ld_alpha": 0.5},
    "clipped": {"max_grad_norm": 0.1, "loss_type": "ipo"},
    "evaluated before": {"is_evaluated_before": True},
    "precomputed": {"precompute_ref_log_probs": True},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    # The second step is no better, so that no save follows its evaluation.
    "best of a moving reference": {
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.5,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "load_best_model_at_end": True,
        "metric_for_best_model": "rewards/margins",
        "greater_is_better": False,
    },
    "kto": {"loss_type": "kto", "beta": 0.5},
    "reward": {"num_heads": 2, "center_rewards_coefficient": 0.1},
}
REWARD_METRICS = ("accuracy", "margin", "mean_reward", "min_reward", "max_reward", "accuracy_low", "calibration_error")
LOGGED = ("loss", "grad_norm", "eval_loss", *REWARD_METRICS, *(f"eval_{name}" for name in REWARD_METRICS))
LOGGED_PREFIXES = ("rewards/", "logps/", "eval_rewards/", "eval_logps/")


def rows(count: int, *, seed: int, labelled: bool) -> Dataset:
    """Token rows whose lengths differ, so that processes cut their batches into unequal numbers of pieces."""
    made = token_rows(count, seed=seed)
    for i, row in enumerate(made):
        row["weight"] = 0.5 + i % 3
        if labelled:
            row["label"] = i % 3 == 0
    return Dataset.from_list(made)


def run(folder: Path, name: str, scenario: dict[str, Any], processes: int) -> dict[str, Any]:
    """Train two steps and evaluate; return what every number of processes must agree on."""
    options = dict(scenario)
    is_evaluated_before = options.pop("is_evaluated_before", False)
    accumulation = options.get("gradient_accumulation_steps", 1)
    labelled = options.get("loss_type") == "kto"
    recorder = RecordGradients()
    settings = {
        "per_device_train_batch_size": GLOBAL_BATCH // processes // accumulation,
        "per_device_eval_batch_size": 4 // processes,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-4,  # keeps rounding noise from becoming whole steps
        "max_grad_norm": 0.0,
        "activation_checkpointing": False,
        "max_tokens_per_forward": None,
        "logging_steps": 1,
        "use_cpu": True,
    }
    model = tiny_model("llama", tie_word_embeddings=options.pop("tie_word_embeddings", False))
    make, config = (RewardTrainer, RewardConfig) if name.startswith("reward") else (DPOTrainer, DPOConfig)
    trainer = make(
        model,
        args=config(str(folder / f"{name} {processes}"), **{**settings, **QUIET, **options}),
        train_dataset=rows(2 * GLOBAL_BATCH, seed=0, labelled=labelled),
        # Not divisible: processes get repeated rows to fill their last batches, which must not count. (The KL estimate
        # of KTO is a mean over a whole batch, so other batches would give other numbers.)
        eval_dataset=rows(8 if labelled else 7, seed=1, labelled=labelled),
        processing_class=character_tokenizer(),
        peft_config=lora(),
        callbacks=[recorder],
    )
    assert trainer.accelerator.num_processes == processes
    randomise_adapter(trainer.model, seed=8)
    if is_evaluated_before:  # as recipes do
        trainer.predict(trainer.eval_dataset)
    trainer.train()
    trainer.evaluate()
    logs = [
        {name: value for name, value in entry.items() if name in LOGGED or name.startswith(LOGGED_PREFIXES)}
        for entry in trainer.state.log_history
    ]
    return {
        "gradients": recorder.steps,
        "weights": {name: whole(weight.detach()).clone() for name, weight in adapter_weights(trainer.model).items()},
        "is_sharded": any(isinstance(weight, DTensor) for weight in adapter_weights(trainer.model).values()),
        "logs": [entry for entry in logs if entry],
        "best_step": trainer.state.best_global_step,
    }


def main(folder: Path, scenarios: dict[str, dict[str, Any]], processes: int) -> None:
    """Run the scenarios; the first process saves the results."""
    disable_progress_bars()
    torch.set_num_threads(1)
    results = {name: run(folder, name, scenario, processes) for name, scenario in scenarios.items()}
    if processes == 1 or torch.distributed.get_rank() == 0:
        torch.save(results, folder / f"{processes}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), SCENARIOS, processes=2)
