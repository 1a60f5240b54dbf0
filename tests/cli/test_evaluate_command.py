"""`alignkit eval` on a tiny run: what it prints, and what it leaves in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification
from typer.testing import CliRunner

from alignkit.cli.main import app
from alignkit.errors import ConfigError
from alignkit.hub.record import RunRecord
from alignkit.models.adapters import add_adapter
from tests.hub.record_factory import make_record
from tests.model_factory import tiny_config, tiny_model
from tests.pair_factory import fill_adapter, lora_config
from tests.tiny_preferences import character_tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with two checkpoints, of which the later one has moved."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    folder = tmp_path / "run"
    for name, scale in (("checkpoint-1", 0.0), ("checkpoint-2", 0.3), (".", 0.3)):
        torch.manual_seed(0)
        adapted = add_adapter(tiny_model("llama"), lora_config())
        if scale:
            fill_adapter(adapted, scale=scale)
        adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        adapted.save_pretrained(folder / name)
    character_tokenizer().save_pretrained(folder)
    make_record().save(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q {word} ", "chosen": "ab", "rejected": "cde"} for word in ("a", "b", "c")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    LlamaForSequenceClassification(tiny_config("llama", num_labels=1)).save_pretrained(tmp_path / "reward")
    character_tokenizer().save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def test_the_frontier_of_a_runs_checkpoints_goes_into_its_record(run: Path, data: Path, reward: Path) -> None:
    options = ["--data", str(data), "--frontier", str(reward), "--max-new-tokens", "4", "--json"]
    finished = CliRunner().invoke(app, ["eval", str(run), *options], catch_exceptions=False)
    assert finished.exit_code == 0, finished.output
    evaluations = {each["name"]: each for each in json.loads(finished.stdout)["evaluations"]}
    metrics = evaluations["frontier"]["metrics"]
    assert set(metrics) == {
        f"{name}/{what}" for name in ("checkpoint-1", "checkpoint-2", "final") for what in ("kl", "reward")
    }
    assert metrics["checkpoint-1/kl"]["value"] == pytest.approx(0.0, abs=1e-3)
    assert metrics["checkpoint-2/kl"] == metrics["final/kl"]
    assert metrics["checkpoint-2/kl"]["value"] != metrics["checkpoint-1/kl"]["value"]
    assert evaluations["frontier"]["rows"] == 9
    kept = RunRecord.load(run).evaluation("frontier")
    assert kept is not None
    assert kept["metrics"] == metrics
    assert (run / "report.html").is_file()


def test_a_frontier_needs_prompts(run: Path, reward: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("ab cd ef gh", encoding="utf-8")
    with pytest.raises(ConfigError, match="--frontier needs prompts to answer"):
        CliRunner().invoke(
            app, ["eval", str(run), "--texts", str(texts), "--frontier", str(reward)], catch_exceptions=False
        )
