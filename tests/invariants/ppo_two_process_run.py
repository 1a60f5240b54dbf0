"""A PPO run that one process or several can make: `python -m torch.distributed.run ... -m <this module> FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars

from alignkit.evaluation.rollouts import summarize_rollouts
from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig
from tests.model_factory import tiny_model
from tests.ppo_factory import Gradients, ppo_trainer, prompts, vowels, weights
from tests.tiny_preferences import QUIET, character_tokenizer, lora, randomise_adapter, text_rows

GLOBAL_BATCH = 8
SCENARIOS: dict[str, dict[str, Any]] = {
    "gae": {"num_ppo_epochs": 2, "normalize_rewards": True, "kl_target": 2.0, "kl_horizon": 100},
    "accumulation in pieces": {"gradient_accumulation_steps": 2, "max_tokens_per_forward": 24, "num_generations": 2},
    "a critic of its own": {"value_adapter": True, "whiten_rewards": True, "num_mini_batches": 2},
    "rloo": {"advantage_estimator": "rloo", "num_generations": 2},
    "texts": {"ptx_coef": 0.3},
    "critic alone, then both": {"critic_warmup_rollouts": 1},
    "stopped early": {"num_ppo_epochs": 3, "target_approx_kl": 1e-4},
    "dropped": {"on_reward_error": "drop"},
}
REWARD_MODEL = "a reward model's evaluation"
TEXTS = [
    {"prompt": "abc", "completion": "de"},
    {"prompt": "xy", "completion": "zzz"},
    {"prompt": "q", "completion": "r"},
]
LOGGED = ("loss", "grad_norm")
LOGGED_PREFIXES = ("objective/", "policy/", "rewards/", "val/explained", "val/clip", "val/num", "eval_", "loss/")


def sometimes(completions: list[str], lost: list[bool] | None = None, **columns: Any) -> list[float | None]:
    """No reward for some completions, and for all of the second process's in the first rollout."""
    of_all = zip(completions, vowels(completions), lost or [False] * len(completions), strict=True)
    return [reward if len(text) % 5 and not is_lost else None for text, reward, is_lost in of_all]


def training_prompts() -> Dataset:
    """Two rollouts of prompts; `lost` are those that the second of two processes takes first."""
    data = prompts(2 * GLOBAL_BATCH)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(42))  # `RolloutSampler`'s first epoch
    lost = set(order[GLOBAL_BATCH // 2 : GLOBAL_BATCH].tolist())
    return data.add_column("lost", [row in lost for row in range(len(data))])


def evaluate_rewards(folder: Path, processes: int) -> list[dict[str, float]]:
    """Evaluate a reward model on numbers of pairs that do not divide by the batch, nor by the processes."""
    found = []
    for count in (3, 5):
        trainer = RewardTrainer(
            tiny_model("llama"),
            RewardConfig(str(folder / "reward"), per_device_eval_batch_size=4 // processes, use_cpu=True, **QUIET),
            train_dataset=text_rows(4),
            eval_dataset=Dataset.from_list(text_rows(count, seed=5)),
            processing_class=character_tokenizer(),
            peft_config=lora(task_type="SEQ_CLS"),
        )
        randomise_adapter(trainer.model)
        metrics = trainer.evaluate()
        found.append({name: value for name, value in metrics.items() if "second" not in name and "time" not in name})
    return found


def run(folder: Path, options: dict[str, Any], processes: int) -> dict[str, Any]:
    """Train four steps and evaluate; return what every number of processes must agree on."""
    accumulation = options.get("gradient_accumulation_steps", 1) * options.get("num_mini_batches", 1)
    recorder = Gradients()
    extra = {"ptx_dataset": TEXTS} if "ptx_coef" in options else {}
    trainer = ppo_trainer(
        folder / "run",
        sometimes if "on_reward_error" in options else vowels,
        train_dataset=training_prompts(),
        eval_dataset=prompts(3, seed=4),
        callbacks=[recorder],
        per_device_train_batch_size=GLOBAL_BATCH // processes // accumulation,
        max_steps=4,
        max_grad_norm=0.0,
        logging_steps=1,
        **extra,
        **options,
    )
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    trainer.evaluate()
    if processes > 1 and "on_reward_error" not in options:
        trainer.evaluate(prompts(1, seed=4))  # fewer prompts than processes
        held_out: Any = trainer.eval_dataset
        assert len(summarize_rollouts(trainer, held_out.select([0])).answers) == 1
    logs = [
        {name: value for name, value in entry.items() if name in LOGGED or name.startswith(LOGGED_PREFIXES)}
        for entry in trainer.state.log_history
    ]
    return {
        "gradients": [gradients for gradients in recorder.steps if gradients],
        "weights": weights(trainer),
        "kl_coef": trainer.ppo_state.kl_coef,
        "moments": trainer.ppo_state.moments.state_dict(),
        "logs": [entry for entry in logs if entry][:5],
    }


def main(folder: Path, processes: int) -> None:
    """Run every scenario; the first process saves the results."""
    disable_progress_bars()
    torch.set_num_threads(1)
    results: dict[str, Any] = {name: run(folder, options, processes) for name, options in SCENARIOS.items()}
    results[REWARD_MODEL] = evaluate_rewards(folder, processes)
    if processes == 1 or torch.distributed.get_rank() == 0:
        torch.save(results, folder / f"{processes}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), processes=2)
