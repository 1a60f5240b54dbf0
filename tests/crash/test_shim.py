"""The shim sees every change, whoever makes it, and stops the process exactly where it was told."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.crash.nursery import ALONE, ROOT, Nursery
from tests.crash.shim import WATCH, Change, Plan, read_log

# One system call in several guises each, some of which never pass libc's own functions: 19 changes.
DEEDS = """
    import os
    from safetensors.numpy import save_file
    import numpy
    os.mkdir("made")
    try: os.mkdir("made")
    except FileExistsError: pass
    fd = os.open("made/file", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"0123456789")
    os.pwrite(fd, b"ab", 0)
    os.writev(fd, [b"cdef", b"ghij"])
    os.fsync(fd)
    os.ftruncate(fd, 12)
    os.close(fd)
    os.link("made/file", "second")
    os.symlink("second", "third")
    here = os.open("made", os.O_RDONLY)
    os.rename("file", "other", src_dir_fd=here, dst_dir_fd=here)
    os.fsync(here)
    os.unlink("third")
    os.replace("second", "made/second")
    save_file({"x": numpy.arange(4.0)}, "tensors.safetensors")
    os.unlink("second", dir_fd=here)
    os.rename("made", "renamed")
    open("renamed/other").read()
"""
CALLS = """
    mkdir openat write pwrite64 writev fsync ftruncate link symlink renameat fsync unlink rename
    openat ftruncate write renameat unlinkat rename
