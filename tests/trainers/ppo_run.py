"""A PPO run for its own process: `python -m tests.trainers.ppo_run FOLDER [--resume CHECKPOINT] [--kill WHERE]`."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars

from alignkit.trainers.ppo import PPOTrainer
from alignkit.trainers.ppo_callbacks import PPOCallback
from tests.ppo_factory import ppo_trainer, prompts

STEPS_PER_ROLLOUT, ROLLOUTS = 4, 4
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "num_generations": 2,
    "max_steps": STEPS_PER_ROLLOUT * ROLLOUTS,
    "save_strategy": "steps",
    "save_steps": STEPS_PER_ROLLOUT,
    "logging_steps": 3,  # a window is open at most checkpoints
    "kl_target": 3.0,
    "kl_horizon": 20,
    "normalize_rewards": True,
    "value_adapter": True,
    "value_learning_rate": 3e-2,
    "ptx_coef": 0.1,
}


class Kill(PPOCallback):
    """Ends the process as no handler can prevent, in the third rollout."""

    def __init__(self, where: str) -> None:
        self.where = where

    def _die(self, where: str, state: Any, step: int) -> None:
        if self.where == where and state.global_step == 2 * STEPS_PER_ROLLOUT + step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_rewards(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._die("rollout", state, 0)

    def on_minibatch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._die("minibatch", state, 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._die("epoch", state, 2)


def trainer(folder: Path, kill: str | None = None, **options: Any) -> PPOTrainer:
    """The run's trainer."""
    texts = [{"prompt": "abc", "completion": "de"}, {"prompt": "xy", "completion": "zzz"}]
    callbacks = [] if kill is None else [Kill(kill)]
    run = ppo_trainer(
        folder, ptx_dataset=texts, callbacks=callbacks, train_dataset=prompts(10), **{**OPTIONS, **options}
    )
    if kill == "start":
        os.kill(os.getpid(), signal.SIGKILL)
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume")
    parser.add_argument("--kill")
    given = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)
    trainer(given.folder, given.kill).train(True if given.resume == "latest" else given.resume)
