"""The registry of everything that has state besides weights, optimizer, schedule and random numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alignkit.data.reasons import shown
from alignkit.errors import CheckpointError

_TENSOR = "$tensor"
_HEADER = "states"


@runtime_checkable
class Stateful(Protocol):
    """What can be saved and set again: torch's protocol.

    `state_dict` returns copies: mappings with text keys, lists, text, numbers, booleans, `None` and tensors.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return everything that has to survive."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Set everything to what `state_dict` returned."""
        ...


class States:
    """Stateful objects by name. A checkpoint holds them all, and a resume sets them all."""

    def __init__(self) -> None:
        self._objects: dict[str, Stateful] = {}
        self._running: set[str] = set()
        self._left_out: list[object] = []

    def register(self, name: str, stateful: Stateful) -> None:
        """Add an object whose state changes between optimizer steps.

        Raises:
            CheckpointError: it has only one half of the protocol, or the name is taken by another object.
        """
        if not isinstance(stateful, Stateful):
            raise CheckpointError(
                f"{name} ({type(stateful).__name__}) cannot be saved: give it state_dict() and load_state_dict()"
            )
        if self._objects.get(name, stateful) is not stateful:
            raise CheckpointError(f"two objects want to be saved as '{name}': give one of them another name")
        self._objects[name] = stateful

    def register_running(self, name: str, stateful: Stateful) -> None:
        """Add an object whose state changes within an optimizer step too, such as a logging window."""
        self.register(name, stateful)
        self._running.add(name)

    def replace_running(self, name: str, stateful: Stateful) -> None:
        """As `register_running`, in the place of what had the name before."""
        self._objects.pop(name, None)
        self.register_running(name, stateful)

    def leave_out(self, stateful: object) -> None:
        """Say that an object's state need not survive: nothing that is trained on depends on it."""
        self._left_out.append(stateful)

    def knows(self, stateful: object) -> bool:
        """Whether an object is registered or left out."""
        return any(known is stateful for known in (*self._objects.values(), *self._left_out))

    def state_dict(self) -> dict[str, Any]:
        """States of all objects, by name."""
        return {name: stateful.state_dict() for name, stateful in self._objects.items()}

    def running(self) -> dict[str, Any]:
        """States of the objects that change within an optimizer step, by name."""
        return {name: self._objects[name].state_dict() for name in self._objects if name in self._running}

    def set_running(self, states: Mapping[str, Any]) -> None:
        """Set what `running` returned."""
        for name, state in states.items():
            self._objects[name].load_state_dict(state)

    def load_state_dict(self, states: Mapping[str, Any], source: str = "the checkpoint") -> None:
        """Set all objects.

        Raises:
            CheckpointError: the states are not of the objects that are registered here.
        """
        lost, unknown = sorted(self._objects.keys() - states.keys()), sorted(states.keys() - self._objects.keys())
        if lost or unknown:
            parts = [f"holds no state of {', '.join(lost)}"] if lost else []
            parts += [f"holds the state of {', '.join(unknown)}, which this run does not have"] if unknown else []
            raise CheckpointError(
                f"{source} {' and '.join(parts)}: build the trainer as it was, or set weights_only_resume=True"
            )
        for name, state in states.items():
            try:
                self._objects[name].load_state_dict(state)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(f"{source} holds a state of {name} that does not fit: {error}") from error


def write_states(path: Path, states: Mapping[str, Any]) -> None:
    """Write states to one safetensors file: tensors as such, everything else as JSON in its header."""
    tensors: dict[str, Tensor] = {}
    try:
        header = json.dumps(_without_tensors(states, tensors, ""))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"a state cannot be saved: {error}") from error
    save_file(tensors, path, metadata={_HEADER: header})


def read_states(path: Path) -> dict[str, Any]:
    """Read what `write_states` wrote.

    Raises:
        CheckpointError: there is no such file, or it is another one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            states = _with_tensors(json.loads((file.metadata() or {})[_HEADER]), tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds no states that can be read: {shown(str(error))}") from error
    if not isinstance(states, dict):
        raise CheckpointError(f"{path} holds no states: its header is a {type(states).__name__}")
    return states


def _without_tensors(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{path or 'a state'} has the key {key!r}, which is no text")
        return {key: _without_tensors(item, tensors, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    return [_with_tensors(item, tensors) for item in value] if isinstance(value, list) else value
