"""PPO's GPU script is known to run before a GPU is there, its equalities hold on a CPU, and each is known to fail."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.models.bundle import ModelBundle
from alignkit.rollout.hf import HFEngine
from alignkit.trainers.callbacks_engine import PauseScaler
from alignkit.trainers.ppo import PPOTrainer
from tests.benchmarks.gpu import check_ppo, ppo_equalities, ppo_memory
from tests.benchmarks.gpu.card import quiet
from tests.benchmarks.gpu.ppo_memory import Job, Measurement
from tests.benchmarks.gpu.script import NO_CUDA, Call
from tests.benchmarks.gpu.shapes import eight_billion
from tests.ppo_factory import WatchedTrainer

CPU = torch.device("cpu")
DRY = Job(12.0, 8, is_dry=True)
QUICK = (
    "completions alone and in a batch",
    "reward adapter and sequence classifier",
    "4-bit base",
    "early stop with a gradient scaler",
)


def checked(name: str, folder: Path) -> dict[str, ppo_equalities.Outcome]:
    """The outcomes of one check, by name."""
    with quiet():
        return {outcome.name: outcome for outcome in ppo_equalities.CHECKS[name](CPU, folder)}


def test_without_a_gpu_the_script_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_ppo.main([]) == NO_CUDA
    assert capsys.readouterr().out.startswith("No CUDA device here: nothing was checked")


# --- equalities: they hold, and what they look for would be seen ---


@pytest.mark.parametrize("name", QUICK)
def test_an_equality_holds_on_the_cpu(name: str, tmp_path: Path) -> None:
    """The quick ones; the last test of this file makes them all."""
    outcomes = checked(name, tmp_path)
    assert [outcome for outcome in outcomes.values() if outcome.passed is False] == []
    skipped = [outcome.note for outcome in outcomes.values() if outcome.passed is None]
    assert set(skipped) <= {ppo_equalities.NO_BITSANDBYTES}


def test_a_ratio_that_is_not_one_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = WatchedTrainer.score

    def shifted(self: Any, prompts: Any, completions: Any) -> Any:
        table = original(self, prompts, completions)
        return table._replace(logps=table.logps + 1e-6)

    monkeypatch.setattr(WatchedTrainer, "score", shifted)
    monkeypatch.setattr(ppo_equalities, "RATIOS", {"fp32": ppo_equalities.RATIOS["fp32"]})
    (outcome,) = checked("first importance ratio is 1", tmp_path).values()
    assert outcome.passed is False


def test_completions_that_depend_on_the_batch_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = HFEngine.generate

    def by_place(self: Any, prompts: Any, seeds: Any, sampling: Any) -> Any:
        return original(self, prompts, [[number] for number in range(len(prompts))], sampling)

    monkeypatch.setattr(HFEngine, "generate", by_place)
    (outcome,) = checked("completions alone and in a batch", tmp_path).values()
    assert outcome.passed is False
    assert outcome.found.startswith("1 of 8")


def test_a_reference_that_moves_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy in the reference's place, and a reward adapter and base that training moves."""
    monkeypatch.setitem(ppo_equalities.TWENTY, "max_steps", 2)
    monkeypatch.setattr(ModelBundle, "score_reference", ModelBundle.score)
    original = PPOTrainer.training_step

    def moving(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            next(p for name, p in self.model.named_parameters() if "reward_0" in name).add_(1e-3)
            next(p for name, p in self.model.named_parameters() if "embed_tokens" in name).add_(1e-2)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PPOTrainer, "training_step", moving)
    outcomes = checked("four roles", tmp_path)
    assert [outcome.passed for outcome in outcomes.values()] == [False, False, False]
    found = outcomes["weights that are not trained, four roles"].found
    same, total = (int(found.split()[place]) for place in (3, 5))
    assert total - same == 2


def test_other_rewards_than_the_classifiers_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ModelBundle.values

    def one_earlier(self: Any, layout: Any, index: Any, **kwargs: Any) -> Any:
        return original(self, layout, index - 1, **kwargs)

    monkeypatch.setattr(ModelBundle, "values", one_earlier)
    outcomes = checked("reward adapter and sequence classifier", tmp_path)
    assert {outcome.passed for outcome in outcomes.values()} <= {False, None}


def test_a_scaler_that_is_not_paused_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PauseScaler, "on_step_begin", lambda *args, **kwargs: None)
    check = {"early stop": ppo_equalities.scaled_steps}
    monkeypatch.setattr(ppo_equalities, "CHECKS", check)
    (outcome,) = ppo_equalities.run(CPU)
    assert outcome["passed"] is False
    assert "No inf checks were recorded" in outcome["note"]
    assert "No inf checks were recorded" in ppo_equalities.table([outcome])


# --- memory ---


