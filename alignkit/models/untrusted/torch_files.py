"""PyTorch's own files in checkpoints (optimizer, scheduler, random generators): tensors and plain values, never code.

`torch.save` writes a zip archive of stored entries with one pickle in it. Its plain values and tensors are read by
`torch.load(weights_only=True)`, which runs nothing; that the archive is one that `torch.save` writes is checked first.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from alignkit.data.plain_files import check_regular, leaves_folder
from alignkit.errors import AlignkitError, CheckpointError

_MAX_PICKLE_BYTES = 256 * 2**20  # the table of contents of an archive; tensors lie beside it
_MAX_ENTRIES = 1_000_000
_REMEDY = "Resume from another checkpoint, or start anew from this one's weights, which are safetensors."


def read_torch(
    path: Path,
    *,
    folder: Path | None = None,
    map_location: str | torch.device = "cpu",
    allowed: Sequence[Any] = (),
    error: type[AlignkitError] = CheckpointError,
) -> Any:
    """Load what `torch.save` wrote, if it is tensors and plain values.

    Args:
        path: the file.
        folder: where a link may lead; by default the file's own.
        map_location: where tensors go.
        allowed: classes and functions, beyond torch's own list, that the file may name.
        error: what to raise.

    Raises:
        error: it is something else, is damaged, or names anything that torch would have to run.
    """
    check_torch_file(path, folder=folder, allowed=allowed, error=error)
    try:
        with safe_globals(list(allowed)):
            return torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, OSError, EOFError) as reason:
        raise error(f"'{path}' cannot be read: {_first_line(reason)}. {_REMEDY}") from reason


def check_torch_file(
    path: Path,
    *,
    folder: Path | None = None,
    allowed: Sequence[Any] = (),
    error: type[AlignkitError] = CheckpointError,
) -> None:
    """See that a file is one that `torch.save` writes, and that reading it would run nothing. Nothing is run here.

    Raises:
        error: it is a bare pickle, damaged, compressed (a few bytes that become many), or it names code.
    """
    size = check_regular(path, folder=folder, error=error)
    if not zipfile.is_zipfile(path):
        raise error(
            f"'{path}' is not an archive of torch.save but a bare pickle, empty or torn, and pickles can run anything: "
            f"it is not opened. {_REMEDY}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(path, archive.infolist(), size, error)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as reason:
        raise error(f"'{path}' is damaged: {_first_line(reason)}. {_REMEDY}") from reason
    try:
        with safe_globals(list(allowed)):
            named = get_unsafe_globals_in_checkpoint(str(path))
    except Exception as reason:  # torch's reader of hostile bytes raises whatever it trips over
        raise error(f"'{path}' cannot be read: {_first_line(reason)}. {_REMEDY}") from reason
    if named:
        raise error(
            f"'{path}' names {', '.join(sorted(named)[:4])}: reading it would run code, so it is not read. No trainer "
            f"of alignkit writes such a file. {_REMEDY}"
        )


def _check_entries(path: Path, entries: list[zipfile.ZipInfo], size: int, error: type[AlignkitError]) -> None:
    names = [entry.filename for entry in entries]
    if len(entries) > _MAX_ENTRIES or len(set(names)) != len(names):
        raise error(f"'{path}' has {len(names):,} entries, {len(set(names)):,} of them different. {_REMEDY}")
    for entry in entries:
        if leaves_folder(entry.filename):
            raise error(f"'{path}' holds an entry that leads elsewhere, {entry.filename!r}. {_REMEDY}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise error(
                f"'{path}' holds a packed or encrypted entry, {entry.filename!r} ({entry.compress_size:,} bytes that "
                f"become {entry.file_size:,}), and torch.save writes none. {_REMEDY}"
            )
        if entry.filename.endswith(".pkl") and entry.file_size > _MAX_PICKLE_BYTES:
            raise error(f"'{path}' has a table of contents of {entry.file_size:,} bytes. {_REMEDY}")
    if sum(entry.file_size for entry in entries) > size:
        raise error(f"'{path}' says that it holds more than its {size:,} bytes. {_REMEDY}")


def _first_line(reason: BaseException) -> str:
    lines = str(reason).strip().splitlines()
    return lines[0].rstrip(".")[:300] if lines else type(reason).__name__
