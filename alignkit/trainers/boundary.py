"""The state of a run between two optimizer steps, kept so that an open step can be taken back.

Weights and optimizer move only in `optimizer.step()`. Everything else that a forward pass leaves behind (random
numbers, logging windows, sums of losses, counters) is small, so it is copied before every step: a step that is
interrupted, or tried again in smaller pieces, then leaves no trace.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Boundary:
    """What `take` copied.

    Attributes:
        random: states of the generators of Python, numpy, torch, and CUDA where it is used.
        running: registered states that change within a step.
        loss_sums: Trainer's sum of losses since the last log entry `()`, the sum before it, and that entry's step.
        state: Trainer's counters and log.
        flos: floating-point operations not yet in `state`.
    """

    random: tuple[Any, ...]
    running: dict[str, Any]
    loss_sums: tuple[Tensor, float, int]
    state: dict[str, Any]
    flos: float

    @classmethod
    def take(cls, trainer: Any) -> Boundary:
        """Copy the state of a trainer whose training has begun."""
        state = {**vars(trainer.state), "log_history": list(trainer.state.log_history)}
        return cls(
            random=random_states(),
            running=trainer.states.running(),
            loss_sums=(trainer._tr_loss.clone(), trainer._total_loss_scalar, trainer._globalstep_last_logged),
            state=state,
            flos=trainer.current_flos,
        )

    def restore(self, trainer: Any) -> None:
        """Put the copy back, and drop the gradients of the open step."""
        set_random_states(self.random)
        trainer.states.set_running(copy.deepcopy(self.running))
        loss, trainer._total_loss_scalar, trainer._globalstep_last_logged = self.loss_sums
        trainer._tr_loss.copy_(loss)  # Trainer's loop holds the tensor itself
        for name, value in self.state.items():
            setattr(trainer.state, name, list(value) if name == "log_history" else value)
        trainer.current_flos = self.flos
        trainer.model_wrapped.zero_grad(set_to_none=True)


def random_states() -> tuple[Any, ...]:
    """States of every global generator."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002 (Trainer saves it)


def set_random_states(states: tuple[Any, ...]) -> None:
    """Set what `random_states` returned."""
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
