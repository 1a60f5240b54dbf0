"""An attack is a hostile file and a loader: what came of it, and that nothing else did.

Every hostile pickle makes one marker file when it is run. `attempt` runs a loader and then looks: no marker, nothing
written beside the folder under attack, no more seconds than a refusal takes, and an error of alignkit's own whose text
a terminal can be shown.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from alignkit.errors import AlignkitError

LONGEST_SECONDS = 10.0
MARKER = Path(os.environ.get("TMPDIR", "/tmp")) / f"alignkit-hostile-marker-{os.getpid()}"


class Run:
    """Pickles to a call that makes the marker."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(MARKER),)


class Attack(NamedTuple):
    """What is done to a copy of a good folder, what then loads it, and how the refusal reads (a regular expression).

    `message` is None where the file is let lie: then loading must succeed.
    """

    spoil: Callable[[Path], Any]
    message: str | None


def bare_pickle() -> bytes:
    """A pickle that makes the marker."""
    return pickle.dumps(Run(), protocol=2)


def torch_archive(data: bytes | None = None, *, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """An archive as `torch.save` writes it, with another pickle inside."""
    good = io.BytesIO()
    torch.save({"weight": torch.zeros(4)}, good)
    made = io.BytesIO()
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(made, "w", compression) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, data if data is not None and entry.filename.endswith("data.pkl") else content)
        for name, content in more.items():
            new.writestr(name, content)
    return made.getvalue()


def hostile_archive() -> bytes:
    """What `torch.load(weights_only=False)` would run."""
    made = io.BytesIO()
    torch.save(Run(), made)
    return made.getvalue()


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file of any header, true or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(shape: list[Any], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def sparse(path: Path, size: int) -> None:
    """A file that says it is large and takes nothing."""
    with path.open("wb") as file:
        file.truncate(size)


def edit(path: Path, **changes: Any) -> None:
    """Change settings of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def deep(depth: int = 100_000) -> str:
    """Brackets within brackets."""
    return '{"a":' + "[" * depth + "]" * depth + "}"


def replaced(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Write `content` to file `name` of a folder."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change settings of file `name` of a folder."""
    return lambda folder: edit(folder / name, **changes)


def linked(name: str, target: str | Path) -> Callable[[Path], None]:
    """Put a link in the place of file `name` of a folder."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def made_pipe(name: str) -> Callable[[Path], None]:
    """Put a pipe, which nobody writes to, in the place of file `name`."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def made_folder(name: str) -> Callable[[Path], None]:
    """Put a folder in the place of file `name`."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return spoil


def attempt(load: Callable[[], Any]) -> BaseException | None:
    """Run a loader, and return what it raised; fail where anything ran, was written here, or took long."""
    assert not MARKER.exists()
    raised: BaseException | None = None
    # An empty folder of its own: into the one that tests run in, another process may be writing.
    with tempfile.TemporaryDirectory() as here, pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        began = time.monotonic()
        try:
            load()
        except Exception as error:  # noqa: BLE001 - which one it was is for the caller to judge
            raised = error
        seconds = time.monotonic() - began
        written = os.listdir(here)
    ran = MARKER.exists()
    if ran:
        MARKER.rmdir()
    assert not ran, "a pickle was run"
    assert written == [], "something was written to the working directory"
    assert seconds < LONGEST_SECONDS, f"took {seconds:.1f} s"
    return raised


def refuse(load: Callable[[], Any]) -> str:
    """Run a loader that must refuse, and return the text of the refusal."""
    raised = attempt(load)
    assert isinstance(raised, AlignkitError), f"not refused: {raised!r}"
    text = str(raised)
    assert text.replace("\n", "").isprintable(), repr(text)
    return text


def copy_of(folder: Path, target: Path) -> Path:
    """Copy a good folder, to be spoiled."""
    return shutil.copytree(folder, target)
