"""The PPO benchmark runs, and what it computes from its measurements is right."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.benchmarks import ppo_vs_trl
from tests.benchmarks.data import read_rows
from tests.benchmarks.ppo_runs import COMPLETION_TOKENS, PROMPTS, PPOJob
from tests.benchmarks.ppo_side import measure
from tests.benchmarks.ppo_vs_trl import choose_rows, disagreements, markdown, save_reward_model, summarise

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's

# The Python of an environment with trl==1.12.0, where there is one: README.md says how to make it.
TRL_PYTHON = os.environ.get("ALIGNKIT_TRL_PYTHON")


def made_up(run: str, seconds: list[float], **values: Any) -> dict[str, Any]:
    """A result as `ppo_side.py` writes it."""
    each = len(seconds)
    numbers = {"rewards": [0.1] * each, "kl": [0.0] * each, "probe_rewards": [0.5, -0.5], "prompt_digest": "same"}
    counts = {"update_positions": [100] * each, "completion_tokens": [384] * each, "versions": {"trl": "1.12.0"}}
    memory = {"peak_above_loaded_bytes": 2e9, "process_peak_bytes": 4e9, "setup_seconds": 1.0}
    return {"run": run, "update_seconds": seconds, **numbers, **counts, **memory, **values}


@pytest.fixture(scope="module")
def job(tiny_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PPOJob:
    folder = tmp_path_factory.mktemp("job")
    rows = choose_rows(read_rows("hh", data_folder), AutoTokenizer.from_pretrained(tiny_folder))
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    files = map(str, (folder / "rows.json", *save_reward_model(str(tiny_folder), folder)))
    return PPOJob("ours", str(tiny_folder), *files, str(folder), updates=1, warmup=1, threads=torch.get_num_threads())


def test_rows_are_different_prompts_with_a_completion_to_reward(job: PPOJob) -> None:
    rows = json.loads(Path(job.rows).read_text(encoding="utf-8"))
    assert len({tuple(row["prompt_ids"]) for row in rows}) == PROMPTS
    assert all(0 < len(row["probe_ids"]) <= COMPLETION_TOKENS for row in rows)


def test_too_few_prompts_are_an_error(data_folder: Path, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="1 prompts of up to 256 tokens, 8 are needed"):
        choose_rows(read_rows("hh", data_folder)[:1], AutoTokenizer.from_pretrained(tiny_folder))


def test_medians_leave_the_warm_up_out() -> None:
    results = [made_up("ours", [99.0, 2.0, 4.0, 3.0]), made_up("ours", [99.0, 4.0, 4.0, 5.0])]
    summary = summarise(results, warmup=1)["ours"]
    assert (summary["seconds"], summary["fastest_seconds"], summary["slowest_seconds"]) == (4.0, 2.0, 5.0)


def test_bars_are_reported_and_never_asserted() -> None:
    theirs = made_up("trl_default", [6.0], peak_above_loaded_bytes=4e9)
    results = [theirs, made_up("ours_full_length", [1.5]), made_up("ours", [1.0])]
    about = {"command": "c", "commit": "abc", "cpu": "x", "versions": {}}
    counts = dict.fromkeys(("threads", "updates", "warmup", "repeats"), 1)
    report = {"environment": about, "results": results, "disagreements": [], "data": "hh", **counts}
    text = markdown(report, summarise(results, warmup=0))
    assert "| speed: `ours_full_length` against `trl_default` | 4.00 | ≥ 3.00 | reached |" in text
    assert "| memory: `ours_full_length` against `trl_default` | 0.50 | ≤ 0.40 | not reached |" in text
    assert "| speed: `ours` against `trl_default` | 6.00 | – |  |" in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompt_digest": "other"}, "other prompts"),
        ({"probe_rewards": [0.5, -0.4]}, "by up to 0.1000"),
        ({"probe_rewards": [float("nan"), -0.5]}, "reward the same completions differently"),
        ({"kl": [-0.6]}, "starts with a KL of -0.600"),
    ],
)
def test_sides_that_disagree_are_named(changed: dict[str, Any], said: str) -> None:
    (found,) = disagreements([made_up("ours", [1.0]), made_up("trl_best", [1.0], **changed)])
    assert said in found
    assert "trl_best" in found


def test_sides_that_agree_up_to_rounding_pass() -> None:
    near = made_up("trl_best", [1.0], probe_rewards=[0.52, -0.51], kl=[0.2])
    assert disagreements([made_up("ours", [1.0]), near]) == []


def test_trls_runs_need_trls_python(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ppo_vs_trl.parse_arguments(["--runs", "ours,trl_best"])
    assert "trl_best needs --trl-python" in capsys.readouterr().err


@pytest.mark.parametrize("run", ["ours", "ours_full_length"])
def test_our_side_measures_a_run(run: str, job: PPOJob) -> None:
    result = json.loads(json.dumps(measure(replace(job, run=run))))
    assert len(result["update_seconds"]) == len(result["rewards"]) == len(result["completion_tokens"]) == 2
    assert min(result["update_seconds"]) > 0
    assert min(result["update_positions"]) > 0
    assert result["kl"][0] == 0.0
    assert result["process_peak_bytes"] > 0
    tokens = PROMPTS * COMPLETION_TOKENS
    if run == "ours_full_length":
        assert result["completion_tokens"] == [tokens, tokens]
    else:
        assert max(result["completion_tokens"]) <= tokens


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sides_agree_on_a_tiny_model(tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    runs = ["ours_full_length", *(["trl_default", "trl_best"] if TRL_PYTHON else [])]
    out = tmp_path / "results.json"
    asked = f"--data-folder {data_folder} --model {tiny_folder} --updates 1 --repeats 1 --threads 1 --out {out}"
    trl = ["--trl-python", TRL_PYTHON] if TRL_PYTHON else []
    assert ppo_vs_trl.main([*asked.split(), "--runs", ",".join(runs), *trl]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [result["run"] for result in report["results"]] == runs
    assert report["disagreements"] == []
    assert "alignkit, EOS forbidden" in out.with_suffix(".md").read_text(encoding="utf-8")
