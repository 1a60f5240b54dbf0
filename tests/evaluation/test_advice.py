"""Each rule speaks of a record that shows its signs, and is silent about runs that go well."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from alignkit.cli import ModelArguments, ScriptArguments
from alignkit.evaluation.advice import DISPLACEMENT_NATS, RULES, advise
from alignkit.hub.record import RunRecord
from alignkit.trainers import callbacks
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.ppo_config import PPOConfig
from tests.evaluation.run_records import PREPARATION, dpo_log, dpo_record, estimate, ppo_log, ppo_record

Change = Callable[[RunRecord], Any]


def in_log(name: str, value: Callable[[float], Any]) -> Change:
    """Set a metric of the log as a function of the share of the run that is done."""

    def change(record: RunRecord) -> None:
        entries = [entry for entry in record.log if name in entry]
        for index, entry in enumerate(entries, start=1):
            entry[name] = value(index / len(entries))

    return change


def metric(name: str, value: Any) -> Change:
    return lambda record: record.evaluations[0]["metrics"].update({name: value})


def prepared(**changes: Any) -> Change:
    return lambda record: record.data[0].update(preparation={**PREPARATION, **changes})


def both(*changes: Change) -> Change:
    return lambda record: [change(record) for change in changes]


DPO: dict[str, tuple[Change, str]] = {
    "values that are no numbers": (in_log("loss", lambda share: math.nan if share == 0.5 else 0.6), "at step 10"),
    "an unfinished run": (lambda record: setattr(record, "finished", None), "resume_from_checkpoint"),
    "no held-out evaluation": (
        both(lambda record: record.evaluations.clear(), lambda record: setattr(record, "log", dpo_log()[:20])),
        "holdout_rows",
    ),
    "no better than length alone": (metric("accuracy", estimate(0.58, 0.52, 0.63)), "the shorter answer"),
    "accuracy falling while the loss falls": (
        in_log("rewards/accuracies", lambda share: 0.7 - 0.2 * share),
        "from 66.5 % to 52.5 %",
    ),
    "likelihood displacement": (in_log("rewards/chosen", lambda share: -1.2 * share), "nats against the reference"),
    "overfitting": (in_log("rewards/accuracies", lambda share: 0.6 + 0.38 * share), "num_train_epochs"),
    "far from the reference": (metric("kl", estimate(25.0, 20.0, 30.0)), "25.0 nats"),
    "gradient spikes": (in_log("grad_norm", lambda share: 60.0 if share > 0.8 else 1.0), "warmup_steps"),
    "a learning rate too low for LoRA": (lambda record: record.settings.update(learning_rate=1e-6), "1e-06"),
    "answers that grew longer": (
        both(metric("tokens", 60.0), lambda record: record.evaluations[0]["baseline"].update(tokens=30.0)),
        "from 30 to 60 tokens",
    ),
    "wins by length": (
        both(
            metric("win_rate", estimate(0.7, 0.6, 0.8)),
            metric("length_controlled_win_rate", estimate(0.5, 0.4, 0.6)),
        ),
        "50.0 % at equal length",
    ),
    "a judge that goes by the order": (metric("order_consistency", estimate(0.5, 0.4, 0.6)), "as judge"),
    "chances that are off": (metric("calibration_error", 0.2), "20.0 %"),
    "dropped rows": (
        prepared(rows_kept=1300, drops={"empty": {"count": 1}, "longer than max_length": {"count": 299}}),
        "raise max_length",
    ),
    "truncated answers": (prepared(truncated_completions=500), "raise max_length"),
    "few held-out rows": (lambda record: record.evaluations[0].update(rows=40), "held-out preferences (40)"),
}
PPO: dict[str, tuple[Change, str]] = {
    "far from the reference": (in_log("objective/kl", lambda share: 25 * share), "25.0 nats"),
    "answers that are cut off": (metric("eos_rate", estimate(0.2, 0.1, 0.3)), "max_completion_length"),
    "a weak critic": (in_log("val/explained_variance", lambda share: 0.02), "value_learning_rate"),
    "dropped rows": (
        prepared(rows_kept=1300, drops={"prompt longer than max_prompt_tokens": {"count": 300}}),
        "raise max_prompt_length",
    ),
    "entropy collapse": (in_log("policy/entropy_avg", lambda share: 1.4 if share < 0.5 else 0.1), "kl_coef"),
}


def names(record: RunRecord) -> list[str]:
    return [each.name for each in advise(record)]


@pytest.mark.parametrize("name", DPO)
def test_a_rule_speaks_of_a_dpo_run_that_shows_its_signs(name: str) -> None:
    change, said = DPO[name]
    record = copy.deepcopy(dpo_record())
    assert names(record) == []
    change(record)
    found = {each.name: each.text for each in advise(record)}
    assert name in found
    assert said in found[name]


@pytest.mark.parametrize("name", PPO)
def test_a_rule_speaks_of_a_ppo_run_that_shows_its_signs(name: str) -> None:
    change, said = PPO[name]
    record = copy.deepcopy(ppo_record())
    assert names(record) == []
    change(record)
    found = {each.name: each.text for each in advise(record)}
    assert name in found
    assert said in found[name]


def test_every_rule_is_tested() -> None:
    assert {rule.name for rule in RULES} <= {*DPO, *PPO}


def test_every_text_names_an_option_that_exists() -> None:
    owners = (DPOConfig, PPOConfig, ScriptArguments, ModelArguments)
    options = {each.name for owner in owners for each in fields(owner)} | {"eval_dataset", "lora_r"}
    for made, changes in ((dpo_record, DPO), (ppo_record, PPO)):
        for name, (change, _) in changes.items():
            record = copy.deepcopy(made())
            change(record)
            text = next(each.text for each in advise(record) if each.name == name)
            named = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", text)) - {"max_prompt_tokens", "entropy_avg"}
            assert named <= options, (name, named - options)
            assert set(re.findall(r"\w+", text)) & (options | {"judge"}), text


def test_displacement_is_what_the_trainer_warns_of() -> None:
    assert DISPLACEMENT_NATS == callbacks.DISPLACEMENT_NATS


def test_noise_is_no_trend() -> None:
    record = dpo_record()
    for index, entry in enumerate(entry for entry in record.log if "grad_norm" in entry):
        entry["rewards/accuracies"] = 0.6 + 0.1 * (-1) ** index
        entry["grad_norm"] = 1.0 if index != 7 else 40.0  # one spike alone
    assert names(record) == []


def test_displacement_needs_a_growing_margin_and_a_beta() -> None:
    record = copy.deepcopy(dpo_record())
    in_log("rewards/chosen", lambda share: -1.2 * share)(record)
    del record.settings["beta"]
    assert names(record) == []
    record.settings["beta"] = 0.1
    in_log("rewards/margins", lambda share: -0.1 * share)(record)
    assert names(record) == []


def test_the_longer_answer_is_a_baseline_too() -> None:
    record = copy.deepcopy(dpo_record())
    metric("shorter", estimate(0.35, 0.3, 0.4))(record)
    assert "preferring the longer answer alone scores 65.0 %" in advise(record)[0].text


@pytest.mark.parametrize(
    ("metrics", "baseline", "name"),
    [
        ({"tokens": 60.0}, {"tokens": 30.0}, "answers that grew longer"),
        ({"k1": estimate(30.0, 25.0, 35.0)}, None, "far from the reference"),
    ],
)
def test_later_evaluations_are_read(metrics: dict[str, Any], baseline: dict[str, Any] | None, name: str) -> None:
    record = dpo_record()
    record.add_evaluation("answers", metrics, rows=200, baseline=baseline)
    assert names(record) == [name]


def test_how_a_later_evaluation_was_cut_is_no_fault_of_the_training() -> None:
    record = dpo_record()
    record.add_evaluation("answers", {"finished": 0.3}, rows=200, baseline={"finished": 0.9})
    assert names(record) == []


def test_a_later_evaluation_on_other_data_does_not_stand_for_the_held_out_rows() -> None:
    record = dpo_record()
    record.add_evaluation(
        "preferences", {"accuracy": estimate(0.25, 0.2, 0.3), "shorter": estimate(0.5, 0.45, 0.55)}, rows=400
    )
    assert names(record) == []


def test_critic_warmup_does_not_count_as_standstill() -> None:
    record = ppo_record(log=ppo_log(8))
    for entry in record.log[:6]:
        entry.update({"policy/clipfrac_avg": 0.0, "policy/approxkl_avg": 0.0, "objective/kl": 0.0})
    record.log = record.log[:6]
    assert "standstill" in names(record)
    record.settings["critic_warmup_rollouts"] = 6
    assert "standstill" not in names(record)


@pytest.mark.parametrize("junk", [None, "x", [], {}, math.nan, True, {"value": "x"}])
def test_junk_in_a_record_is_no_error(junk: Any) -> None:
    record = RunRecord(method="dpo", alignkit="0", created="", base={}, finished="")
    keys = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "objective/kl", "val/explained_variance", "step")
    record.log = [dict.fromkeys(keys, junk) for _ in range(30)]
    record.settings = dict.fromkeys(("learning_rate", "beta", "critic_warmup_rollouts"), junk)
    record.evaluations = [{"name": junk, "rows": junk, "metrics": junk, "baseline": junk}]
    record.data = [{"name": junk, "preparation": junk}, {"name": "train", "preparation": {"drops": junk, "rows_in": 9}}]
    assert isinstance(advise(record), list)
