"""What lies in a checkpoint, looked over before anything of it is loaded.

A manifest says that the files are those that its writer sealed. It does not say who that was: whoever sends a
checkpoint can seal it. So nothing in it is opened before it is seen that opening runs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from alignkit.data.plain_files import check_regular, read_json_object
from alignkit.errors import AlignkitError, CheckpointError
from alignkit.models.untrusted.configs import CONVERT
from alignkit.models.untrusted.folders import PICKLES
from alignkit.models.untrusted.tensors import read_header
from alignkit.models.untrusted.torch_files import check_torch_file

_STATES = (".pt", ".pth")  # optimizer, scheduler, scaler, random generators
# What Trainer computes with, or adds to, without a look at it.
_STATE_FIELDS: dict[str, Any] = {
    "epoch": int | float | None,
    "train_batch_size": int | None,
    "num_input_tokens_seen": int,
    "total_flos": int | float,
    "log_history": list,
    "best_metric": int | float | None,
}
_SHARDS = (".distcp", ".metadata")  # of torch.distributed.checkpoint, which unpickles them
_MAX_JSON_BYTES = 2**30  # the log of a long run; tokenizers


def check_weights(folder: Path) -> int:
    """Look over the weights of a checkpoint, and the state of its Trainer; return the step that it was made at.

    Raises:
        CheckpointError: links, malformed files, weights that are pickles or FSDP's shards, or a Trainer's state that is
            missing or none.
    """
    for path in _files(folder):
        check_regular(path, folder=folder, error=CheckpointError)
        if path.name.endswith(_SHARDS):
            raise CheckpointError(
                f"'{path}' is one of FSDP's shards, which are pickles and can run anything: they are not read. Resume "
                "from a checkpoint that was saved with fsdp_state_dict_type: FULL_STATE_DICT."
            )
        if path.suffix == ".safetensors":
            read_header(path, folder=folder, error=CheckpointError)
        elif path.suffix == ".json":
            read_json_object(path, folder=folder, max_bytes=_MAX_JSON_BYTES, error=CheckpointError)
    for path in _files(folder):  # Trainer and PEFT take pickled weights where they find no others
        if path.suffix in PICKLES and path.suffix not in _STATES and not any(path.parent.glob("*.safetensors")):
            raise CheckpointError(f"'{path.parent}' holds no safetensors but '{path.name}'. {CONVERT}")
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"'{folder}' holds no {TRAINER_STATE_NAME}, so it is no checkpoint. To begin with weights that lie there, "
            "give it as the model."
        )
    with as_checkpoint_errors(path):
        state = TrainerState.load_from_json(str(path))
        step = state.global_step
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"it was made at step {step!r}")
        for name, kind in _STATE_FIELDS.items():
            value = vars(state)[name]
            if not isinstance(value, kind):
                raise ValueError(f"its {name} is of the type {type(value).__name__}")
    return step


def check_contents(folder: Path) -> None:
    """Look over all of a checkpoint, its optimizer's and generators' states included.

    Raises:
        CheckpointError: as `check_weights`, or a state that is no archive of tensors and plain values.
    """
    check_weights(folder)
    for path in _files(folder):
        if path.suffix in _STATES:
            with safe_globals():  # numpy's generator, whose state is an array
                check_torch_file(path, folder=folder)


@contextlib.contextmanager
def as_checkpoint_errors(path: Path) -> Iterator[None]:
    """Turn what a library raises over a file's content into an error that names the file and what to do."""
    try:
        yield
    except (AlignkitError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines()
        raise CheckpointError(
            f"'{path}' does not fit this run: {lines[0] if lines else type(error).__name__}. Resume from another "
            "checkpoint, or start anew."
        ) from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
