"""Checkpoints from strangers, sealed by themselves: a resume runs nothing and says which file it is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignkit.errors import CheckpointError
from tests.hostile.harness import (
    attempt,
    bare_pickle,
    deep,
    edited,
    hostile_archive,
    refuse,
    replaced,
    safetensors,
    sparse,
    torch_archive,
)
from tests.hostile.runs import TRAINERS, reseal

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good checkpoint of each trainer."""
    found = {}
    for name, build in TRAINERS.items():
        folder = tmp_path_factory.mktemp(name)
        build(folder).train()
        found[name] = folder / "checkpoint-1"
    return found


def resume(name: str, folder: Path, tmp_path: Path, **options: Any) -> Callable[[], Any]:
    trainer = TRAINERS[name](tmp_path / "run", **options)
    return lambda: trainer.train(resume_from_checkpoint=str(folder))


def spoiled(checkpoint: Path, tmp_path: Path, spoil: Callable[[Path], Any]) -> Path:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "sent" / checkpoint.name))
    spoil(folder)
    reseal(folder)
    return folder


@pytest.mark.parametrize("name", TRAINERS)
def test_good_checkpoint_that_was_sealed_anew_is_resumed(name: str, checkpoints: dict[str, Path], tmp_path: Path):
    folder = spoiled(checkpoints[name], tmp_path, lambda folder: None)
    assert attempt(resume(name, folder, tmp_path)) is None


PLACES = {
    "dpo": ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "adapter_model.safetensors"),
    "reward": ("optimizer.pt", "rng_state.pth", "adapter_model.safetensors", "states_0.safetensors"),
    "ppo": ("optimizer.pt", "value_head.safetensors", "value/adapter_model.safetensors", "trainer_state.json"),
}
PICKLES = {"bare": bare_pickle, "saved": hostile_archive, "in an archive": lambda: torch_archive(bare_pickle())}


CASES = [(name, place, "saved") for name, places in PLACES.items() for place in places]
CASES += [("dpo", "optimizer.pt", "bare"), ("dpo", "rng_state.pth", "in an archive")]


@pytest.mark.parametrize(("name", "place", "pickled"), CASES)
def test_pickle_where_a_resume_looks(name: str, place: str, pickled: str, checkpoints: dict[str, Path], tmp_path: Path):
    assert (checkpoints[name] / place).exists() or place == "scaler.pt"
    folder = spoiled(checkpoints[name], tmp_path, replaced(place, PICKLES[pickled]()))
    assert Path(place).name in refuse(resume(name, folder, tmp_path))


def pickled_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "states_0.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(hostile_archive())


def other_optimizer(folder: Path) -> None:
    torch.save({"state": {0: {"exp_avg": torch.zeros(1)}}, "param_groups": [{"params": [0]}]}, folder / "optimizer.pt")