@pytest.mark.parametrize("cap_gb", check_ppo.CAPS_GB)
def test_a_card_runs_its_own_recipe(cap_gb: float, tmp_path: Path) -> None:
    """Two rollouts of forced lengths, with the recipe's bounds; enough prompts to reach them."""
    model, reward, args = ppo_memory.read_recipe(Job(cap_gb, check_ppo.PROMPTS, is_dry=False), tmp_path)
    assert f"{cap_gb:g} GB card" in Job(cap_gb, 0, is_dry=False).recipe.read_text(encoding="utf-8")
    assert model.load_in_4bit
    assert reward.reward_model == [str(tmp_path / "reward")]
    assert args.max_prompt_length == ppo_memory.PROMPT_TOKENS
    assert args.min_completion_length == args.max_completion_length == ppo_memory.COMPLETION_TOKENS
    assert args.max_steps == 2 * args.num_ppo_epochs * args.num_mini_batches
    prompts = args.per_device_train_batch_size * args.num_mini_batches
    assert prompts == check_ppo.PROMPTS
    episode = ppo_memory.PROMPT_TOKENS + ppo_memory.COMPLETION_TOKENS
    assert prompts * episode >= int(args.rollout_batch_tokens or 0)
    assert args.per_device_train_batch_size * episode >= int(args.max_tokens_per_forward or 0)
    whole = ppo_memory.read_recipe(Job(cap_gb, 0, is_dry=False), tmp_path)[2]
    assert whole.per_device_train_batch_size == 16


@pytest.mark.parametrize(
    ("stage", "method"), [("load", "__init__"), ("generate and reward", "complete"), ("score", "score")]
)
def test_running_out_of_memory_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, method: str
) -> None:
    def no_memory(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PPOTrainer, method, no_memory)
    result = ppo_memory.measure(DRY, tmp_path / "result.json")
    if method == "score":  # rewards come before it
        assert result.roles == ["policy", "reference", "reward_0", "value"]
    assert (result.passed, result.fits, result.stage) == (True, False, stage)
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == dataclasses.asdict(result)
    assert f"DOES NOT FIT: out of memory at '{stage}'" in ppo_memory._verdict(dataclasses.asdict(result))


def test_another_error_fails_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("something else")

    monkeypatch.setattr(ppo_memory, "_train", broken)
    result = ppo_memory.measure(DRY, tmp_path / "result.json")
    assert (result.passed, result.fits, result.note) == (False, False, "ValueError: something else")


def call(*argv: str, seconds: float) -> Call:
    arguments = argparse.Namespace(caps=[float(cap) for cap in argv], prompts=8, cpu_dry_run=True)
    shape, note = eight_billion(tiny=True)
    return Call(arguments, CPU, time.monotonic() + seconds, shape, note)


def test_a_card_without_time_is_left_out_and_one_that_overruns_is_stopped() -> None:
    assert [row["note"] for row in ppo_memory.run(call("12", "16", seconds=-1))] == ["left out: no time"] * 2
    (row,) = ppo_memory.run(call("12", seconds=0.5))
    assert (row["note"], row["passed"], row["fits"]) == ("stopped: no time", None, False)


def test_a_card_without_a_recipe_is_a_row_that_fails(tmp_path: Path) -> None:
    row = dataclasses.asdict(ppo_memory.measure(Job(11.0, 8, is_dry=True), tmp_path / "result.json"))
    assert row["passed"] is False
    assert "ppo-llama-3.1-8b-11gb.yaml" in row["note"]
    assert "11gb" in ppo_memory.table([row], call(seconds=0))


def test_a_process_that_dies_is_a_row_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    (row,) = ppo_memory.run(call("12", seconds=60))
    assert (row["passed"], row["fits"], row["note"]) == (False, False, "exit code 1: ")


def test_the_table_reads_the_last_update() -> None:
    each = Measurement("12 GB", 12.0, True, True, settings={"prompts": 32}, peak_allocated_bytes=2**33)
    each.update_seconds, each.rollout_seconds = [9.0, 4.0], [{"generate": 5.0}, {"generate": 1.0}]
    text = ppo_memory.table([dataclasses.asdict(each)], call(seconds=0))
    assert text.splitlines()[-1] == "| 12 | 32 | 0.00 | 8.00 | 0.00 | 4.0 | 25% | fits |"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_sections_run_on_a_cpu(tmp_path: Path) -> None:
    """The call as a user makes it; every equality is executed."""
    command = [sys.executable, check_ppo.__file__, "--cpu-dry-run", "--caps", "12", "--prompts", "8"]
    done = subprocess.run(
        [*command, "--seconds", "600", "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "check_ppo.json").read_text(encoding="utf-8"))
    assert all(outcome["passed"] is not False for outcome in report["equalities"])
    (row,) = report["memory"]
    assert row["fits"], row
    assert row["roles"] == ["policy", "reference", "reward_0", "value"]
    assert len(row["update_seconds"]) == 2
    assert row["completion_tokens"] == [8 * ppo_memory.COMPLETION_TOKENS // ppo_memory.DRY_SHRINK] * 2
    assert "| fits |" in (tmp_path / "check_ppo.md").read_text(encoding="utf-8")
