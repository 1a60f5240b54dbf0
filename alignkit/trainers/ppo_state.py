"""What a PPO run carries from rollout to rollout besides weights, and how it is saved and resumed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from alignkit.errors import CheckpointError
from alignkit.functional.statistics import RunningMoments
from alignkit.models.bundle import ModelBundle
from alignkit.models.heads import VALUE
from alignkit.trainers.ppo_config import PPOConfig

STATE_FILE = "ppo_state.json"
VALUE_FILE = "value_head.safetensors"


@dataclass(slots=True)
class PPOState:
    """The coefficient of the KL penalty, and the statistics of rewards so far."""

    kl_coef: float
    moments: RunningMoments


def save_state(folder: Path, state: PPOState, bundle: ModelBundle) -> None:
    """Write the state, and the value head, which PEFT does not know, into a checkpoint."""
    content = {"kl_coef": state.kl_coef, "moments": state.moments.state_dict()}
    (folder / STATE_FILE).write_text(json.dumps(content))
    if VALUE in bundle.heads:
        head = bundle.base.get_submodule(bundle.heads[VALUE])
        save_file({name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}, folder / VALUE_FILE)


def load_state(folder: Path, state: PPOState, bundle: ModelBundle) -> None:
    """Set the state and the value head to those of a checkpoint.

    Raises:
        CheckpointError: a checkpoint of another trainer, or an incomplete one.
    """
    wanted = [STATE_FILE, *([VALUE_FILE] if VALUE in bundle.heads else [])]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} has no {', '.join(missing)}: it is not a whole checkpoint of PPOTrainer. Resume from another."
        )
    content = json.loads((folder / STATE_FILE).read_text())
    state.kl_coef = content["kl_coef"]
    state.moments.load_state_dict(content["moments"])
    if VALUE in bundle.heads:
        bundle.base.get_submodule(bundle.heads[VALUE]).load_state_dict(load_file(folder / VALUE_FILE))


def split_learning_rates(optimizer: torch.optim.Optimizer, bundle: ModelBundle, args: PPOConfig) -> None:
    """Move the critic's own parameters into groups of `value_learning_rate`; before a scheduler is made."""
    rate = args.value_learning_rate
    if rate is None or VALUE not in bundle.heads:
        return
    critic = set(bundle.base.get_submodule(bundle.heads[VALUE]).parameters())
    if args.value_adapter:
        critic |= {parameter for name, parameter in bundle.model.named_parameters() if f".{VALUE}." in name}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if parameter in critic]
        if own:
            group["params"] = [parameter for parameter in group["params"] if parameter not in critic]
            optimizer.add_param_group({**group, "params": own, "lr": rate})
