"""One process at a time writes into an output directory, into one that it may write to, whatever the clock says."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignkit.checkpoint.find import newest_verified
from tests.crash.cases import verified
from tests.crash.compare import differences
from tests.crash.nursery import ALONE, ROOT, Nursery
from tests.crash.runs import SAVED

OLD, NEW = (f"checkpoint-{step}" for step in SAVED)
NOBODY = 65534

# Trains until it is killed: a callback waits for ever after the first checkpoint.
HOLDER = """
import sys, time
from pathlib import Path
from transformers import TrainerCallback
from tests.crash.runs import RUNS

class Wait(TrainerCallback):
    def on_save(self, *args, **kwargs):
        print("saved", flush=True)
        time.sleep(600)

trainer = RUNS["reward"](Path(sys.argv[1]))
trainer.add_callback(Wait())
trainer.train()
"""


@contextlib.contextmanager
def holder(output: Path) -> Iterator[subprocess.Popen]:
    """A process that trains into `output`, and has saved once."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(output)],
        cwd=ROOT,
        env={**os.environ, **ALONE},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert any(line == "saved\n" for line in process.stdout)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_directory_in_use_is_refused_until_its_process_dies(nursery: Nursery, tmp_path: Path):
    output, whole = tmp_path / "output", tmp_path / "whole"
    assert nursery.run("reward", whole).error == ""
    with holder(output) as process:
        for resume in (None, "auto", str(output / OLD)):
            refused = nursery.run("reward", output, resume=resume)
            assert refused.error == "CheckpointError", refused.said
            assert re.search(rf"{output} is in use by process {process.pid}\b", refused.message)
            assert [change for change in refused.changes if ".alignkit" not in change.path] == []
        assert [path.name for path in verified(output)] == [OLD]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert nursery.run("reward", output, resume="auto").error == ""
    assert differences(output, whole) == []


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users can reach."""
    folder = Path(tempfile.mkdtemp(prefix="alignkit-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def test_a_read_only_directory_is_refused_before_training(nursery: Nursery, shared_folder: Path):
    user = NOBODY if os.geteuid() == 0 else None  # root may write anywhere
    for output in (shared_folder / "given", shared_folder / "absent" / "run"):
        output.parent.mkdir(exist_ok=True)
        if output.name == "given":
            output.mkdir()
        shared_folder.chmod(0o555)
        for folder in (output, output.parent):
            if folder.exists():
                folder.chmod(0o555)
        outcome = nursery.run("reward", output, user=user)
        for folder in (shared_folder, output.parent):
            folder.chmod(0o755)
        assert outcome.error == "CheckpointError", outcome.said
        assert f"nothing can be written into {output} (Permission denied)" in outcome.message
        assert "choose another output_dir" in outcome.message
        assert outcome.changes == []


def test_a_checkpoint_on_a_read_only_directory_can_be_read(nursery: Nursery, shared_folder: Path, tmp_path: Path):
    """A run elsewhere goes on from a folder that nobody may write to."""
    user = NOBODY if os.geteuid() == 0 else None
    if user is not None and not all(folder.stat().st_mode & 0o001 for folder in Path(sys.prefix).resolve().parents):
        pytest.skip(f"another user cannot import what lies in {sys.prefix}")
    given, output, whole = shared_folder / "given", shared_folder / "output", tmp_path / "whole"
    assert nursery.run("reward", whole).error == ""
    assert nursery.run("reward", given, save_total_limit=2).error == ""
    for path in [given, *given.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    output.mkdir()
    output.chmod(0o777)
    outcome = nursery.run("reward", output, resume=str(given / OLD), user=user)
    given.chmod(0o755)
    for path in given.rglob("*"):
        path.chmod(0o755)
    assert outcome.error == "", outcome.said
    assert differences(output / NEW, whole / NEW) == []


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_a_clock_that_jumps_back_changes_nothing(nursery: Nursery, tmp_path: Path, name: str):
    """The newest checkpoint is the one that was saved last, not the one with the latest date."""
    output, whole = tmp_path / "output", tmp_path / "whole"
    assert nursery.run(name, whole, save_total_limit=2).error == ""
    later = 10 * 365 * 86400
    first = nursery.run(name, output, clock=later, save_total_limit=2)
    assert first.error == "", first.said
    for path in [output / OLD, *(output / OLD).rglob("*")]:  # the older one looks newer
        os.utime(path, (time.time() + later, time.time() + later))
    for path in [output / NEW, *(output / NEW).rglob("*")]:
        os.utime(path, (1, 1))
    assert newest_verified(output).folder == output / NEW
    again = nursery.run(name, output, resume=True, save_total_limit=2, clock=-later)
    assert again.error == "", again.said
    assert differences(output, whole) == []
    shutil.rmtree(output / NEW)
    resumed = nursery.run(name, output, resume="auto", save_total_limit=2, clock=-later)
    assert resumed.error == "", resumed.said
    assert differences(output, whole) == []
