"""What a PPO run carries from rollout to rollout besides adapters, and how it is saved and resumed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignkit.checkpoint.contents import as_checkpoint_errors
from alignkit.errors import CheckpointError
from alignkit.functional.kl import adaptive_kl_coef
from alignkit.functional.masked import Moments, pool_moments
from alignkit.functional.statistics import RunningMoments
from alignkit.models.bundle import ModelBundle
from alignkit.models.heads import VALUE
from alignkit.models.untrusted.tensors import read_header
from alignkit.trainers.pooled import PooledWindow
from alignkit.trainers.ppo_callbacks import steps_per_rollout
from alignkit.trainers.ppo_config import PPOConfig

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

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {
            "kl_coef": self.kl_coef,
            "moments": self.moments.state_dict(),
            "window": self.window.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set everything to what `state_dict` returned."""
        self.kl_coef = state_dict["kl_coef"]
        self.moments.load_state_dict(state_dict["moments"])
        self.window.load_state_dict(state_dict["window"])


def gathered(values: Tensor) -> Tensor:
    """The values `(N,)` of all processes, in their order; N may differ among them."""
    return torch.tensor(gather_object(values.double().tolist()), dtype=torch.float64)


def pooled_moments(moments: Moments, accelerator: Accelerator) -> Moments:
    """The moments of the values of all processes together."""
    mine = torch.stack(moments).double().to(accelerator.device)[None]
    parts = cast(Tensor, accelerator.gather(mine))  # (W, 3)
    return Moments(*(value.float().cpu() for value in pool_moments(Moments(*parts.unbind(1)))))


def save_value_head(folder: Path, bundle: ModelBundle) -> None:
    """Write the value head, which PEFT does not know, into a checkpoint."""
    if VALUE in bundle.heads:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in _value_head(bundle).state_dict().items()}
        save_file(tensors, folder / VALUE_FILE)


def check_between_rollouts(folder: Path, step: int, args: PPOConfig) -> None:
    """Check that a checkpoint does not come from the middle of a rollout.

    Raises:
        CheckpointError: it does.
    """
    steps = steps_per_rollout(args)
    if step % steps and not 0 < args.max_steps <= step:  # a run that has ended has nothing more to do
        raise CheckpointError(
            f"{folder} was made at step {step}, within a rollout of {steps} optimizer steps, whose episodes are gone. "
            "Resume from a checkpoint between rollouts, or start anew from this one's adapter."
        )


def check_critic(folder: Path, bundle: ModelBundle, *, has_adapter: bool) -> None:
    """Check that a checkpoint holds a critic of the kind that a run trains, if it trains one.

    Args:
        folder: the checkpoint.
        bundle: the run's roles.
        has_adapter: the run's critic has an adapter of its own.

    Raises:
        CheckpointError: none, or one that reads the hidden states of another adapter.
    """
    if VALUE not in bundle.heads:
        return
    if not (folder / VALUE_FILE).exists():
        raise CheckpointError(
            f"'{folder}' holds no critic ({VALUE_FILE}), and this run trains one. Leave resume_from_checkpoint out and "
            "give this path as the model, to begin with its adapter and a new critic."
        )
    if (folder / VALUE).is_dir() != has_adapter:
        raise CheckpointError(
            f"the critic in '{folder}' has {'no' if has_adapter else 'an'} adapter of its own: set "
            f"value_adapter={not has_adapter}, as that run had it."
        )


def load_value_head(folder: Path, bundle: ModelBundle) -> None:
    """Set the value head, if there is one, to that of a checkpoint."""
    if VALUE in bundle.heads:
        path = folder / VALUE_FILE
        with as_checkpoint_errors(path):
            read_header(path, error=CheckpointError)
            _value_head(bundle).load_state_dict(load_file(path))


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
