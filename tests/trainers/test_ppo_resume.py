"""A PPO run that stops anywhere goes on as if it had not; what lies in its folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from alignkit.checkpoint.manifest import read_manifest, seal
from alignkit.checkpoint.states import read_states, write_states
from alignkit.errors import CheckpointError, ConfigError
from alignkit.models.adapters import peft_warnings
from tests.crash.compare import differences, unequal
from tests.model_factory import tiny_model
from tests.ppo_factory import ppo_trainer, prompts, weights
from tests.trainers import ppo_run
from tests.trainers.ppo_run import trainer

ROOT = Path(__file__).resolve().parents[2]
STATES = "states_0.safetensors"
# A longer run does not change it.
CONSTANT: dict[str, Any] = {
    "num_ppo_epochs": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "lr_scheduler_type": "constant",
}


def logged_steps(folder: Path) -> list[int]:
    return [entry["step"] for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder).train()
    return folder


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, whole: Path):
    trainer(tmp_path).train(str(whole / "checkpoint-8"))
    assert differences(tmp_path / "checkpoint-16", whole / "checkpoint-16") == []
    assert logged_steps(tmp_path / "checkpoint-16") == [3, 6, 9, 12, 15]
    state = read_states(whole / "checkpoint-16" / STATES)["states"]["ppo"]
    assert state["kl_coef"] != ppo_run.OPTIONS.get("kl_coef", 0.05)
    assert state["moments"]["count"] == 4 * 4 * 2
    assert state["window"]["loss"]["sums"][1] == 1  # step 16 is not logged yet


def test_weights_alone_go_on_between_rollouts(tmp_path: Path, whole: Path):
    """With rates of zero, what was loaded is what comes out."""
    still = {"learning_rate": 0.0, "value_learning_rate": 0.0, "max_steps": 12}
    again = trainer(tmp_path, weights_only_resume=True, **still)
    again.train(str(whole / "checkpoint-8"))
    assert again.state.global_step == 12
    for name in ("adapter_model.safetensors", "value/adapter_model.safetensors", "value_head.safetensors"):
        ends, begins, later = (
            load_file(folder / name)
            for folder in (tmp_path / "checkpoint-12", whole / "checkpoint-8", whole / "checkpoint-12")
        )
        assert list(unequal(ends, begins)) == [], name
        assert list(unequal(ends, later)) != [], name


def test_what_is_not_restored_would_be_seen(tmp_path: Path, whole: Path):
    changed = tmp_path / "checkpoint-8"
    shutil.copytree(whole / "checkpoint-8", changed)
    manifest = read_manifest(changed)
    for edit in ("kl_coef", "moments", "window", "value_head"):
        saved = read_states(whole / "checkpoint-8" / STATES)
        state = saved["states"]["ppo"]
        head = load_file(whole / "checkpoint-8" / "value_head.safetensors")["weight"]
        if edit == "kl_coef":
            state["kl_coef"] *= 1.5
        elif edit == "moments":
            state["moments"]["mean"] += 1.0
        elif edit == "window":
            state["window"] = {}
        else:
            head = head * 1.1
        write_states(changed / STATES, saved)
        save_file({"weight": head}, changed / "value_head.safetensors")
        seal(changed, sequence=1, step=8, run=manifest.run)
        trainer(tmp_path / edit).train(str(changed))
        assert differences(tmp_path / edit / "checkpoint-16", whole / "checkpoint-16") != [], edit


def run(*arguments: Any) -> int:
    command = [sys.executable, "-m", ppo_run.__name__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-4000:]
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("where", ["rollout", "minibatch", "epoch"])
def test_a_killed_process_goes_on(tmp_path: Path, whole: Path, where: str):
    assert run(tmp_path, "--kill", where) == -signal.SIGKILL
    assert not (tmp_path / "checkpoint-12").exists()
    assert run(tmp_path, "--resume", "latest") == 0
    assert differences(tmp_path / "checkpoint-16", whole / "checkpoint-16") == []


def test_a_checkpoint_holds_every_adapter_and_the_root_the_policy_alone(tmp_path: Path):
    mine = tmp_path / "value" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("kept")
    made = ppo_trainer(
        tmp_path, value_adapter=True, save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=2
    )
    made.train()
    made.save_model()
    assert mine.read_text() == "kept"
    assert [path.name for path in (tmp_path / "value").iterdir()] == ["mine.txt"]
    root = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name and "value" not in name for name in root)
    found = weights(made)
    for name, tensor in root.items():
        assert torch.equal(found[name.replace(".weight", ".default.weight")], tensor)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert {"adapter_model.safetensors", "value_head.safetensors", STATES, "optimizer.pt"} <= {
        path.name for path in (tmp_path / "checkpoint-2").iterdir()
    }
    assert (tmp_path / "checkpoint-2" / "value" / "adapter_model.safetensors").is_file()


def test_both_adapters_train_on_after_a_resume(tmp_path: Path, whole: Path):
    resumed = trainer(tmp_path)
    resumed.train(str(whole / "checkpoint-8"))
    saved = load_file(whole / "checkpoint-8" / "value" / "adapter_model.safetensors")
    found = weights(resumed)
    assert all(
        not torch.equal(found[name.replace(".weight", ".value.weight")], tensor) for name, tensor in saved.items()
    )


def test_a_root_that_is_called_checkpoints_holds_the_policy_alone(tmp_path: Path):
    made = ppo_trainer(tmp_path / "checkpoints", value_adapter=True)
    made.save_model()
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert "adapter_model.safetensors" in names
    assert not names & {"value", "value_head.safetensors", "ppo_state.json"}


def test_a_new_run_in_a_used_folder_keeps_the_samples_of_the_old_one(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    contents = []
    for seed in (1, 2, 3):
        ppo_trainer(tmp_path, seed=seed).train()
        contents.append((tmp_path / "rollouts.jsonl").read_text())
    assert len(set(contents)) == 3
    assert [(tmp_path / f"rollouts-{number}.jsonl").read_text() for number in (1, 2)] == contents[:2]
    assert "an earlier run's samples are now in" in caplog.text


def test_the_best_model_has_its_own_critic(tmp_path: Path):
    levels = {1: 1.0, 2: 5.0, 3: 2.0}  # by step, the rewards that evaluations are told

    def told(completions: list[str], held_out: list[bool], trainer_state: Any, **columns: Any) -> list[float]:
        return [
            levels[trainer_state.global_step] if held else float(len(text))
            for text, held in zip(completions, held_out, strict=True)
        ]

    made = ppo_trainer(
        tmp_path,
        told,
        train_dataset=prompts().add_column("held_out", [False] * 16),
        eval_dataset=prompts(3, seed=5).add_column("held_out", [True] * 3),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        max_steps=3,
        value_adapter=True,
    )
    assert made.args.metric_for_best_model == "reward"
    made.train()
    best = tmp_path / "checkpoint-2"
    assert made.state.best_model_checkpoint == str(best)
    found = weights(made)
    assert torch.equal(found["base_model.model.value.weight"], load_file(best / "value_head.safetensors")["weight"])
    for folder, adapter in ((best, "default"), (best / "value", "value")):
        for name, tensor in load_file(folder / "adapter_model.safetensors").items():
            assert torch.equal(found[name.replace(".weight", f".{adapter}.weight")], tensor)
    last = load_file(tmp_path / "checkpoint-3" / "value_head.safetensors")["weight"]
    assert not torch.equal(found["base_model.model.value.weight"], last)


def test_saving_is_rounded_to_rollouts(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    options = {"num_ppo_epochs": 4, "save_strategy": "steps", "eval_strategy": "steps", "max_steps": 8}
    made = ppo_trainer(
        tmp_path, save_steps=6, eval_steps=3, eval_dataset=prompts(2), load_best_model_at_end=True, **options
    )
    assert (made.args.save_steps, made.args.eval_steps) == (8, 8)
    assert "save_steps=6 becomes 8" in caplog.text
    with pytest.raises(ConfigError, match=r"save_steps=0\.1: give a number of optimizer steps, a multiple of 4"):
        ppo_trainer(tmp_path, num_ppo_epochs=4, save_strategy="steps", save_steps=0.1)


def test_a_checkpoint_that_cannot_be_resumed_says_why(tmp_path: Path, whole: Path):
    for missing in ("value_head.safetensors", "optimizer.pt", "scheduler.pt"):
        broken = tmp_path / missing / "checkpoint-8"
        shutil.copytree(whole / "checkpoint-8", broken)
        (broken / missing).unlink()
        with pytest.raises(CheckpointError, match=f"{re.escape(missing)} is missing"):
            trainer(tmp_path).train(str(broken))
    within = ppo_trainer(tmp_path / "within", max_steps=6, **CONSTANT)
    within.train()
    again = ppo_trainer(tmp_path / "within", max_steps=8, **CONSTANT)
    weights_alone = ppo_trainer(tmp_path / "within", max_steps=8, weights_only_resume=True, **CONSTANT)
    for refused in (again, weights_alone):
        with pytest.raises(CheckpointError, match="step 6, within a rollout of 4 optimizer steps"):
            refused.train(True)
    again.train(str(tmp_path / "within" / "checkpoint-4"))
    assert again.state.global_step == 8


def test_a_run_that_continues_an_adapter_keeps_its_reference(tmp_path: Path):
    first = ppo_trainer(tmp_path / "first", max_steps=1)
    first.train()
    first.save_model()
    with peft_warnings():
        policy = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "first"), is_trainable=True)
    second = ppo_trainer(
        tmp_path / "second",
        model=policy,
        peft_config=None,
        random=False,
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    second.train()
    assert second.state.log_history[0]["objective/kl"] == 0.0
    assert second.state.log_history[1]["objective/kl"] != 0.0
    reference = load_file(tmp_path / "second" / "checkpoint-2" / "reference" / "adapter_model.safetensors")
    assert not list(unequal(reference, load_file(tmp_path / "first" / "adapter_model.safetensors")))