def narrower_weights(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor[:1].clone() for name, tensor in weights.items()}, folder / "adapter_model.safetensors")


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights as a pickle alone": (pickled_weights, r"adapter_model\.bin|states_0"),
    "optimizer as a zip bomb": (
        lambda f: (f / "optimizer.pt").write_bytes(torch_archive(compression=8, bomb=bytes(20_000_000))),
        r"optimizer\.pt' holds a packed or encrypted entry",
    ),
    "optimizer of another model": (other_optimizer, r"does not fit this run: .*parameter group"),
    "weights of another shape": (narrower_weights, r"does not fit this run: .*size mismatch|does not fit"),
    "header of 4 GB": (
        replaced("adapter_model.safetensors", safetensors({}, length=2**32)),
        r"adapter_model\.safetensors' is malformed: it says that its header has 4,294,967,296 bytes",
    ),
    "trainer's state nested deep": (replaced("trainer_state.json", deep()), r"trainer_state\.json' nests 100,001 deep"),
    "trainer's state of another kind": (
        edited("trainer_state.json", global_step="many"),
        r"trainer_state\.json' does not fit this run: it was made at step 'many'",
    ),
    "trainer's state with more fields": (edited("trainer_state.json", evil=1), r"trainer_state\.json' does not fit"),
    "trainer's state whose log is none": (
        edited("trainer_state.json", log_history="x"),
        r"its log_history is of .* str",
    ),
    "trainer's state whose batch is none": (
        edited("trainer_state.json", train_batch_size="x"),
        r"its train_batch_size is",
    ),
    "no trainer's state": (lambda f: (f / "trainer_state.json").unlink(), r"holds no trainer_state\.json"),
    "manifest nested deep": (lambda f: None, r"manifest\.json cannot be read"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_checkpoint_is_refused(case: str, checkpoints: dict[str, Path], tmp_path: Path):
    spoil, message = SPOILED[case]
    folder = spoiled(checkpoints["dpo"], tmp_path, spoil)
    if case.startswith("manifest"):
        (folder / "manifest.json").write_text(deep())
    text = refuse(resume("dpo", folder, tmp_path))
    assert re.search(message, text), text


@pytest.mark.parametrize("spoil", [pickled_weights, replaced("adapter_model.safetensors", hostile_archive())])
def test_weights_alone_are_looked_over_too(spoil: Any, checkpoints: dict[str, Path], tmp_path: Path):
    folder = spoiled(checkpoints["dpo"], tmp_path, spoil)
    text = refuse(resume("dpo", folder, tmp_path, weights_only_resume=True))
    assert "adapter_model" in text


def test_weights_alone_without_a_step_are_refused(checkpoints: dict[str, Path], tmp_path: Path):
    folder = spoiled(checkpoints["dpo"], tmp_path, lambda folder: (folder / "trainer_state.json").unlink())
    text = refuse(resume("dpo", folder, tmp_path, weights_only_resume=True))
    assert "holds no trainer_state.json, so it is no checkpoint" in text


def test_weights_alone_of_an_endless_run_end_at_once(checkpoints: dict[str, Path], tmp_path: Path):
    """The schedule is brought to the step that a state names, of which there may be too many to count."""
    folder = spoiled(checkpoints["dpo"], tmp_path, edited("trainer_state.json", global_step=10**12))
    assert attempt(resume("dpo", folder, tmp_path, weights_only_resume=True)) is None


def test_weights_alone_let_the_optimizer_lie(checkpoints: dict[str, Path], tmp_path: Path):
    folder = spoiled(checkpoints["dpo"], tmp_path, replaced("optimizer.pt", hostile_archive()))
    assert attempt(resume("dpo", folder, tmp_path, weights_only_resume=True)) is None


def test_best_checkpoint_that_a_state_names_elsewhere_is_looked_over(checkpoints: dict[str, Path], tmp_path: Path):
    """`best_model_checkpoint` of a stranger's state may name any folder."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "adapter_model.bin").write_bytes(hostile_archive())
    trainer = TRAINERS["dpo"](tmp_path / "run")
    trainer.state.best_model_checkpoint = str(evil)
    assert "adapter_model.bin" in refuse(trainer._load_best_model)


@pytest.mark.parametrize("options", [{}, {"weights_only_resume": True}])
@pytest.mark.parametrize("name", [".metadata", "__0.metadata", "__0_0.distcp"])
def test_shards_of_fsdp_are_not_opened(
    name: str, options: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path
):
    """PyTorch unpickles them. A folder of this name says to Trainer that the checkpoint is FSDP's."""

    def spoil(folder: Path) -> None:
        (folder / "pytorch_model_fsdp_0").mkdir()
        (folder / "pytorch_model_fsdp_0" / name).write_bytes(bare_pickle())

    text = refuse(resume("dpo", spoiled(checkpoints["dpo"], tmp_path, spoil), tmp_path, **options))
    assert f"{name}' is one of FSDP's shards" in text


def test_unsealed_checkpoint_with_a_pickle_is_not_opened(checkpoints: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(checkpoints["dpo"], tmp_path / "checkpoint-1"))
    (folder / "training_args.bin").write_bytes(hostile_archive())
    assert "training_args.bin is not in manifest.json" in refuse(resume("dpo", folder, tmp_path))


def test_sparse_file_in_a_checkpoint_is_refused_at_once(checkpoints: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(checkpoints["dpo"], tmp_path / "checkpoint-1"))
    sparse(folder / "optimizer.pt", 2**43)
    raised = attempt(resume("dpo", folder, tmp_path))
    assert isinstance(raised, CheckpointError)
    assert "8796093022208 bytes instead of" in str(raised)


# ------------------------------------------------------------ the cache of the reference


@pytest.mark.parametrize("content", [hostile_archive(), safetensors({}, length=2**32)], ids=["pickle", "4 GB"])
def test_hostile_reference_cache_is_computed_anew(content: bytes, tmp_path: Path):
    options = {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache")}
    TRAINERS["dpo"](tmp_path / "first", **options).train()
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    good = load_file(path)["logps"].clone()  # not a view of the file that is overwritten
    path.write_bytes(content)
    assert attempt(lambda: TRAINERS["dpo"](tmp_path / "second", **options).train()) is None
    assert torch.equal(load_file(path)["logps"], good)


def test_description_of_a_hostile_run_is_no_way_in(checkpoints: dict[str, Path], tmp_path: Path):
    """What a manifest says of its run is compared and printed, nothing else."""
    evil = "\x1b[2J{0.__class__} %s"
    folder = Path(shutil.copytree(checkpoints["dpo"], tmp_path / "checkpoint-1"))
    content = json.loads((folder / "manifest.json").read_text())
    run = {**content["run"], evil: evil}
    from alignkit.checkpoint.manifest import MANIFEST, seal

    (folder / MANIFEST).unlink()
    seal(folder, sequence=content["sequence"], step=content["step"], run=run)
    raised = attempt(resume("dpo", folder, tmp_path))
    assert raised is None or (isinstance(raised, CheckpointError) and "\x1b" not in str(raised))
