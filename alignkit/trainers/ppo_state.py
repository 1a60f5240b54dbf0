"""What a PPO run carries from rollout to rollout besides adapters, and how it is saved and resumed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from alignkit.errors import CheckpointError
from alignkit.functional.kl import adaptive_kl_coef
from alignkit.functional.masked import Moments, pool_moments
from alignkit.functional.statistics import RunningMoments
from alignkit.models.bundle import ModelBundle
from alignkit.models.heads import VALUE
from alignkit.trainers.pooled import PooledWindow
from alignkit.trainers.ppo_callbacks import steps_per_rollout
from alignkit.trainers.ppo_config import PPOConfig

STATE_FILE = "ppo_state.json"
VALUE_FILE = "value_head.safetensors"


@dataclass(slots=True)
class PPOState:
    """The coefficient of the KL penalty, the statistics of rewards so far, and the open logging window."""

    kl_coef: float
    moments: RunningMoments = field(default_factory=RunningMoments)
    window: PooledWindow = field(default_factory=PooledWindow)

    def adapt_kl(self, kl: Tensor, target: float, horizon: int) -> None:
        """Move the coefficient by the KL of a rollout's episodes, `(N,)`, those of all processes."""
        self.kl_coef = adaptive_kl_coef(
            self.kl_coef, kl.mean().item(), target=target, horizon=horizon, episodes=len(kl)
        )

    def content(self, accelerator: Accelerator) -> dict[str, Any]:
        """Everything as JSON, the window's figures over all processes; every process calls this."""
        window = self.window.state_dict()
        names = sorted(window)
        if names:
            mine = [torch.tensor(window[name]["sums"], dtype=torch.float64) for name in names]
            pooled = cast(Tensor, accelerator.reduce(torch.cat(mine).to(accelerator.device), reduction="sum"))
            for name, sums in zip(names, pooled.split([len(part) for part in mine]), strict=True):
                window[name]["sums"] = sums.tolist()
        return {"kl_coef": self.kl_coef, "moments": self.moments.state_dict(), "window": window}

    def load(self, content: dict[str, Any], accelerator: Accelerator) -> None:
        """Set everything to what `content` returned; the window's figures go to the main process alone."""
        self.kl_coef = content["kl_coef"]
        self.moments.load_state_dict(content["moments"])
        window = content["window"]
        if not accelerator.is_main_process:  # zeros, because all processes must have the same names
            window = {name: saved | {"sums": [0.0] * len(saved["sums"])} for name, saved in window.items()}
        self.window.load_state_dict(window)


def gathered(values: Tensor) -> Tensor:
    """The values `(N,)` of all processes, in their order; N may differ among them."""
    return torch.tensor(gather_object(values.double().tolist()), dtype=torch.float64)


def pooled_moments(moments: Moments, accelerator: Accelerator) -> Moments:
    """The moments of the values of all processes together."""
    mine = torch.stack(moments).double().to(accelerator.device)[None]
    parts = cast(Tensor, accelerator.gather(mine))  # (W, 3)
    return Moments(*(value.float().cpu() for value in pool_moments(Moments(*parts.unbind(1)))))


def save_state(folder: Path, content: dict[str, Any], bundle: ModelBundle) -> None:
    """Write the state, and the value head, which PEFT does not know, into a checkpoint."""
    (folder / STATE_FILE).write_text(json.dumps(content))
    if VALUE in bundle.heads:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in _value_head(bundle).state_dict().items()}
        save_file(tensors, folder / VALUE_FILE)


def read_state(folder: Path, bundle: ModelBundle, args: PPOConfig) -> dict[str, Any]:
    """Read the state of a checkpoint, after looking the checkpoint over.

    Raises:
        CheckpointError: a checkpoint of another trainer, an incomplete one, or one from the middle of a rollout.
    """
    # Trainer itself would begin anew, without a word, with an optimizer or a schedule that it does not find.
    wanted = [STATE_FILE, TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME]
    wanted += [VALUE_FILE] if VALUE in bundle.heads else []
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} has no {', '.join(missing)}: it is not a whole checkpoint of PPOTrainer. Resume from another, "
            "or start anew from this one's adapter."
        )
    state, steps = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)), steps_per_rollout(args)
    if state.global_step % steps:
        raise CheckpointError(
            f"{folder} was made at step {state.global_step}, within a rollout of {steps} optimizer steps, whose "
            "episodes are gone. Resume from a checkpoint between rollouts, or start anew from this one's adapter."
        )
    return json.loads((folder / STATE_FILE).read_text())


def load_value_head(folder: Path, bundle: ModelBundle) -> None:
    """Set the value head, if there is one, to that of a checkpoint."""
    if VALUE in bundle.heads:
        _value_head(bundle).load_state_dict(load_file(folder / VALUE_FILE))


def _value_head(bundle: ModelBundle) -> nn.Module:
    return bundle.base.get_submodule(bundle.heads[VALUE])


def split_learning_rates(
    optimizer: torch.optim.Optimizer, critic: Iterable[nn.Parameter], value_learning_rate: float | None
) -> None:
    """Move the critic's own parameters into groups of their own learning rate; before a scheduler is made."""
    if value_learning_rate is None:
        return
    critic = set(critic)
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if parameter in critic]
        if own:
            group["params"] = [parameter for parameter in group["params"] if parameter not in critic]
            optimizer.add_param_group({**group, "params": own, "lr": value_learning_rate})
