"""Plain files and JSON from strangers: where a name may lead, what kind of file it is, how big and deep it may be."""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from alignkit.errors import AlignkitError, DataError

MAX_JSON_BYTES = 64 * 2**20  # an index of 100,000 tensors has 10 MB
MAX_DEPTH = 64  # brackets within brackets; no config has ten

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe, and reading it would wait forever"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISCHR, "a character device"),
)
_NOT_BRACKETS = bytes(set(range(256)) - set(b'"[]{}'))
_STEPS = bytes({ord("["): 1, ord("{"): 1, ord("]"): 2, ord("}"): 2}.get(code, 0) for code in range(256))


def leaves_folder(name: str) -> bool:
    """Whether a file's name given inside another file is absolute, climbs with `..`, or is an address."""
    return (
        name.startswith(("/", "\\", "~"))
        or "\0" in name
        or "://" in name
        or bool(PureWindowsPath(name).drive)
        or ".." in (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    )


def check_regular(path: Path, *, folder: Path | None = None, error: type[AlignkitError] = DataError) -> int:
    """See that `path` is a plain file, inside `folder` where one is given, and return its size in bytes.

    Nothing is opened, so a pipe cannot block.

    Raises:
        error: something else lies there, nothing does, or a link leads out of the folder.
    """
    root = path.parent if folder is None else folder
    try:
        found = path.stat()
    except OSError as reason:
        if path.is_symlink():
            raise error(f"'{path}' is a link to nothing. Put the file itself in its place.") from reason
        raise error(f"'{path}' cannot be read: {reason.strerror}. Fetch it again.") from reason
    except ValueError as reason:  # a NUL in the name
        raise error(f"{str(path)!r} is no file name: {reason}") from reason
    for is_kind, what in _KINDS:
        if is_kind(found.st_mode):
            raise error(f"'{path}' is {what}, where a file is expected. Remove it, or fetch the folder again.")
    if os.path.islink(path) or path.parent != root:
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(allowed) for allowed in _allowed(root)):
            raise error(
                f"'{path}' is a link out of its folder, to '{real}': what a stranger's folder holds must lie in it. If "
                "you made the link, put a copy of the file in its place."
            )
    return found.st_size


def _allowed(folder: Path) -> Iterator[Path]:
    real = Path(os.path.realpath(folder))
    yield real
    # The Hub's cache keeps content in `blobs` and links to it from `snapshots/<commit>`, or from folders inside it.
    for parent in (real, *real.parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith(("models--", "datasets--")):
            yield parent.parent.parent / "blobs"


def read_bytes(
    path: Path, *, max_bytes: int = MAX_JSON_BYTES, folder: Path | None = None, error: type[AlignkitError] = DataError
) -> bytes:
    """Read a plain file of at most `max_bytes`.

    Raises:
        error: as `check_regular`, or the file is larger.
    """
    size = check_regular(path, folder=folder, error=error)
    if size > max_bytes:
        raise error(
            f"'{path}' has {size:,} bytes, and no such file needs more than {max_bytes:,}. Fetch it again, or "
            "ask where it came from."
        )
    try:
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except OSError as reason:
        raise error(f"'{path}' cannot be read: {reason.strerror}. Check its rights.") from reason


def read_json_object(
    path: Path,
    *,
    max_bytes: int = MAX_JSON_BYTES,
    folder: Path | None = None,
    finite: bool = False,
    error: type[AlignkitError] = DataError,
) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    A key that is given twice keeps its last value, as every reader here takes it. NaN and Infinity, which are no JSON
    but which configs of Mamba hold, are taken unless `finite` is set.

    Args:
        path: the file.
        max_bytes: of the file.
        folder: where a link may lead; by default the file's own.
        finite: refuse NaN and infinities.
        error: what to raise.

    Raises:
        error: no such file, too large, not UTF-8, nested deeper than `MAX_DEPTH`, not JSON, or no object.
    """
    raw = read_bytes(path, max_bytes=max_bytes, folder=folder, error=error)
    if not raw.strip():
        raise error(f"'{path}' is empty. Fetch it again, or save it anew.")
    depth = nesting_depth(raw)
    if depth > MAX_DEPTH:
        raise error(
            f"'{path}' nests {depth:,} deep, and no such file nests more than {MAX_DEPTH}: it is made to overwhelm its "
            "reader. Do not use what came with it."
        )
    try:
        content = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant if finite else None)
    except UnicodeDecodeError as reason:
        raise error(f"'{path}' is not UTF-8 ({reason}). Save it as UTF-8, or fetch it again.") from reason
    except (ValueError, RecursionError) as reason:
        raise error(f"'{path}' is not JSON that can be read ({reason}). Fetch it again, or save it anew.") from reason
    if not isinstance(content, dict):
        raise error(f"'{path}' holds a {type(content).__name__}, where a JSON object is expected. Fetch it again.")
    return content


def nesting_depth(raw: bytes) -> int:
    """Count the deepest brackets within brackets of a JSON text; what stands in strings does not count.

    Done without recursion and before any parser sees it, in time proportional to the bytes.
    """
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_BRACKETS)
    bare = re.sub(rb'"[^"]*"?', b"", bare).translate(_STEPS)
    return max(itertools.accumulate(1 if step == 1 else -1 for step in bare), default=0)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no number that a setting can have")
