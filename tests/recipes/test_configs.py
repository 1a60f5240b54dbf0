"""Every YAML file is what its program reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

from alignkit.cli import ModelArguments, RecipeParser, RewardArguments, ScriptArguments
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.ppo_config import PPOConfig
from tests.invariants.source_tree import ROOT

RECIPES = ROOT / "recipes"
PPO_CONFIGS = sorted((RECIPES / "configs").glob("ppo-*.yaml"))
CONFIGS = sorted({*(RECIPES / "configs").glob("*.yaml")} - {*PPO_CONFIGS})  # DPO's
ACCELERATE = sorted((RECIPES / "accelerate").glob("*.yaml"))
CARDS = ("8gb", "12gb", "16gb", "24gb", "t4")
MODELS = ("qwen3-4b", "qwen3-8b", "llama-3.1-8b")


def parsed(path: Path) -> tuple[ScriptArguments, ModelArguments, DPOConfig]:
    return RecipeParser((ScriptArguments, ModelArguments, DPOConfig)).parse(["--config", str(path)])


def test_there_is_a_config_for_every_model_and_card() -> None:
    assert {path.stem for path in CONFIGS} == {f"{model}-{card}" for model in MODELS for card in CARDS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_read_and_means_what_it_says(path: Path) -> None:
    script, model, args = parsed(path)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert vars(model)["model_name_or_path"] == written["model_name_or_path"]
    assert script.dataset_name == written["dataset_name"]
    for name in ("max_length", "max_tokens_per_forward", "per_device_train_batch_size", "learning_rate", "beta"):
        assert vars(args)[name] == written[name]
    assert args.activation_checkpointing is True


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_bounds_memory_and_says_so(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    _, model, args = parsed(path)
    assert isinstance(args.max_tokens_per_forward, int)
    assert args.max_length is not None
    assert 2 * args.max_length <= args.max_tokens_per_forward  # a pair, which is never split, fits one pass
    comment = text[: text.index("max_tokens_per_forward:")].rstrip().splitlines()[-2:]
    assert comment[0].startswith("# This number bounds the memory")
    assert model.load_in_4bit or path.stem == "qwen3-4b-24gb"
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32
    assert f"--config recipes/configs/{path.name}" in text


def test_there_is_a_ppo_config_for_every_card_that_four_roles_fit() -> None:
    assert {path.stem for path in PPO_CONFIGS} == {f"ppo-llama-3.1-8b-{card}" for card in ("12gb", "16gb", "24gb")}


@pytest.mark.parametrize("path", PPO_CONFIGS, ids=lambda path: path.stem)
def test_every_ppo_config_is_read_and_means_what_it_says(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    parser = RecipeParser((ScriptArguments, ModelArguments, RewardArguments, PPOConfig))
    script, model, reward, args = parser.parse(["--config", str(path)])
    read = {name: value for part in (script, model, reward, args) for name, value in vars(part).items()}
    written = yaml.safe_load(text)
    own = {"reward_model": [written["reward_model"]]}  # one name is a list of one
    assert {name: read[name] for name in written} == written | own
    assert model.load_in_4bit
    assert f"--config recipes/configs/{path.name}" in text
    assert f"one {path.stem.split('-')[-1].removesuffix('gb')} GB card" in text


@pytest.mark.parametrize("path", PPO_CONFIGS, ids=lambda path: path.stem)
def test_every_ppo_config_bounds_memory_and_says_so(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    written = yaml.safe_load(text)
    episode = written["max_prompt_length"] + written["max_completion_length"]
    assert episode == 1024 + 512
    assert min(written["max_tokens_per_forward"], written["rollout_batch_tokens"]) >= episode  # never split
    comment = text[: text.index("max_tokens_per_forward:")].rstrip().splitlines()[-2:]
    assert comment[0].startswith("# This number bounds the memory")
    cached_bytes = 2 * 32 * 8 * 128 * 2  # of a token: keys and values, 32 layers, 8 heads of 128 numbers, 16 bits
    assert f"{written['rollout_batch_tokens'] * cached_bytes / 1e9:.1f} GB" in text
    assert written["logging_steps"] == written["num_mini_batches"] * written["num_ppo_epochs"]
    assert written["save_steps"] % written["logging_steps"] == 0


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem.endswith("-t4")], ids=lambda path: path.stem)
def test_a_t4_is_not_told_to_use_bf16(path: Path) -> None:
    assert not {"bf16", "fp16", "dtype"} & set(yaml.safe_load(path.read_text(encoding="utf-8")))


EXPECTED: dict[str, dict[str, Any]] = {
    "single_gpu": {"distributed_type": DistributedType.NO, "num_processes": 1},
    "ddp": {"distributed_type": DistributedType.MULTI_GPU, "num_processes": 2},
    "fsdp2": {"distributed_type": DistributedType.FSDP, "num_processes": 2},
    "zero2": {"distributed_type": DistributedType.DEEPSPEED, "num_processes": 2},
    "zero3": {"distributed_type": DistributedType.DEEPSPEED, "num_processes": 2},
}


def test_there_is_an_accelerate_config_for_every_way_to_run() -> None:
    assert {path.stem for path in ACCELERATE} == set(EXPECTED)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    for name, value in EXPECTED[path.stem].items():
        assert vars(config)[name] == value
    assert config.mixed_precision == "no"  # DPOConfig chooses by the device
    assert not config.use_cpu


def test_sharding_is_of_the_kind_that_the_file_is_named_for() -> None:
    loaded = {path.stem: load_config_from_file(str(path)) for path in ACCELERATE}
    assert loaded["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert loaded["zero2"].deepspeed_config["zero_stage"] == 2
    assert loaded["zero3"].deepspeed_config["zero_stage"] == 3
