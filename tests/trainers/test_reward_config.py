"""RewardConfig: TRL's fields and defaults, every one decided once, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from alignkit.errors import ConfigError
from alignkit.trainers.config_engine import EngineConfig
from alignkit.trainers.config_table_engine import ENGINE_REFUSED
from alignkit.trainers.reward_config import RANGES, TABLE, RewardConfig
from tests.trainers.test_config import REFUSED_EXAMPLES, default_of, fields_of


@pytest.fixture(scope="module")
def trl_fields() -> dict[str, dataclasses.Field]:
    trl = pytest.importorskip("trl", reason="the walk over TRL's fields needs TRL, which needs Python 3.11")
    return fields_of(trl.RewardConfig)


def test_every_trl_field_exists_with_its_default(trl_fields):
    ours = fields_of(RewardConfig)
    assert set(trl_fields) <= set(ours)
    unequal = {name for name, field in trl_fields.items() if default_of(ours[name]) != default_of(field)}
    assert unequal == {"logging_nan_inf_filter"}


def test_every_trl_field_is_decided_once(trl_fields):
    tables = (TABLE.as_trl, set(TABLE.differences), set(TABLE.refused))
    assert [name for name in trl_fields if sum(name in table for table in tables) != 1] == []
    assert all(TABLE.describe(name) for name in trl_fields)


def test_tables_name_only_fields_and_the_rest_is_ours(trl_fields):
    ours = set(fields_of(RewardConfig))
    assert TABLE.as_trl | set(TABLE.differences) | set(TABLE.refused) | set(TABLE.own) == ours
    assert set(TABLE.own) == ours - set(trl_fields) - {"activation_checkpointing", "activation_checkpointing_kwargs"}
    assert set(RANGES) <= ours


def test_describe():
    assert TABLE.describe("eos_token") == "as TRL"
    assert TABLE.describe("use_cache").startswith("only False: ")
    assert "counted" in TABLE.describe("max_length")
    with pytest.raises(KeyError):
        TABLE.describe("num_heads")


@pytest.mark.parametrize("name", ENGINE_REFUSED)
def test_refused_fields_are_refused_with_their_reason(name):
    with pytest.raises(ConfigError) as raised:
        RewardConfig(**{name: REFUSED_EXAMPLES[name]})
    assert str(raised.value).startswith(f"{name}={REFUSED_EXAMPLES[name]!r}: ")
    assert ENGINE_REFUSED[name].reason in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, r"num_heads=0: must be a whole number, 1 or more"),
        ({"num_heads": 1.5}, r"num_heads=1\.5: must be a whole number"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0\.5: must be in \[0, 0\.5\)"),
        ({"center_rewards_coefficient": -0.01}, r"center_rewards_coefficient=-0\.01: must be a finite number, 0 or"),
        ({"max_length": 1}, r"max_length=1: must be 2 tokens or more"),
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0: must be a finite number"),
        ({"layout": "prefix"}, r"layout='prefix' is unknown"),
        ({"pad_to_multiple_of": 8}, r"pad_to_multiple_of=8: has no effect: layout='auto' does not pad"),
        ({"max_tokens_per_forward": 0}, r"max_tokens_per_forward=0: must be a number of tokens"),
        ({"eval_steps": 5}, r"eval_steps=5: has no effect; set eval_strategy='steps'"),
        ({"bf16": True, "fp16": True}, r"fp16=True: cannot be combined with bf16=True"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        RewardConfig(**options)


def test_help_defaults_and_copies():
    assert [name for name, field in fields_of(RewardConfig).items() if not field.metadata.get("help", "").strip()] == []
    config = RewardConfig(num_heads=3, center_rewards_coefficient=0.01)
    assert isinstance(config, EngineConfig)
    assert dataclasses.replace(config).num_heads == 3
    assert {name: vars(RewardConfig())[name] for name in TABLE.own} == {
        "layout": "auto",
        "max_tokens_per_forward": "auto",
        "max_drop_fraction": 0.2,
        "weights_only_resume": False,
        "max_skipped_steps": 3,
        "label_smoothing": 0.0,
        "num_heads": 1,
    }
