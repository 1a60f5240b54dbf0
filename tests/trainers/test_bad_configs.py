"""Configurations that must be refused, each with its own message and before anything is loaded or written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.fsdp import StateDictType

from alignkit.errors import CheckpointError, ConfigError
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.config_checks import NEEDS, RANGES
from alignkit.trainers.dpo import DPOTrainer
from alignkit.trainers.passes import refuse_sharded_saves
from alignkit.trainers.setup import check_devices
from tests.model_factory import tiny_model
from tests.tiny_preferences import QUIET, character_tokenizer, lora, token_rows

# (options, the start of the message or a regular expression in it)
CASES = {
    "unknown loss": (
        {"loss_type": "sigmoyd"},
        r"loss_type: unknown loss 'sigmoyd'\. Did you mean 'sigmoid'\? Known: '",
    ),
    "unknown loss in a list": ({"loss_type": ["sigmoid", "kta"]}, r"unknown loss 'kta'\. Did you mean 'kto'\?"),
    "no loss": ({"loss_type": []}, r"loss_type=\[\]: name at least one loss"),
    "loss is a number": ({"loss_type": 3}, r"loss_type=3: name at least one loss"),
    "too few loss weights": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
        r"loss_weights=\[1\.0\]: must be a list with one weight for each of the 2 losses",
    ),
    "too many loss weights": ({"loss_weights": [1.0, 2.0]}, r"one weight for each of the 1 losses"),
    "negative loss weight": (
        {"loss_weights": [-1.0]},
        r"loss_weights=\[-1\.0\]: every weight must be a positive, finite",
    ),
    "zero loss weight": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.0]},
        r"loss_weights=\[1\.0, 0\.0\]: every weight must be a positive, finite number; drop a loss instead of 0",
    ),
    "infinite loss weight": ({"loss_weights": [math.inf]}, r"loss_weights=\[inf\]: every weight must be a positive"),
    "loss weight as text": ({"loss_weights": ["1"]}, r"loss_weights=\['1'\]: every weight must be a positive"),
    "negative beta": ({"beta": -0.1}, r"beta=-0\.1: must be a positive, finite number"),
    "zero beta": ({"beta": 0.0}, r"beta=0\.0: must be a positive, finite number"),
    "beta not a number": ({"beta": math.nan}, r"beta=nan: must be a positive, finite number"),
    "infinite beta": ({"beta": math.inf}, r"beta=inf: must be a positive, finite number"),
    "beta as text": ({"beta": "0.1"}, r"beta='0\.1': must be a positive, finite number"),
    "beta missing": ({"beta": None}, r"beta=None: must be a positive"),
    "negative learning rate": ({"learning_rate": -1e-6}, r"learning_rate=-1e-06: must be a finite number, 0 or more"),
    "learning rate not a number": ({"learning_rate": math.nan}, r"learning_rate=nan: must be a finite number"),
    "empty batch": ({"per_device_train_batch_size": 0}, r"per_device_train_batch_size=0: must be a whole number, 1"),
    "half a batch": ({"per_device_eval_batch_size": 1.5}, r"per_device_eval_batch_size=1\.5: must be a whole number"),
    "no accumulation": ({"gradient_accumulation_steps": 0}, r"gradient_accumulation_steps=0: must be a whole number"),
    "no epoch": ({"num_train_epochs": 0}, r"num_train_epochs=0: must be a positive, finite number"),
    "a word for a switch": (
        {"sync_ref_model": "no"},
        r"sync_ref_model='no': must be True or False, and any text would",
    ),
    "label smoothing for sigmoid": (
        {"label_smoothing": 0.5},
        r"label_smoothing=0\.5: must be in \[0, 0\.5\): it is the probability that a label is flipped",
    ),
    "label smoothing for robust": (
        {"loss_type": "robust", "label_smoothing": -0.1},
        r"label_smoothing=-0\.1: must be in",
    ),
    "label smoothing that nothing reads": (
        {"loss_type": "hinge", "label_smoothing": 0.1},
        r"label_smoothing=0\.1: has no effect with loss_type=\['hinge'\]; it is read by .*'robust'.*'sigmoid'",
    ),
    "EXO without smoothing": (
        {"loss_type": "exo_pair"},
        r"label_smoothing=0\.0: the loss 'exo_pair' needs a value above 0",
    ),
    "unknown divergence": (
        {"f_divergence_type": "forward_lk"},
        r"f_divergence_type: unknown divergence 'forward_lk'\. Did you mean 'forward_kl'\?",
    ),
    "divergence for KTO": (
        {"loss_type": "kto", "f_divergence_type": "forward_kl"},
        r"f_divergence_type='forward_kl': is not defined for 'kto'",
    ),
    "divergence for one of two losses": (
        {"loss_type": ["sigmoid", "apo_zero"], "f_divergence_type": "js_divergence"},
        r"is not defined for 'apo_zero'; use 'reverse_kl'",
    ),
    "divergence that nothing reads": (
        {"loss_type": "sft", "f_divergence_type": "forward_kl"},
        r"f_divergence_type='forward_kl': has no effect with 'sft'",
    ),
    "alpha without its divergence": (
        {"f_alpha_divergence_coef": 0.7},
        r"f_alpha_divergence_coef=0\.7: has no effect; set f_divergence_type='alpha_divergence'",
    ),
    "alpha not finite": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": math.inf},
        r"f_alpha_divergence_coef=inf: must be a finite number",
    ),
    "discopop_tau without discopop": ({"discopop_tau": 0.1}, r"discopop_tau=0\.1: has no effect .*read by 'discopop'"),
    "discopop_tau of zero": ({"loss_type": "discopop", "discopop_tau": 0.0}, r"discopop_tau=0\.0: must be a positive"),
    "simpo_gamma without simpo": ({"simpo_gamma": 1.0}, r"simpo_gamma=1\.0: has no effect .*read by 'simpo'"),
    "cpo_alpha without cpo": ({"cpo_alpha": 0.5}, r"cpo_alpha=0\.5: has no effect .*read by 'cpo'"),
    "dpop_lambda without dpop": ({"dpop_lambda": 5.0}, r"dpop_lambda=5\.0: has no effect .*read by 'dpop'"),
    "negative dpop_lambda": (
        {"loss_type": "dpop", "dpop_lambda": -1.0},
        r"dpop_lambda=-1\.0: must be a finite number, 0",
    ),
    "desirable_weight without kto": ({"desirable_weight": 2.0}, r"desirable_weight=2\.0: has no effect .*by 'kto'"),
    "undesirable_weight without kto": (
        {"undesirable_weight": 2.0},
        r"undesirable_weight=2\.0: has no effect .*by 'kto'",
    ),
    "undesirable_weight of zero": (
        {"loss_type": "kto", "undesirable_weight": 0.0},
        r"undesirable_weight=0\.0: must be a positive",
    ),
    "negative simpo_gamma": (
        {"loss_type": "simpo", "simpo_gamma": -0.5},
        r"simpo_gamma=-0\.5: must be a finite number",
    ),
    "negative cpo_alpha": ({"loss_type": "cpo", "cpo_alpha": -1.0}, r"cpo_alpha=-1\.0: must be a finite number, 0"),
    "desirable_weight of zero": (
        {"loss_type": "kto", "desirable_weight": 0},
        r"desirable_weight=0: must be a positive",
    ),
    "WPO with AOT": ({"loss_type": "aot", "use_weighting": True}, r"use_weighting=True: is not defined for 'aot'"),
    "WPO with KTO": ({"loss_type": "kto", "use_weighting": True}, r"use_weighting=True: is not defined for 'kto'"),
    "ld_alpha above one": ({"ld_alpha": 1.5}, r"ld_alpha=1\.5: must be a number from 0 to 1"),
    "ld_alpha with KTO": (
        {"loss_type": "kto", "ld_alpha": 0.5},
        r"ld_alpha=0\.5: compares the lengths of a pair, and 'kto'",
    ),
    "KTO among paired losses": (
        {"loss_type": ["kto", "sigmoid"]},
        r"loss_type=\['kto', 'sigmoid'\]: 'kto' reads unpaired rows and cannot be mixed with paired losses",
    ),
    "precomputing an unread reference": (
        {"loss_type": ["simpo", "sft"], "precompute_ref_log_probs": True},
        r"precompute_ref_log_probs=True: has no effect: 'sft', 'simpo' does not read a reference",
    ),
    "syncing an unread reference": (
        {"loss_type": "orpo", "sync_ref_model": True},
        r"sync_ref_model=True: has no effect: 'orpo' does not read a reference",
    ),
    "precomputing a moving reference": (
        {"precompute_ref_log_probs": True, "sync_ref_model": True},
        r"precompute_ref_log_probs=True: cannot be combined with sync_ref_model, which changes the reference",
    ),
    "mixup without syncing": (
        {"ref_model_mixup_alpha": 0.5},
        r"ref_model_mixup_alpha=0\.5: has no effect; set sync_ref",
    ),
    "sync steps without syncing": (
        {"ref_model_sync_steps": 64},
        r"ref_model_sync_steps=64: has no effect; set sync_ref",
    ),
    "mixup above one": (
        {"sync_ref_model": True, "ref_model_mixup_alpha": 1.2},
        r"ref_model_mixup_alpha=1\.2: must be a number from 0 to 1",
    ),
    "syncing every zero steps": (
        {"sync_ref_model": True, "ref_model_sync_steps": 0},
        r"ref_model_sync_steps=0: must be a whole number, 1 or more",
    ),
    "cache without precomputing": (
        {"reference_cache_dir": "cache"},
        r"reference_cache_dir='cache': has no effect; set precompute_ref_log_probs=True",
    ),
    "batch size without precomputing": (
        {"precompute_ref_batch_size": 4},
        r"precompute_ref_batch_size=4: has no effect; set precompute_ref_log_probs=True",
    ),
    "precompute batch of zero": (
        {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 0},
        r"precompute_ref_batch_size=0: must be a whole number, 1 or more",
    ),
    "one token": ({"max_length": 1}, r"max_length=1: must be 2 tokens or more"),
    "no tokenizer processes": ({"dataset_num_proc": 0}, r"dataset_num_proc=0: must be a whole number, 1 or more"),
    "dropping more than everything": (
        {"max_drop_fraction": 1.1},
        r"max_drop_fraction=1\.1: must be a number from 0 to 1",
    ),
    "fewer than no bad steps": ({"max_skipped_steps": -1}, r"max_skipped_steps=-1: must be"),
    "unknown truncation": ({"truncation_mode": "middle"}, r"truncation_mode='middle': .*use 'keep_start'"),
    "unknown layout": ({"layout": "pad"}, r"layout='pad' is unknown\. Did you mean 'padded'\?"),
    "padding-free padding": (
        {"padding_free": True, "layout": "padded"},
        r"padding_free=True: contradicts layout='padded'; choose one of them",
    ),
    "multiple without padding": ({"pad_to_multiple_of": 8}, r"pad_to_multiple_of=8: has no effect: layout='auto'"),
    "multiple of zero": (
        {"layout": "padded", "pad_to_multiple_of": 0},
        r"pad_to_multiple_of=0: must be a whole number",
    ),
    "multiple as a word": (
        {"layout": "padded", "pad_to_multiple_of": "eight"},
        r"pad_to_multiple_of='eight': must be a whole number of tokens",
    ),
    "budget of zero": (
        {"max_tokens_per_forward": 0},
        r"max_tokens_per_forward=0: must be a number of tokens, 1 or more",
    ),
    "budget as a word": ({"max_tokens_per_forward": "many"}, r"max_tokens_per_forward='many': must be a number of"),
    "two precisions": ({"fp16": True, "bf16": True}, r"fp16=True: cannot be combined with bf16=True"),
    "model arguments as text": (
        {"model_init_kwargs": "revision=main"},
        r"model_init_kwargs='revision=main' is not a JSON",
    ),
    "model arguments as a list": (
        {"model_init_kwargs": ["revision"]},
        r"model_init_kwargs=\['revision'\]: must be a map",
    ),
    "checkpointing arguments without checkpointing": (
        {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        r"activation_checkpointing_kwargs=.*: has no effect; set activation_checkpointing=True",
    ),
    "eval_steps without evaluation": ({"eval_steps": 50}, r"eval_steps=50: has no effect; set eval_strategy='steps'"),
    "eval_delay without evaluation": ({"eval_delay": 5}, r"eval_delay=5: has no effect; set eval_strategy"),
    "logging_steps per epoch": (
        {"logging_strategy": "epoch", "logging_steps": 5},
        r"logging_steps=5: has no effect; set logging_strategy='steps'",
    ),
    "save_steps per epoch": (
        {"save_strategy": "epoch", "save_steps": 5},
        r"save_steps=5: has no effect; set save_strategy",
    ),
    "save limit without saving": (
        {"save_strategy": "no", "save_total_limit": 2},
        r"save_total_limit=2: has no effect; set save_strategy",
    ),
    "arguments for AdamW": ({"optim_args": "eps=1e-6"}, r"optim_args='eps=1e-6': has no effect; use adam_beta1"),
    "target modules for AdamW": ({"optim_target_modules": "q_proj"}, r"optim_target_modules='q_proj': .*GaLore"),
    "hub strategy without the Hub": (
        {"hub_strategy": "end"},
        r"hub_strategy='end': has no effect; set push_to_hub=True",
    ),
    "whole checkpoints to the Hub": (
        {"push_to_hub": True, "hub_strategy": "all_checkpoints"},
        r"hub_strategy='all_checkpoints': whole checkpoints hold .* use 'every_save' or 'end'",
    ),
    "always pushing nothing": ({"hub_always_push": True}, r"hub_always_push=True: has no effect; set push_to_hub=True"),
    "persistent workers without workers": (
        {"dataloader_persistent_workers": True},
        r"dataloader_persistent_workers=True: has no effect; set dataloader_num_workers",
    ),
    "worker context without workers": (
        {"dataloader_multiprocessing_context": "spawn"},
        r"dataloader_multiprocessing_context='spawn': has no effect; set dataloader_num_workers",
    ),
}


@pytest.mark.parametrize(("options", "message"), CASES.values(), ids=CASES.keys())
def test_bad_config_is_refused(tmp_path, options, message):
    output = tmp_path / "output"
    output.mkdir()
    (output / "adapter.bin").write_bytes(b"an earlier run")
    with pytest.raises(ConfigError, match=message):
        DPOConfig(output_dir=str(output), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert [(path.name, path.read_bytes()) for path in output.iterdir()] == [("adapter.bin", b"an earlier run")]


def test_messages_differ():
    messages = set()
    for options, _ in CASES.values():
        with pytest.raises(ConfigError) as raised:
            DPOConfig(**options)
        messages.add(str(raised.value))
    assert len(messages) == len(CASES) >= 40


def test_every_dependent_option_and_every_range_has_a_case():
    tried = {name for options, _ in CASES.values() for name in options}
    assert set(NEEDS) - {"activation_checkpointing_kwargs"} <= tried  # tried under its older spelling
    assert set(RANGES) <= tried


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="betta"):
        DPOConfig(betta=0.1)


def test_a_stream_without_an_end_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"the training set is a stream.*set max_steps"):
        DPOTrainer(
            tiny_model("llama"),
            args=DPOConfig(str(tmp_path / "run"), **QUIET),
            train_dataset=Dataset.from_list(token_rows(4)).to_iterable_dataset(),
            processing_class=character_tokenizer(),
            peft_config=lora(),
        )
    assert not (tmp_path / "run").exists()


def test_a_moving_reference_is_refused_with_deepspeed(tmp_path: Path) -> None:
    """Its checkpoints leave frozen weights out, and a moving reference is frozen."""
    args = DPOConfig(str(tmp_path), sync_ref_model=True, bf16=False, report_to=[])
    check_devices(args, DistributedType.FSDP, has_reference=False)
    with pytest.raises(ConfigError, match="sync_ref_model moves weights that DeepSpeed's checkpoints leave out"):
        check_devices(args, DistributedType.DEEPSPEED, has_reference=False)


def test_saves_in_shards_are_refused() -> None:
    refuse_sharded_saves(StateDictType.FULL_STATE_DICT)
    with pytest.raises(ConfigError, match=r"as SHARDED_STATE_DICT.*fsdp_state_dict_type: FULL_STATE_DICT"):
        refuse_sharded_saves(StateDictType.SHARDED_STATE_DICT)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_an_output_directory_without_a_name_is_refused(name):
    with pytest.raises(ConfigError, match=r"output_dir=.*names no folder"):
        DPOConfig(output_dir=name)


@pytest.mark.parametrize("name", ["file", "file/run", "dangling", "dangling/run", "loop/run", "n" * 300])
def test_an_output_directory_that_cannot_be_made_is_refused(name, tmp_path):
    (tmp_path / "file").write_bytes(b"an earlier file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="nothing can be written into"):
        DPOTrainer(
            tiny_model("llama"),
            args=DPOConfig(str(tmp_path / name), learning_rate=1e-3, **QUIET),
            train_dataset=token_rows(4),
            processing_class=character_tokenizer(),
            peft_config=lora(),
        )
    assert sorted(tmp_path.iterdir()) == before
