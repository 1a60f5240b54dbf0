"""A process that has everything ready and lets children train: `python -m tests.crash.nursery LIBRARY`.

It reads one JSON object per line, forks a child that does what the object says, waits for it, and answers with one
line. It never runs more than one torch thread, without which a fork would hang.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tests.crash.shim import WATCH, Change, Plan, read_log

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60  # seconds that a child may take
ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


class Outcome(NamedTuple):
    """How a child ended.

    Attributes:
        signal: what killed it, or 0.
        error: the name of the exception's class that came out of it, or "".
        message: the exception's text.
        seconds: how long it ran.
        changes: what it changed on disk.
        said: what it wrote to the terminal.
    """

    signal: int
    error: str
    message: str
    seconds: float
    changes: list[Change]
    said: str


class Nursery:
    """The other end: starts the process, hands it tasks. Use it in a `with` statement."""

    def __init__(self, library: Path, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.nursery", str(library)],
            cwd=ROOT,
            env={**os.environ, **ALONE, "LD_PRELOAD": str(library)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate()  # closes its input, which ends it

    def run(
        self,
        name: str,
        output: Path,
        *,
        resume: str | bool | None = None,
        plan: Plan = WATCH,
        user: int | None = None,
        clock: int = 0,
        **options: Any,
    ) -> Outcome:
        """Train in a child of its own.

        Args:
            name: which of `tests.crash.runs.RUNS`.
            output: the run's folder, which is watched.
            resume: `train`'s argument.
            plan: what happens at which change.
            user: the id of the user to become; by default, who starts the test.
            clock: seconds to set the child's clock forward.
            **options: of the run.
        """
        log, said = self._folder / "changes.log", self._folder / "said.txt"
        task = {
            "name": name,
            "output": str(output),
            "log": str(log),
            "said": str(said),
            "resume": resume,
            "plan": plan,
            "user": user,
            "clock": clock,
            "options": options,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the nursery died: {self._process.wait()}")
        found = json.loads(answer)
        text = said.read_text(encoding="utf-8", errors="replace")
        return Outcome(**found, changes=read_log(log), said=text)


def train(task: dict[str, Any], library: Path) -> None:
    """What a child does."""
    from tests.crash.runs import RUNS
    from tests.crash.shim import watch

    shim = watch(library, Path(task["output"]), Path(task["log"]), Plan(*task["plan"]))
    shim.crash_shift_clock(task["clock"])
    if task["user"] is not None:
        os.setresuid(*[task["user"]] * 3)
    RUNS[task["name"]](Path(task["output"]), **task["options"]).train(task["resume"])


def child(task: dict[str, Any], library: Path, answer: int) -> None:
    """Run `train` with its output in a file; tell through the pipe `answer` what came out of it. Never returns."""
    terminal = os.open(task["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    try:
        train(task, library)
        result = {"error": "", "message": ""}
    except BaseException as error:  # noqa: BLE001 - the test wants to know, whatever it is
        traceback.print_exc()
        result = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(answer, json.dumps(result).encode())
    os._exit(0)


def wait(pid: int) -> int:
    """Wait for a child, at most `PATIENCE` seconds, and return the signal that killed it, or 0."""
    end = time.monotonic() + PATIENCE
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if time.monotonic() > end:
            os.kill(pid, signal.SIGALRM)
            end += PATIENCE
        time.sleep(0.005)


def serve(library: Path) -> None:
    """Answer tasks until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    import tempfile

    from tests.crash.runs import RUNS

    warm = set()
    for line in sys.stdin:
        task = json.loads(line)
        if task["name"] not in warm:  # imports, caches: a child inherits them
            with tempfile.TemporaryDirectory() as folder:
                for resume in (None, True):
                    RUNS[task["name"]](Path(folder)).train(resume)
            warm.add(task["name"])
            gc.collect()
            gc.freeze()  # a child's collections need not go through, and so copy, all that is here
        started, (result, answer) = time.monotonic(), os.pipe()
        pid = os.fork()
        if not pid:
            child(task, library, answer)
        os.close(answer)
        killed = wait(pid)
        with os.fdopen(result) as pipe:
            text = pipe.read()
        found = json.loads(text) if text else {"error": "", "message": ""}
        print(json.dumps({"signal": killed, **found, "seconds": time.monotonic() - started}), file=answers, flush=True)
    os._exit(0)  # there is nothing to put in order


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
