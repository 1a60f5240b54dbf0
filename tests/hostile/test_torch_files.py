"""PyTorch's files of a checkpoint from strangers: what `read_torch` takes, and what it refuses."""

from __future__ import annotations

import io
import os
import random
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import safe_globals as trainers_globals

from alignkit.models.untrusted.torch_files import check_torch_file, read_torch
from tests.hostile.harness import (
    attempt,
    bare_pickle,
    hostile_archive,
    refuse,
    sparse,
    torch_archive,
)

pytestmark = pytest.mark.timeout(60)
NAMES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin")


def written(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def with_entry(name: str, content: bytes = b"") -> bytes:
    made = io.BytesIO(torch_archive())
    with zipfile.ZipFile(made, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile knows that a name is there already
        archive.writestr(name, content)
    return made.getvalue()


def longer_entry() -> bytes:
    """An archive whose table says that an entry has two gigabytes."""
    raw = bytearray(torch_archive())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 20 : at + 28] = struct.pack("<II", 2**31 - 1, 2**31 - 1)
    return bytes(raw)


def larger_storage() -> bytes:
    """A tensor that says it has more numbers than its storage."""
    made = io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, made)
    with zipfile.ZipFile(made) as archive:
        raw = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    more = b"J" + (10**8).to_bytes(4, "little")
    place = raw.index(b"K\x04", raw.index(b"cpu"))
    raw = raw[:place] + more + raw[place + 2 :]
    place = raw.index(b"K\x04", place)
    return torch_archive(raw[:place] + more + raw[place + 2 :])


class Global:
    """Pickles to a function that torch does not know; nothing would be called."""

    def __reduce__(self):
        return os.path.join, ("a", "b")


def named(value: object) -> bytes:
    made = io.BytesIO()
    torch.save(value, made)
    return made.getvalue()


REFUSED = {
    "bare pickle": (written(bare_pickle()), "is not an archive of torch.save but a bare pickle"),
    "pickle in an archive": (written(hostile_archive()), r"names posix\.mkdir: reading it would run code"),
    "pickle in a made archive": (written(torch_archive(bare_pickle())), r"names posix\.mkdir"),
    "harmless function": (written(named(Global())), r"names posixpath\.join"),
    "zip bomb": (
        written(torch_archive(compression=zipfile.ZIP_DEFLATED, bomb=bytes(50_000_000))),
        r"holds a packed or encrypted entry",
    ),
    "entry of two gigabytes in a few bytes": (written(longer_entry()), r"more than its|damaged|table of contents"),
    "storage larger than its bytes": (written(larger_storage()), r"cannot be read: .*record size"),
    "entry with ..": (written(with_entry("archive/../../evil")), r"leads elsewhere, 'archive/\.\./\.\./evil'"),
    "entry in /etc": (written(with_entry("/etc/evil")), r"leads elsewhere, '/etc/evil'"),
    "entry twice": (written(with_entry("archive/data.pkl", bare_pickle())), r"entries, \d+ of them different"),
    "program of TorchScript": (written(with_entry("archive/constants.pkl", bare_pickle())), r"cannot be read"),
    "pickle in a foreign zip": (written(with_entry("../data.pkl", bare_pickle())), r"leads elsewhere"),
    "torn in the middle": (lambda path: path.write_bytes(torch_archive()[:400]) and None, r"torn"),
    "empty": (written(b""), r"empty or torn"),
    "text": (written(b"hello"), r"bare pickle, empty or torn"),
    "zeros, 8 TB": (lambda path: sparse(path, 2**43), r"bare pickle, empty or torn"),
    "pipe": (os.mkfifo, r"is a pipe, and reading it would wait forever"),
    "folder": (os.mkdir, r"is a folder"),
    "link out": (lambda path: path.symlink_to("/etc/passwd"), r"is a link out of its folder, to '/etc/passwd'"),
    "device": (lambda path: path.symlink_to("/dev/zero"), r"is a character device"),
    "missing": (lambda path: None, r"cannot be read: No such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_file_is_refused(name: str, tmp_path: Path):
    make, message = REFUSED[name]
    path = tmp_path / "optimizer.pt"
    make(path)
    text = refuse(lambda: read_torch(path))
    assert re.search(message, text), text
    assert "optimizer.pt" in text
    assert "Resume from another checkpoint" in text or "Fetch" in text or "fetch" in text or "put a copy" in text


@pytest.mark.parametrize("file", NAMES)
def test_every_name_is_treated_alike(file: str, tmp_path: Path):
    (tmp_path / file).write_bytes(hostile_archive())
    assert file in refuse(lambda: read_torch(tmp_path / file))


def test_looking_over_a_file_runs_nothing(tmp_path: Path):
    for number, content in enumerate((bare_pickle(), hostile_archive(), torch_archive(bare_pickle()))):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(content)
        refuse(lambda path=path: check_torch_file(path))


def test_what_a_trainer_writes_is_read(tmp_path: Path):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    for name, value in (
        ("optimizer.pt", optimizer.state_dict()),
        ("scheduler.pt", scheduler.state_dict()),
        ("state.pt", OrderedDict(a=torch.ones(2, dtype=torch.bfloat16), b=[1, "two", None, 3.0])),
    ):
        torch.save(value, tmp_path / name)
        found = read_torch(tmp_path / name)
        assert repr(found) == repr(torch.load(tmp_path / name))


def test_random_states_are_read_with_the_trainers_own_list(tmp_path: Path):
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}  # noqa: NPY002 - what Trainer saves
    torch.save(states, tmp_path / "rng_state.pth")
    with trainers_globals():
        found = read_torch(tmp_path / "rng_state.pth")
    assert found["python"] == states["python"]
    np.testing.assert_array_equal(found["numpy"][1], states["numpy"][1])
    assert torch.equal(found["cpu"], states["cpu"])


def test_flipped_bits_never_run_anything_and_never_escape_as_another_error(tmp_path: Path):
    from alignkit.errors import CheckpointError

    path, generator = tmp_path / "optimizer.pt", random.Random(5)
    for content in (torch_archive(), hostile_archive()):
        for _ in range(150):
            raw = bytearray(content)
            raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
            path.write_bytes(raw)
            raised = attempt(lambda: read_torch(path))
            assert raised is None or isinstance(raised, CheckpointError), repr(raised)
