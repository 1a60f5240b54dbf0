"""Everything about a run in one call: entries for its record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from alignkit.errors import AlignkitError, ConfigError, DataError, ModelError
from alignkit.evaluation.models import PolicyModel, load_policy
from alignkit.evaluation.run import EvaluationOptions, evaluate_run
from alignkit.models.reward_files import RewardModel
from tests.model_factory import tiny_model
from tests.pair_factory import plain_model
from tests.tiny_preferences import character_tokenizer, text_rows

ROWS = [row for row in text_rows(40, seed=3) if all(text.strip() for text in row.values())][:12]
OPTIONS = EvaluationOptions(max_prompts=4, max_new_tokens=6, injected_pairs=3, quiet=True)


def longer(prompts: Sequence[object], first: Sequence[str], second: Sequence[str]) -> list[float]:
    return [
        0.5 + 0.5 * ((len(one) > len(other)) - (len(one) < len(other)))
        for one, other in zip(first, second, strict=True)
    ]


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return load_policy(plain_model("llama"), character_tokenizer())


def reward_model() -> RewardModel:
    base = tiny_model("llama")
    base.config.num_labels = 1
    model: Any = AutoModelForSequenceClassification.from_config(base.config, dtype=torch.float32)
    return RewardModel(model.eval(), character_tokenizer())


def test_a_policy_with_everything(policy: PolicyModel) -> None:
    entries = evaluate_run(policy, data=ROWS, texts=["the cat sat", "on the mat"], judge=longer, options=OPTIONS)
    assert [entry["name"] for entry in entries] == [
        "preferences",
        "answers",
        "kl",
        "win_rate",
        "injections",
        "perplexity",
    ]
    for entry in entries:
        assert entry.keys() == {"name", "rows", "metrics", "baseline", "details"}
        assert all(metric.keys() == {"value", "low", "high"} for metric in entry["metrics"].values())
        assert any(metric["value"] is not None for metric in entry["metrics"].values())
    assert json.loads(json.dumps(entries, allow_nan=False)) == entries
    rows = {entry["name"]: entry["rows"] for entry in entries}
    assert rows == {"preferences": 12, "answers": 4, "kl": 4, "win_rate": 4, "injections": 3, "perplexity": 2}
    metrics = {entry["name"]: entry["metrics"] for entry in entries}
    assert metrics["preferences"]["loss"]["low"] is None
    baselines = {entry["name"]: entry["baseline"] for entry in entries}
    assert baselines["answers"].keys() == metrics["answers"].keys()
    assert baselines["perplexity"]["perplexity"]["value"] != metrics["perplexity"]["perplexity"]["value"]
    assert baselines["preferences"] is None
    assert 0 <= metrics["preferences"]["accuracy"]["low"] <= metrics["preferences"]["accuracy"]["high"] <= 1
    assert len(entries[1]["details"]["samples"]) == 4


def test_entries_say_what_they_were_measured_on(policy: PolicyModel, tmp_path: Path) -> None:
    """Else a record would credit them to the data that the run held out."""
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    options = EvaluationOptions(split="train[:4]", max_prompts=2, max_new_tokens=4, quiet=True)
    for entry in evaluate_run(policy, data=str(path), options=options):
        assert entry["details"]["data"]["source"] == "mine.jsonl [:4]"
        assert entry["details"]["data"]["hub_id"] is None
        assert str(tmp_path) not in json.dumps(entry)
    (answers, _) = evaluate_run(policy, prompts=["why"], options=options)
    assert answers["details"]["data"] == {"source": "given rows", "hub_id": None, "split": None}
    hub = Dataset.from_list(ROWS)
    hub.info.download_checksums = {"hf://datasets/owner/pairs@0123abcd/x.parquet": {"num_bytes": 1, "checksum": None}}
    assert evaluate_run(policy, data=hub, options=options)[0]["details"]["data"]["hub_id"] == "owner/pairs"


def test_what_is_not_given_is_not_measured(policy: PolicyModel) -> None:
    assert [entry["name"] for entry in evaluate_run(policy, prompts=["why"], options=OPTIONS)] == ["answers", "kl"]
    assert [entry["name"] for entry in evaluate_run(policy, texts=["the cat"], options=OPTIONS)] == ["perplexity"]
    alone = load_policy(tiny_model("llama"), character_tokenizer())
    assert [entry["name"] for entry in evaluate_run(alone, prompts=["why"], options=OPTIONS)] == ["answers"]


def test_a_judge_that_is_never_right_costs_nothing_but_its_own_entry(policy: PolicyModel) -> None:
    entries = evaluate_run(
        policy, data=ROWS, judge=lambda prompts, first, second: [0.5] * len(prompts), options=OPTIONS
    )
    assert entries[-1]["name"] == "injections"
    assert entries[-1]["metrics"] == {}
    assert "named none of the 3 better answers" in entries[-1]["details"]["reason"]


def test_a_reward_model(tmp_path: Path) -> None:
    rows = [{**row, "subset": "ab"[number % 2]} for number, row in enumerate(ROWS)]
    entries = evaluate_run(reward_model(), data=rows, options=OPTIONS)
    assert [entry["name"] for entry in entries] == ["preferences", "reward_bench"]
    assert entries[1]["metrics"].keys() == {"overall", "subset/a", "subset/b"}
    (plain,) = evaluate_run(reward_model(), data=ROWS, options=OPTIONS)
    assert plain["name"] == "preferences"


def test_a_folder_is_evaluated_like_the_model_in_it(policy: PolicyModel, tmp_path: Path) -> None:
    model: Any = plain_model("llama")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "run")
    (found,) = evaluate_run(
        tmp_path / "run", data=ROWS, prompts=None, options=OPTIONS, dtype=torch.float32, judge=None
    )[:1]
    (expected,) = evaluate_run(policy, data=ROWS, options=OPTIONS)[:1]
    assert found["metrics"]["margin"]["value"] == pytest.approx(expected["metrics"]["margin"]["value"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ConfigError, "nothing to evaluate on"),
        ({"data": []}, DataError, "no rows"),
        ({"data": [{"question": "a"}]}, DataError, "no format that alignkit understands"),
        ({"data": [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3}, DataError, "none of the 3 rows can be used"),
        ({"prompts": []}, DataError, "no prompt"),
        ({"prompts": ["  "]}, DataError, "none of the 1 rows can be used"),
        ({"texts": ["a"]}, DataError, "two tokens"),
        ({"prompts": ["why"], "judge": "nobody"}, ConfigError, "judge='nobody'"),
        ({"prompts": ["why"], "judge": lambda prompts, first, second: []}, ModelError, "0 verdicts"),
        ({"prompts": ["why"], "judge": lambda prompts, first, second: [float("nan")]}, ModelError, "nan"),
    ],
)
def test_bad_input_is_said(policy: PolicyModel, arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        evaluate_run(policy, options=OPTIONS, **arguments)
    assert isinstance(caught.value, AlignkitError)


def test_models_that_are_not_there_or_do_not_fit_are_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        evaluate_run(str(tmp_path / "nowhere"), data=ROWS)
    with pytest.raises(ConfigError, match="leave prompts out"):
        evaluate_run(reward_model(), data=ROWS, prompts=["why"])
    alone = load_policy(tiny_model("llama"), character_tokenizer())
    with pytest.raises(ConfigError, match="pass reference="):
        evaluate_run(alone, prompts=["why"], judge=longer, options=OPTIONS)
    with pytest.raises(ConfigError, match="nothing is asked"):
        evaluate_run(alone, texts=["the cat"], judge=longer, options=OPTIONS)
    with pytest.raises(ConfigError, match="max_prompts=0"):
        EvaluationOptions(max_prompts=0)
