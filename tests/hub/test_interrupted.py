"""SIGTERM and SIGINT while something is being published: what lies on disk is as it was, and can be published again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignkit.checkpoint.find import newest_verified
from alignkit.trainers.signals import EXIT_RESUMABLE
from tests.hub.conftest import OWNER_TOKEN
from tests.hub_server import HubServer
from tests.hub_server.client import ROOT, Client, inherited_environment
from tests.hub_server.faults import Fault

COMMIT = r"/commit/"
SECONDS = 90
TRAIN = "import json, sys; from tests.hub_server.training import train; train(**json.loads(sys.argv[1]))"


@pytest.fixture
def hanging(hub: HubServer) -> Iterator[HubServer]:
    """The server, which answers no commit."""
    hub.faults.append(Fault("POST", COMMIT, "hang", times=99))
    yield hub
    hub.faults.clear()


def interrupt(hub: HubServer, number: int, home: Path, *command: str) -> tuple[int, float, str]:
    """Start a process, send it the signal when it waits for its commit; code, seconds to its end, and what it said."""
    (home.parent / "scratch").mkdir()
    settings = {
        "TMPDIR": str(home.parent / "scratch"),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": OWNER_TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
    }
    environment = {**inherited_environment(), **settings, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (home.parent / "said").open("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
        try:
            until = time.monotonic() + SECONDS
            while not any(request.status == "hang" for request in hub.requests):
                assert process.poll() is None, (home.parent / "said").read_text()
                assert time.monotonic() < until
                time.sleep(0.05)
            started = time.monotonic()
            os.kill(process.pid, number)
            return process.wait(SECONDS), time.monotonic() - started, (home.parent / "said").read_text()
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_while_a_folder_is_published(
    number: int, hanging: HubServer, client: Client, adapter: Path, tmp_path: Path
):
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    name = f"me/interrupted-{number}-{tmp_path.name}"
    command = [sys.executable, "-m", "alignkit.cli", "publish", str(adapter), name]
    code, seconds, said = interrupt(hanging, number, tmp_path / "home", *command)
    assert code != 0, said
    assert seconds < 20
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == before
    assert list((tmp_path / "scratch").glob("alignkit-*")) == []
    hanging.faults.clear()
    client.do("publish", folder=str(adapter), repo_id=name)
    assert "adapter_model.safetensors" in hanging.repo(name).files()


def test_a_signal_while_a_checkpoint_is_published(hanging: HubServer, base: Path, tmp_path: Path):
    options: dict[str, Any] = {
        "hub_model_id": f"me/{tmp_path.name}",
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 1,
    }
    task = {"method": "dpo", "folder": str(tmp_path / "run"), "base": str(base), "options": options, "then": "nothing"}
    command = [sys.executable, "-c", TRAIN, json.dumps(task)]
    code, seconds, said = interrupt(hanging, signal.SIGTERM, tmp_path / "home", *command)
    assert code == EXIT_RESUMABLE, said
    assert seconds < 20
    assert list((tmp_path / "scratch").glob("alignkit-*")) == []
    assert newest_verified(tmp_path / "run").folder == tmp_path / "run" / "checkpoint-1"
