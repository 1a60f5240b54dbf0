"""A damaged checkpoint is never resumed from in silence, whatever was done to which of its files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from alignkit.checkpoint.find import newest_verified
from alignkit.checkpoint.manifest import MANIFEST
from alignkit.errors import CheckpointError
from tests.crash.cases import verified
from tests.crash.compare import differences
from tests.crash.damage import Damage, damages, files_of
from tests.crash.nursery import Nursery
from tests.crash.runs import RUNS, SAVED

OLD, NEW = (f"checkpoint-{step}" for step in SAVED)


@pytest.fixture(scope="module", params=RUNS)
def name(request: pytest.FixtureRequest) -> str:
    """A run's name."""
    return request.param


@pytest.fixture(scope="module")
def whole(nursery: Nursery, name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps both of its checkpoints."""
    folder = tmp_path_factory.mktemp(name) / "whole"
    outcome = nursery.run(name, folder, save_total_limit=2)
    assert outcome.error == "", outcome.said
    assert [path.name for path in verified(folder)] == [OLD, NEW]
    return folder


def damaged(whole: Path, output: Path, damage: Damage, *, both: bool = False) -> Path:
    """A copy of the run whose newer checkpoint is damaged; the older one stays only if `both`."""
    shutil.copytree(whole, output)
    damage.do(output / NEW)
    if not both:
        shutil.rmtree(output / OLD)
    return output / NEW


def test_no_damage_is_overlooked(name: str, whole: Path, tmp_path: Path):
    """The reader that every resume goes through: the older checkpoint is taken, the newer named with what is wrong."""
    every = list(damages(whole / NEW, whole / OLD))
    assert {damage.file for damage in every} > {MANIFEST, "optimizer.pt", "adapter_model.safetensors"}
    for number, damage in enumerate(every):
        output = tmp_path / str(number)
        damaged(whole, output, damage, both=True)
        found = newest_verified(output)
        assert found.folder == output / OLD, damage
        assert len(found.skipped) == 1, damage
        assert str(output / NEW) in found.skipped[0], damage
        shutil.rmtree(output)
    print(f"{name}: {len(every)} damages of {len(files_of(whole / NEW))} files")


def test_a_damaged_checkpoint_is_refused_by_its_path(name: str, whole: Path, tmp_path: Path):
    """And with `True` or "auto" where there is no other: an error, before a forward pass."""
    trainer: Any = RUNS[name](tmp_path / "unused")
    tried = 0
    for number, damage in enumerate(damages(whole / NEW, whole / OLD)):
        output = tmp_path / str(number)
        broken = damaged(whole, output, damage)
        with pytest.raises(CheckpointError, match=re.escape(str(broken))):
            trainer.train(str(broken))
        if number % 7 == 0:
            again: Any = RUNS[name](output)
            for asked in (True, "auto"):
                with pytest.raises(CheckpointError, match=re.escape(str(broken))):
                    again.train(asked)
                assert again.state.global_step == 0
                tried += 1
        shutil.rmtree(output)
    assert tried > 10


def test_a_resume_goes_on_from_the_older_one(nursery: Nursery, name: str, whole: Path, tmp_path: Path):
    """One damage of each kind: told, and then the same result as ever."""
    kinds = {damage.kind: damage for damage in damages(whole / NEW, whole / OLD)}
    for kind, damage in kinds.items():
        output = tmp_path / kind
        damaged(whole, output, damage, both=True)
        outcome = nursery.run(name, output, resume=kind != "flip" or "auto", save_total_limit=2)
        assert outcome.error == "", outcome.said
        assert f"{output}/{NEW}" in " ".join(outcome.said.split()), outcome.said
        extra = output / f"moved-{damage.file}"  # where the link led
        extra.unlink(missing_ok=True)
        assert differences(output, whole) == [], damage
    assert kinds.keys() == {"flip", "cut", "longer", "delete", "link", "other", "swap", "extra"}
