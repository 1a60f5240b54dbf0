"""Each diagnosis of PPO on a history that shows it, on one that nearly does, and on healthy ones."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import Any

import pytest

from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.ppo_diagnosis import DIAGNOSES, diagnose
from tests.trainers.ppo_histories import CASES, OTHER_SIGNS, Rows, changed, healthy


def names(history: Rows) -> list[str]:
    return [finding.name for finding in diagnose(history)]


def test_every_diagnosis_has_a_case():
    assert list(CASES) == [diagnosis.name for diagnosis in DIAGNOSES]


@pytest.mark.parametrize("name", CASES)
def test_a_history_that_shows_it_gets_this_diagnosis_alone(name):
    sick, nearly = CASES[name]
    assert names(sick) == [name]
    assert names(nearly) == []


@pytest.mark.parametrize("case", OTHER_SIGNS)
def test_other_signs_of_the_same(case):
    name, history = OTHER_SIGNS[case]
    assert names(history) == [name]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 10, 20, 40, 400])
def test_a_healthy_run_gets_none_at_any_time(count):
    history = healthy(count)
    for length in range(count + 1):
        assert names(history[:length]) == []


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_said_of_metrics_that_are_missing(name):
    """Without a critic, an ensemble, or reports of completions."""
    sick, _ = CASES[name]
    for missing in {key for row in sick for key in row}:
        assert set(names([{key: value for key, value in row.items() if key != missing} for row in sick])) <= {name}
    assert names([{} for _ in sick]) == []


def test_a_metric_that_some_rollouts_lack_is_judged_by_the_others():
    rows = changed(last=6, val__explained_variance=-0.1)
    del rows[-2]["val/explained_variance"]
    assert names(rows) == ["dead critic"]


def test_numbers_that_are_not_finite_are_no_finding():
    assert names(changed(last=5, **dict.fromkeys(("objective__kl", "policy__entropy_avg"), float("nan")))) == []


@pytest.mark.parametrize("name", CASES)
def test_findings_say_what_to_change(name):
    (finding,) = diagnose(CASES[name][0])
    options = {option.name for option in fields(PPOConfig)}
    assert set(re.findall(r"\w+", finding.remedy)) & options
    written = set(re.findall(r"(\w+)(?:=|: )", finding.remedy))
    assert all(word in options for word in written if "_" in word or word in ("temperature", "gamma")), written
    assert finding.explanation.endswith(".")
    assert finding.remedy.endswith(".")
    assert re.search(r"\d", finding.evidence)
    assert 1 <= finding.rollouts <= 10


def test_values_that_remedies_give_are_ones_that_the_config_takes(tmp_path):
    text = " ".join(diagnosis.remedy for diagnosis in DIAGNOSES)
    for name, value in re.findall(r"(\w+)=([\w.']+[\w'])", text):
        options: dict[str, Any] = {name: json.loads(value.replace("'", '"').replace("True", "true"))}
        if name == "overlong_penalty":
            options["overlong_buffer_tokens"] = 13
        if name == "advantage_estimator":
            options["num_generations"] = 2
        PPOConfig(str(tmp_path), report_to=[], bf16=False, **options)


def test_evidence_has_the_numbers():
    (finding,) = diagnose(changed(last=3, objective__kl=-0.5))
    assert finding.evidence == "objective/kl was -0.5, -0.5, -0.5 nats in the last 3 rollouts"
    (finding,) = diagnose(changed(last=3, policy__entropy_avg=0.3))
    assert finding.evidence == "policy/entropy_avg went from 1.49 at the start to 0.3 nats over the last 3 rollouts"
