"""The shim, compiled, and the process whose children are killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.nursery import ROOT, Nursery
from tests.crash.shim import ShimError, compile_shim

_TRY = """
import sys
from pathlib import Path
from tests.crash.shim import watch
watch(Path(sys.argv[1]), Path("/"), None)
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled shim; tests that need it are skipped where it cannot be made or the kernel refuses it."""
    if sys.platform != "linux":
        pytest.skip("system calls are watched on Linux alone")
    try:
        library = compile_shim(tmp_path_factory.mktemp("shim"))
    except ShimError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-c", _TRY, str(library)]
    tried = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "ShimError" in tried.stderr:
        pytest.skip(tried.stderr.strip().splitlines()[-1])
    assert tried.returncode == 0, tried.stderr
    return library


@pytest.fixture(scope="session")
def nursery(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """The process that forks the runs."""
    with Nursery(library, tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery
