"""PPOConfig: every field is read by something; everything wrong has a message of its own, before anything runs."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

import alignkit
from alignkit.errors import ConfigError
from alignkit.trainers.config_engine import EngineConfig
from alignkit.trainers.config_table_engine import ENGINE_AS_TRL, ENGINE_OWN
from alignkit.trainers.ppo_checks import CHOICES, DIFFERENCES, NEEDS, RANGES, REFUSED
from alignkit.trainers.ppo_config import PPOConfig
from tests.ppo_factory import ppo_trainer
from tests.tiny_preferences import lora

PACKAGE = Path(alignkit.__file__).parent
OWN = {name for name in vars(PPOConfig)["__annotations__"] if name != "CHECKS"}
# Where options of ours are declared or judged, which is not reading them.
JUDGES = ("ppo_config.py", "ppo_checks.py")
# What Trainer reads itself, declared anew for another default.
TRAINERS_OWN = {"logging_steps", "learning_rate"}


def fields() -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(PPOConfig)}


def sources(*patterns: str) -> str:
    paths = {path for pattern in patterns for path in PACKAGE.glob(pattern) if path.name not in JUDGES}
    return "\n".join(path.read_text() for path in sorted(paths))


@pytest.mark.parametrize("name", sorted(OWN - TRAINERS_OWN))
def test_every_option_of_ours_is_read(name: str):
    code = sources("trainers/ppo*.py")
    assert re.search(rf"\bargs\.{name}\b", code), f"nothing reads {name}"


def test_an_option_that_nothing_reads_would_be_seen():
    assert not re.search(r"\bargs\.beta\b", sources("trainers/ppo*.py"))


def test_every_other_option_is_decided_once():
    others = set(fields()) - OWN
    newer = {"activation_checkpointing_kwargs"}
    undecided = {
        name
        for name in others - newer
        if (name in REFUSED) + (name in DIFFERENCES) + (name in ENGINE_AS_TRL - set(REFUSED) - set(DIFFERENCES)) != 1
        and name not in ENGINE_OWN
    }
    assert undecided == set()
    assert set(REFUSED) | set(DIFFERENCES) | set(RANGES) | set(NEEDS) | set(CHOICES) <= set(fields())


@pytest.mark.parametrize("name", sorted(set(ENGINE_OWN) | {"activation_offloading", "trust_remote_code"}))
def test_options_of_the_engine_are_read_too(name: str):
    assert re.search(
        rf"\bargs\.{name}\b",
        sources(
            "trainers/ppo*.py",
            "trainers/passes.py",
            "trainers/budget.py",
            "trainers/setup.py",
            "trainers/guarded_steps.py",
            "trainers/checkpointing.py",
        ),
    )


def test_every_field_has_a_help_text():
    assert [name for name, field in fields().items() if not field.metadata.get("help", "").strip()] == []


EXAMPLES = {
    "pad_token": "<pad>",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "auto_find_batch_size": True,
    "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1,
    "label_names": ["labels"],
    "train_sampling_strategy": "sequential",
    "length_column_name": "tokens",
    "use_cache": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "average_tokens_across_devices": False,
    "parallelism_config": object(),
    "disable_dropout": False,
    "dataloader_drop_last": True,
    "dataloader_num_workers": 2,
    "dataloader_prefetch_factor": 2,
    "dataloader_persistent_workers": True,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_in_order": False,
    "ddp_find_unused_parameters": True,
    "prediction_loss_only": True,
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options_are_refused_with_their_reason(name: str):
    with pytest.raises(ConfigError) as raised:
        PPOConfig(**{name: EXAMPLES[name]})
    assert str(raised.value).startswith(f"{name}={EXAMPLES[name]!r}: ")
    assert REFUSED[name].reason in str(raised.value)


def test_a_copy_is_accepted():
    dataclasses.replace(PPOConfig())
    dataclasses.replace(PPOConfig(load_best_model_at_end=True, eval_strategy="steps", eval_steps=500))
    dataclasses.replace(PPOConfig(kl_estimator="k3", kl_place="loss", whiten_advantages=False))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "temperature 0": ({"temperature": 0.0}, r"temperature=0\.0: must be positive: greedy completions \(0\) explore"),
    "temperature not a number": ({"temperature": math.nan}, r"temperature=nan: must be positive"),
    "unknown KL estimator": ({"kl_estimator": "k4"}, r"kl_estimator='k4' is unknown\. Known: k1, k2, k3"),
    "unknown KL place": ({"kl_place": "rewards"}, r"kl_place='rewards' is unknown\. Did you mean 'reward'\?"),
    "unknown advantages": (
        {"advantage_estimator": "gea"},
        r"advantage_estimator='gea' is unknown\. Did you mean 'gae'",
    ),
    "unknown engine": (
        {"rollout_engine": "vllm"},
        r"rollout_engine='vllm' is unknown\..* Known: hf, merged, continuous",
    ),
    "unknown error handling": (
        {"on_reward_error": "dropp"},
        r"on_reward_error='dropp' is unknown\. Did you mean 'drop'",
    ),
    "k1 in the loss": ({"kl_place": "loss"}, r"'k1' with kl_place='loss': its gradient is E\[∇ log π\] = 0"),
    "k2 in the reward": ({"kl_estimator": "k2"}, r"'k2' with kl_place='reward': a token that became less likely"),
    "k3 in the reward": ({"kl_estimator": "k3"}, r"'k3' with kl_place='reward': .* training diverges"),
    "whitening beside k2": (
        {"kl_estimator": "k2", "kl_place": "loss"},
        r"kl_place='loss': whitening would rescale the score .* Set whiten_advantages=False",
    ),
    "target without coefficient": ({"kl_target": 6.0, "kl_coef": 0.0}, r"kl_target moves kl_coef by factors"),
    "horizon without target": ({"kl_horizon": 5}, r"kl_horizon=5: has no effect; set kl_target"),
    "one generation": ({"advantage_estimator": "rloo"}, r"num_generations=1: advantage_estimator='rloo' compares"),
    "GAE's gamma": (
        {"advantage_estimator": "rloo", "num_generations": 2, "gamma": 0.9},
        r"gamma=0\.9: has no effect; set advantage_estimator='gae'",
    ),
    "GAE's lambda": ({"advantage_estimator": "rloo", "num_generations": 2, "lam": 0.5}, r"lam=0\.5: has no effect"),
    "a critic without GAE": (
        {"advantage_estimator": "rloo", "num_generations": 2, "value_adapter": True},
        r"value_adapter=True: has no effect",
    ),
    "warm-up without critic": (
        {"advantage_estimator": "rloo", "num_generations": 2, "critic_warmup_rollouts": 3},
        r"critic_warmup_rollouts=3: has no effect",
    ),
    "gamma above 1": ({"gamma": 1.1}, r"gamma=1\.1: must be a number from 0 to 1"),
    "no clipping": ({"cliprange": 0.0}, r"cliprange=0\.0: must be a positive, finite number"),
    "negative KL weight": ({"kl_coef": -0.1}, r"kl_coef=-0\.1: must be a finite number, 0 or more"),
    "half an epoch": ({"num_ppo_epochs": 0.5}, r"num_ppo_epochs=0\.5: must be a whole number, 1 or more"),
    "no mini-batch": ({"num_mini_batches": 0}, r"num_mini_batches=0: must be a whole number, 1 or more"),
    "least above most": (
        {"min_completion_length": 60},
        r"min_completion_length=60: is more than max_completion_length=53",
    ),
    "all of it overlong": (
        {"overlong_buffer_tokens": 53},
        r"overlong_buffer_tokens=53: must be less than max_completion_length=53",
    ),
    "overlong penalty without buffer": (
        {"overlong_penalty": 2.0},
        r"overlong_penalty=2\.0: has no effect; set overlong",
    ),
    "negative penalty": ({"missing_eos_penalty": -1.0}, r"missing_eos_penalty=-1\.0: must be a finite number, 0 or"),
    "clip at zero": ({"reward_clip": 0.0}, r"reward_clip=0\.0: must be a positive"),
    "timeout of zero": ({"reward_timeout_s": 0}, r"reward_timeout_s=0: must be a positive"),
    "weights as text": ({"reward_weights": ["1"]}, r"reward_weights=\['1'\]: '1' is not a finite number"),
    "a weight for a list": ({"reward_weights": 2.0}, r"reward_weights=2\.0: must be a list"),
    "infinite weight": ({"reward_weights": [math.inf]}, r"reward_weights=\[inf\]: inf is not a finite number"),
    "one stop string": ({"stop_strings": "END"}, r"stop_strings='END': is one text; write \['END'\]"),
    "an empty stop string": ({"stop_strings": [""]}, r"stop_strings=\[''\]: '' ends no completion"),
    "length of texts without texts": ({"max_length": 50}, r"max_length=50: has no effect; set ptx_coef"),
    "unknown layout": ({"layout": "pad"}, r"layout='pad' is unknown"),
}


@pytest.mark.parametrize(("options", "message"), CONFIGS.values(), ids=CONFIGS)
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        PPOConfig(**options)


def test_messages_differ(tmp_path: Path):
    found = set()
    for options, _ in CONFIGS.values():
        with pytest.raises(ConfigError) as raised:
            PPOConfig(**options)
        found.add(str(raised.value))
    assert len(found) == len(CONFIGS) >= 25


def test_evaluation_without_prompts_says_so(tmp_path: Path):
    with pytest.raises(ConfigError, match="there are no prompts to evaluate on"):
        ppo_trainer(tmp_path).evaluate()


def test_a_reward_model_with_another_tokenizer(tmp_path: Path):
    """The classifier's tokenizer numbers letters the other way round; its rewards are those of the text."""
    letters = {chr(code): 200 - code for code in range(32, 127)} | {"<pad>": 0, "<unk>": 1}
    backend = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    own = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(3)
    settings: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 256}
    config = LlamaConfig(num_attention_heads=2, num_labels=1, pad_token_id=0, initializer_range=0.5, **settings)
    classifier = LlamaForSequenceClassification(config).eval()
    trainer = ppo_trainer(tmp_path, classifier, reward_processing_classes=own)
    trainer.train()
    rollout = trainer.rollout
    for row, (prompt, text) in enumerate(zip(rollout.prompts.sources, rollout.texts, strict=True)):
        with torch.no_grad():
            expected = classifier(**own(prompt + text, return_tensors="pt")).logits.item()
        assert rollout.rewards.totals[row].item() == pytest.approx(expected, rel=1e-4)


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(EngineConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(ConfigError, match="several GPUs are visible to one process"):
        ppo_trainer(tmp_path, peft_config=lora())
