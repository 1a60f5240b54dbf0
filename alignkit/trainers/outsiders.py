"""Objects that a user hands to a trainer, and whose state a checkpoint would lose: callbacks, reward functions.

What follows torch's protocol (`state_dict`, `load_state_dict`) is registered and saved. Of anything else nobody can
tell from outside whether it has state that matters; but what changes while it is used has state. A reward that
changes is refused, because it makes the numbers that are trained on; a callback that changes is told of.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import types
from collections import deque
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from torch import Tensor, nn

from alignkit.checkpoint.states import Stateful, States
from alignkit.errors import CheckpointError
from alignkit.rollout.callables import CallableReward

logger = logging.getLogger(__name__)

_MOST_ITEMS = 100_000  # of one attribute; a list that is longer is judged by its length


def owner_of(function: Any) -> Any:
    """The object behind a callable: of a bound method the object, of a partial what it calls; `None` of a function."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, types.MethodType):
        return function.__self__
    plain = types.FunctionType, types.BuiltinFunctionType, type, nn.Module
    return None if isinstance(function, plain) else function


def behind_rewards(sources: Sequence[Any]) -> dict[str, Any]:
    """The objects behind reward functions, by name; a plain function has none."""
    named = {f"reward/{source.names[0]}": source for source in sources if isinstance(source, CallableReward)}
    owners = {name: owner_of(source.function) for name, source in named.items()}
    return {name: owner for name, owner in owners.items() if owner is not None}


class Outsiders:
    """Looks after the objects of one training.

    Args:
        states: where those with state are registered.
        rewards: what makes rewards, by name.
        callbacks: what only hears of training, by name.
    """

    def __init__(self, states: States, rewards: Mapping[str, Any], callbacks: Mapping[str, Any]) -> None:
        for name, each in rewards.items():
            if isinstance(each, Stateful) and not states.knows(each):
                states.register_running(name, each)
        self.states, self.rewards = states, set(rewards)
        watched = {**rewards, **callbacks}
        self._seen = {name: (each, _attributes(each)) for name, each in watched.items() if not states.knows(each)}

    def check(self) -> None:
        """Look at what has changed since the beginning.

        Raises:
            CheckpointError: a reward did.
        """
        for name, (each, before) in list(self._seen.items()):
            now = _attributes(each)
            changed = [key for key in now if now[key] != before.get(key)]
            if not changed or self.states.knows(each):
                continue
            del self._seen[name]
            sentence = (
                f"{name} changes its {', '.join(map(repr, changed))} while it is used, and checkpoints would not hold "
                "that: give it state_dict() and load_state_dict()"
            )
            if name in self.rewards:
                raise CheckpointError(
                    f"{sentence}. If its results do not depend on it, say so with trainer.states.leave_out(it); or set "
                    "save_strategy='no'."
                )
            logger.warning("%s, or it begins anew when the run is resumed.", sentence)


def _attributes(each: Any) -> dict[str, str]:
    """A hash of every attribute that is data."""
    try:
        attributes = vars(each)
    except TypeError:  # it has slots, or nothing
        return {}
    return {name: hashlib.sha256(_data(value).encode()).hexdigest() for name, value in attributes.items()}


def _data(value: Any, depth: int = 4) -> str:
    """Data as text that is equal for equal data; of another object only what it is."""
    if value is None or isinstance(value, bool | int | float | complex | bytes):
        return repr(value)
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype} {value.double().sum().item() if value.numel() else 0}"
    if isinstance(value, np.ndarray | np.generic):
        return f"array {np.shape(value)} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    if isinstance(value, Mapping | Sequence | Set | deque) and depth:
        if len(value) > _MOST_ITEMS:
            return f"{type(value).__name__} of {len(value)}"
        if isinstance(value, Mapping):
            return str([(_data(key, depth - 1), _data(item, depth - 1)) for key, item in value.items()])
        items = [_data(item, depth - 1) for item in value]
        return str(sorted(items) if isinstance(value, Set) else items)
    return type(value).__name__
