"""DPOConfig: TRL's fields and defaults, the table of differences, spellings, and what the device decides."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.functional.divergence import DIVERGENCES
from alignkit.functional.preference import LOSSES, LossOptions
from alignkit.trainers import config_engine as config_module
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.config_checks import NEEDS, RANGES
from alignkit.trainers.config_engine import warn_low_lora_learning_rate
from alignkit.trainers.config_table import AS_TRL, DIFFERENCES, OWN_FIELDS, REFUSED, describe

# A value of each refused option that is not accepted.
REFUSED_EXAMPLES = {
    "truncation_mode": "keep_end",
    "pad_token": "<pad>",
    "router_aux_loss_coef": 0.01,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "auto_find_batch_size": True,
    "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1,
    "label_names": ["labels"],
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "tokens",
    "use_cache": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "average_tokens_across_devices": False,
    "parallelism_config": object(),
}


def fields_of(config_class: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(config_class)}


def default_of(field: dataclasses.Field) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


# The two defaults that are not TRL's; every other difference is one of meaning.
OTHER_DEFAULTS = {"logging_nan_inf_filter": False}


@pytest.fixture(scope="module")
def trl_fields() -> dict[str, dataclasses.Field]:
    trl = pytest.importorskip("trl", reason="the walk over TRL's fields needs TRL, which needs Python 3.11")
    return fields_of(trl.DPOConfig)


def test_every_trl_field_exists_with_its_default(trl_fields):
    ours = fields_of(DPOConfig)
    assert set(trl_fields) <= set(ours)
    unequal = {name for name, field in trl_fields.items() if default_of(ours[name]) != default_of(field)}
    assert unequal == set(OTHER_DEFAULTS)
    assert {name: default_of(ours[name]) for name in OTHER_DEFAULTS} == OTHER_DEFAULTS


def test_every_trl_field_is_decided_once(trl_fields):
    tables = (AS_TRL, set(DIFFERENCES), set(REFUSED))
    undecided = [name for name in trl_fields if sum(name in table for table in tables) != 1]
    assert undecided == []
    assert all(describe(name) for name in trl_fields)


def test_tables_name_only_fields_and_the_rest_is_ours(trl_fields):
    ours = set(fields_of(DPOConfig))
    assert AS_TRL | set(DIFFERENCES) | set(REFUSED) | set(OWN_FIELDS) == ours
    assert set(OWN_FIELDS) == ours - set(trl_fields) - {"activation_checkpointing", "activation_checkpointing_kwargs"}


def test_describe():
    assert describe("max_length") == "as TRL"
    assert describe("use_cache").startswith("only False: ")
    assert "cDPO" in describe("label_smoothing")
    with pytest.raises(KeyError):
        describe("layout")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_fields_are_refused_with_their_reason(name):
    with pytest.raises(ConfigError) as raised:
        DPOConfig(**{name: REFUSED_EXAMPLES[name]})
    assert str(raised.value).startswith(f"{name}={REFUSED_EXAMPLES[name]!r}: ")
    assert REFUSED[name].reason in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, refusal in REFUSED.items() for value in refusal.accepted]
)
def test_accepted_values_of_refused_fields(name, value):
    assert vars(DPOConfig(**{name: value}))[name] == value


def test_every_field_has_a_help_text():
    without = [name for name, field in fields_of(DPOConfig).items() if not field.metadata.get("help", "").strip()]
    assert without == []


def test_losses_and_config_agree_on_defaults():
    ours = fields_of(DPOConfig)
    for field in dataclasses.fields(LossOptions):
        if field.name != "divergence":
            assert default_of(ours[field.name]) == field.default, field.name
    assert frozenset[str]().union(*(spec.options for spec in LOSSES.values())) <= set(ours)
    assert set(RANGES) | set(NEEDS) <= set(ours)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_can_be_configured(name):
    smoothing = 1e-3 if name == "exo_pair" else 0.0
    assert DPOConfig(loss_type=name, label_smoothing=smoothing).loss_type == [name]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_can_be_configured(name):
    coef = 0.3 if DIVERGENCES[name].reads_coef else 0.5
    assert DPOConfig(f_divergence_type=name, f_alpha_divergence_coef=coef).f_divergence_type == name


def test_construction_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = DPOConfig(output_dir=str(tmp_path / "out"))
    assert config.reference_cache_path == tmp_path / ".cache/alignkit/reference"
    assert list(tmp_path.iterdir()) == []


def test_reference_cache_path_can_be_chosen():
    config = DPOConfig(precompute_ref_log_probs=True, reference_cache_dir="~/elsewhere")
    assert config.reference_cache_path == Path.home() / "elsewhere"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eval_strategy": "steps"},
        {"loss_type": "kto", "desirable_weight": 2.0, "per_device_train_batch_size": 1},
        {"layout": "padded", "pad_to_multiple_of": 8},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0},
        {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 16},
        {"gradient_checkpointing": False},
        {"activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"optim": "rmsprop", "optim_args": "alpha=0.9"},
        {"metric_for_best_model": "loss", "load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 10},
    ],
)
def test_a_copy_is_accepted_and_equal(options):
    config = DPOConfig(**options)
    copy = dataclasses.replace(config)
    assert {**vars(copy), "accelerator_config": None, "distributed_state": None} == {
        **vars(config),
        "accelerator_config": None,
        "distributed_state": None,
    }


def test_a_copy_may_stop_evaluating():
    config = DPOConfig(eval_strategy="steps")
    assert config.eval_steps == 10
    assert dataclasses.replace(config, eval_strategy="no").eval_strategy == "no"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"activation_checkpointing": False}, False),
        ({"gradient_checkpointing": False}, False),
        ({"gradient_checkpointing": None}, False),
        ({"activation_checkpointing": True, "gradient_checkpointing": False}, True),
    ],
)
def test_both_spellings_of_checkpointing(options, expected):
    config = DPOConfig(**options)
    assert (config.activation_checkpointing, config.gradient_checkpointing) == (expected, expected)


@pytest.mark.parametrize("name", ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"])
@pytest.mark.parametrize("value", [{"use_reentrant": False}, '{"use_reentrant": false}'])
def test_both_spellings_of_checkpointing_arguments(name, value):
    config = DPOConfig(**{name: value})
    assert config.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, (True, False)), (torch.float16, (False, True)), (torch.float32, (False, False))],
)
def test_precision_follows_the_device(monkeypatch, dtype, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(config_module, "compute_dtype", lambda device: dtype)
    config = DPOConfig()
    assert (config.bf16, config.fp16) == expected


@pytest.mark.parametrize(
    ("options", "launched_with", "expected"),
    [
        ({"bf16": False}, "no", (False, False)),
        ({"bf16": True}, "no", (True, False)),
        ({"fp16": True}, "no", (False, True)),
        ({}, "fp16", (False, True)),
        ({}, "bf16", (True, False)),
        ({"bf16": False}, "bf16", (False, False)),
    ],
)
def test_precision_that_was_asked_for_is_kept(monkeypatch, options, launched_with, expected):
    opposite = torch.float16 if expected[0] else torch.bfloat16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
    monkeypatch.setattr(config_module, "compute_dtype", lambda device: opposite)
    config = DPOConfig(**options)
    assert (config.bf16, config.fp16) == expected


def test_use_cpu_follows_the_device(monkeypatch):
    monkeypatch.setattr(config_module, "training_device", lambda: torch.device("cpu"))
    assert DPOConfig().use_cpu is True
    monkeypatch.setattr(config_module, "training_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(config_module, "compute_dtype", lambda device: torch.float32)
    assert DPOConfig().use_cpu is False


@pytest.mark.parametrize(
    ("value", "expected"), [("auto", "auto"), (None, None), ("none", None), (2048, 2048), ("2048", 2048)]
)
def test_token_budget_spellings(value, expected):
    assert DPOConfig(max_tokens_per_forward=value).max_tokens_per_forward == expected


@pytest.mark.parametrize(("value", "expected"), [("auto", None), (None, None), ("none", None), (64, 64), ("64", 64)])
def test_padding_multiple_spellings(value, expected):
    assert DPOConfig(layout="padded", pad_to_multiple_of=value).pad_to_multiple_of == expected


def test_model_init_kwargs_from_json():
    assert DPOConfig(model_init_kwargs='{"revision": "main"}').model_init_kwargs == {"revision": "main"}


def test_padding_free_is_accepted_with_one_line(caplog):
    with caplog.at_level(logging.INFO, logger="alignkit"):
        assert DPOConfig(padding_free=True).padding_free is True
    assert [record.getMessage() for record in caplog.records if record.name.startswith("alignkit")] == [
        "padding_free=True changes nothing: the layout 'auto' holds no padding."
    ]


def test_defaults_of_our_own():
    config = DPOConfig()
    own = {name: vars(config)[name] for name in OWN_FIELDS}
    assert own == {
        "layout": "auto",
        "max_tokens_per_forward": "auto",
        "max_drop_fraction": 0.2,
        "weights_only_resume": False,
        "max_skipped_steps": 3,
        "simpo_gamma": 0.5,
        "cpo_alpha": 1.0,
        "dpop_lambda": 50.0,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "reference_cache_dir": None,
    }


def test_low_lora_learning_rate_warns():
    with pytest.warns(UserWarning, match=r"learning_rate=1e-06 is meant for full fine-tuning"):
        warn_low_lora_learning_rate(DPOConfig())


@pytest.mark.parametrize("learning_rate", [0.0, 1e-5, 1e-4])
def test_usual_learning_rates_do_not_warn(learning_rate):
    warn_low_lora_learning_rate(DPOConfig(learning_rate=learning_rate))  # a warning is an error here