"""

# Calls with a path or a descriptor that change neither bytes nor names.
READING = {
    *("access", "faccessat", "faccessat2", "readlink", "readlinkat", "getcwd", "chdir", "statfs", "fstatfs", "dup"),
    *("stat", "lstat", "fstat", "newfstatat", "statx", "getdents64", "read", "pread64", "readv", "lseek", "close"),
    *("fcntl", "ioctl", "mmap", "fadvise64", "flock", "getxattr", "lgetxattr", "fgetxattr", "dup2", "dup3", "poll"),
}


def process(library: Path, folder: Path, plan: Plan = WATCH, deeds: str = DEEDS) -> tuple[int, list[Change]]:
    """Do the deeds in a process that is watched; return its exit code and what it changed."""
    log, root = folder / "log", folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    code = "import sys; from pathlib import Path; from tests.crash.shim import Plan, watch\n"
    code += f"watch(Path({str(library)!r}), Path({str(root)!r}), Path({str(log)!r}), {plan!r})\n"
    code += f"import os; os.chdir({str(root)!r})\n{textwrap.dedent(deeds)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode <= 0 or "OSError" in done.stderr, done.stderr
    return done.returncode, read_log(log)


def test_every_change_is_seen_whoever_makes_it(library: Path, tmp_path: Path):
    code, changes = process(library, tmp_path)
    assert code == 0
    assert [change.call.removesuffix("2") for change in changes] == CALLS.split()
    assert [change.number for change in changes] == list(range(1, 20))
    root = tmp_path / "root"
    assert changes[9].path == str(root / "made" / "file")
    assert changes[9].to == str(root / "made" / "other")
    assert changes[15].path.startswith(str(root / ".tmp"))  # safetensors writes aside, and renames without libc
    assert changes[16].to == str(root / "tensors.safetensors")


def test_what_lies_elsewhere_is_nothing(library: Path, tmp_path: Path):
    (tmp_path / "rooted").mkdir()
    deeds = f"open({str(tmp_path / 'rooted' / 'file')!r}, 'w').write('x'); open('file', 'w')"
    code, changes = process(library, tmp_path, deeds=deeds)
    assert code == 0
    assert [change.path for change in changes] == [str(tmp_path / "root" / "file")]


def test_a_kill_leaves_the_changes_before_it_and_none_after_it(library: Path, tmp_path: Path):
    for number in (1, 3, 9, 19):
        code, changes = process(library, tmp_path, Plan("kill_after", number))
        assert code == -signal.SIGKILL
        assert len(changes) == number
    assert process(library, tmp_path, Plan("kill_after", 20))[0] == 0
    assert process(library, tmp_path, Plan("kill_after", 0))[0] == -signal.SIGKILL
    assert list((tmp_path / "root").iterdir()) == []


@pytest.mark.parametrize(("number", "size"), [(3, 5), (4, 10), (5, 14)])  # write, pwrite, writev
def test_a_write_can_be_torn(library: Path, tmp_path: Path, number: int, size: int):
    code, changes = process(library, tmp_path, Plan("kill_within", number))
    assert code == -signal.SIGKILL
    assert changes[-1].call == "torn"
    content = (tmp_path / "root" / "made" / "file").read_bytes()
    assert len(content) == size
    assert content == {3: b"01234", 4: b"a123456789", 5: b"ab23456789cdef"}[number]


def test_a_call_can_fail_once_or_for_good(library: Path, tmp_path: Path):
    deeds = """
        import os
        open("one", "w").write("1")
        found = []
        for name in ("two", "three"):
            try: open(name, "w").write("23")
            except OSError as error: found.append(error.errno)
            if name == "two": os.unlink("one")
        os.write(2, f"OSError {found}".encode()); os._exit(1 if found else 0)
    """
    code, changes = process(library, tmp_path, Plan("fail_once", 3, errno.EIO), deeds)
    assert code == 1
    assert [change.call for change in changes] == ["openat", "write", "failed", "unlink", "openat", "write"]
    code, changes = process(library, tmp_path, Plan("fail_from", 3, errno.ENOSPC), deeds)
    assert [change.call for change in changes] == ["openat", "write", "failed", "unlink", "failed"]
    assert {change.result for change in changes if change.call == "failed"} == {-errno.ENOSPC}


def test_the_wall_clock_can_be_set_back(library: Path, tmp_path: Path):
    code = "import ctypes, sys, time, datetime\nbefore, steady = time.time(), time.monotonic()\n"
    code += "ctypes.CDLL(sys.argv[1]).crash_shift_clock(-86400)\n"
    code += "print(time.time() - before, datetime.datetime.now().timestamp() - before, time.monotonic() - steady)"
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    command = [sys.executable, "-c", code, str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    now, date, steady = map(float, done.stdout.split())
    assert -86400 <= now <= date < -86390
    assert 0 <= steady < 10


@pytest.mark.slow  # every import under strace
def test_strace_sees_no_change_that_the_shim_missed(library: Path, tmp_path: Path):
    """A whole run of PPO, which writes most kinds of files, also looked at from outside."""
    if shutil.which("strace") is None:
        pytest.skip("there is no strace")
    trace, log, root = tmp_path / "trace", tmp_path / "log", tmp_path / "root"
    watched = {"name": "ppo", "output": str(root), "log": str(log), "resume": None, "plan": WATCH, "user": None}
    code = "import json, sys; from pathlib import Path; from tests.crash.nursery import train\n"
    code += "train(json.loads(sys.argv[1]), Path(sys.argv[2]))"
    task = json.dumps({**watched, "clock": 0, "options": {}})
    command = ["strace", "-f", "-y", "-qq", "-e", "signal=SIGSYS", "-o", str(trace)]
    command += ["-e", "trace=%file,%desc,mmap", sys.executable, "-c", code, task, str(library)]
    environment = {**os.environ, **ALONE}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    lines = trace.read_text(errors="replace").splitlines()
    own = [
        line for line, then in zip(lines, [*lines[1:], ""], strict=True) if "--- SIGSYS" not in then
    ]  # not handed on
    found = [line for line in own if str(root) in line]
    assert not [line for line in found if " mmap(" in line and "PROT_WRITE" in line and "MAP_SHARED" in line]
    changed = [name for line in found if (name := _change(line))]
    assert changed == [change.call for change in read_log(log)]
    assert len(changed) > 80


def _change(line: str) -> str:
    """The call's name, unless it failed or is known to change nothing."""
    match = re.match(r"\d+ +(\w+)\(.* = (\d+)", line)
    if match is None or match[1] in READING:
        return ""
    if match[1] in {"open", "openat"}:
        return match[1] if "O_CREAT" in line or "O_TRUNC" in line else ""
    return match[1]


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_a_kill_lands_inside_a_safetensors_file(nursery: Nursery, tmp_path: Path, name: str):
    whole = nursery.run(name, tmp_path / "whole").changes
    torn = 0
    for change, following in itertools.pairwise(whole):
        if change.is_write and following.call.startswith("rename") and following.to.endswith(".safetensors"):
            output = tmp_path / f"torn-{change.number}"
            outcome = nursery.run(name, output, plan=Plan("kill_within", change.number))
            assert outcome.signal == signal.SIGKILL
            assert outcome.changes[-1].result == change.result // 2
            path = Path(outcome.changes[-1].path)  # aside, at its whole size, and half of it nothing but zeros
            content = path.read_bytes()
            assert len(content) == change.result
            assert any(content[: change.result // 2])
            assert not any(content[change.result // 2 :])
            torn += 1
            if torn == 2:
                break
    assert torn == 2
