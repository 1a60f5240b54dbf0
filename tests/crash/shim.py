"""`shim.c`, compiled and called: what changes files below a folder is counted, and stopped where it is told."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("shim.c")


class ShimError(Exception):
    """The shim cannot be used here; says why."""


class Change(NamedTuple):
    """A system call that changed a file: its number, from 1, its name, its paths, and what it returned (bytes)."""

    number: int
    call: str
    path: str
    to: str
    result: int

    @property
    def is_write(self) -> bool:
        """Whether it wrote bytes."""
        return "write" in self.call and self.result > 1


class Plan(NamedTuple):
    """What happens at which change; `error` is an errno."""

    do: str  # "watch", "kill_after", "kill_within", "fail_once", "fail_from"
    number: int = 0
    error: int = 0


WATCH = Plan("watch")


def compile_shim(folder: Path) -> Path:
    """Compile the library into `folder`.

    Raises:
        ShimError: there is no compiler, or this is no machine that the source knows.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ShimError("there is no C compiler (cc, gcc or clang)")
    library = folder / "crash_shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-o", str(library), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ShimError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
    return library


def watch(library: Path, root: Path, log: Path | None, plan: Plan = WATCH) -> ctypes.CDLL:
    """Watch what this process and its children do below `root` from now on, and do what `plan` says.

    Args:
        library: from `compile_shim`.
        root: a folder; it need not exist.
        log: where a line for each change is written, for `read_log`; not below `root`.
        plan: what happens when.

    Raises:
        ShimError: the kernel does not allow it.
    """
    shim = ctypes.CDLL(str(library))
    shim.crash_changes.restype = ctypes.c_long
    descriptor = -1 if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    failed = shim.crash_watch(os.fsencode(os.path.realpath(root)), descriptor)
    if failed:
        raise ShimError(f"the kernel does not let a process watch its own system calls: {os.strerror(failed)}")
    number, error = ctypes.c_long(plan.number), ctypes.c_int(plan.error)
    if plan.do.startswith("kill"):
        {"kill_after": shim.crash_kill_after, "kill_within": shim.crash_kill_within}[plan.do](number)
    elif plan.do.startswith("fail"):
        {"fail_once": shim.crash_fail_once, "fail_from": shim.crash_fail_from}[plan.do](number, error)
    return shim


def read_log(log: Path) -> list[Change]:
    """Read the changes that a watched process made, in their order."""
    changes = []
    for line in log.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        number, call, path, to, result = line.split("\t")
        changes.append(Change(int(number), call, path, to, int(result)))
    return changes
