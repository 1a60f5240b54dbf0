"""The benchmarks run, and what they compute from their measurements is right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from alignkit.data.layout import SHARED_START_TOKENS
from tests.benchmarks import dpo_vs_trl
from tests.benchmarks.arithmetic import Ceiling, ModelShape, StepOperations, model_shape, step_operations, visible_pairs
from tests.benchmarks.data import DATASETS, first_rows, read_rows
from tests.benchmarks.profiling import GROUPS
from tests.benchmarks.report import LOSS_TOLERANCE, Result, disagreements, ratio, ratios_table, summarise
from tests.benchmarks.runs import BARS, Job
from tests.benchmarks.side import measure
from tests.model_factory import tiny_model


def made_up(run: str, seconds: list[float], **values: object) -> Result:
    """A result as `side.py` writes it."""
    numbers = {"loss": [0.6931], "grad_norm": [2.0], "logps_chosen": [-100.0], "data_digest": "same"}
    memory = {"peak_above_loaded_bytes": 3e9, "process_peak_bytes": 4e9, "setup_seconds": 1.0}
    return {"run": run, "step_seconds": seconds, "step_positions": [10] * len(seconds), **numbers, **memory, **values}


@pytest.mark.parametrize("name", DATASETS)
def test_rows_are_read_as_prompt_and_completions(name: str, data_folder: Path, tiny_folder: Path) -> None:
    rows = read_rows(name, data_folder)
    assert len(rows) == 40
    assert {frozenset(row) for row in rows} == {frozenset({"prompt", "chosen", "rejected"})}
    assert isinstance(rows[0]["prompt"], str) == (name == "hh_text")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    assert first_rows(rows, 16, tokenizer, max_length=1024) == rows[:16]
    with pytest.raises(ValueError, match="40 usable pairs among 40, 41 are needed"):
        first_rows(rows, 41, tokenizer, max_length=1024)


def test_visible_pairs_are_those_of_a_mask() -> None:
    prompt, chosen, rejected = 3, 2, 4
    length = prompt + chosen + rejected
    mask = torch.ones(length, length).tril()
    mask[prompt + chosen :, prompt : prompt + chosen] = 0
    assert visible_pairs(prompt, chosen, rejected) == mask.sum()


def test_operations_follow_the_formula() -> None:
    shape = ModelShape(hidden=4, feed_forward=8, vocabulary=10, block_weights=100, lora_weights=7, attention_width=6)
    # T = 9, S = 6, A = 15 + 4 * 3 + 10 = 37; head: 2 * 4 * 10 * 6 = 480 a pass
    both = step_operations(shape, [[3, 2, 4]], 0, with_reference=True)
    assert both.blocks == (4 * 100 * 9 + 6 * 7 * 9 + 12 * 6 * 37) + (2 * 100 * 9 + 4 * 6 * 37)
    assert both.head == 3 * 480
    alone = step_operations(shape, [[3, 2, 4]], 0, with_reference=False)
    assert (alone.blocks, alone.head) == (4 * 100 * 9 + 6 * 7 * 9 + 12 * 6 * 37, 2 * 480)
    # Three pairs whose prompts begin with the same two tokens: 2 · 2 tokens less, and 2 · (1 + 2) seen keys less.
    shared = step_operations(shape, [[3, 2, 4]] * 3, 2, with_reference=False)
    assert (shared.blocks, shared.head) == (4 * 100 * 23 + 6 * 7 * 23 + 12 * 6 * 105, 3 * 2 * 480)
    assert Ceiling(100.0, 10.0).seconds(StepOperations(200.0, 30.0)) == 5.0


def test_shape_of_a_model_counts_its_matrices() -> None:
    shape = model_shape(tiny_model("llama"), rank=4)  # per layer: q, o 32×32; k, v 32×16; three of 32×64
    assert shape.block_weights == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert shape.lora_weights == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    assert (shape.hidden, shape.feed_forward, shape.vocabulary, shape.attention_width) == (32, 64, 128, 64)


def test_medians_leave_the_warm_up_out() -> None:
    results = [made_up("ours", [99.0, 2.0, 4.0, 3.0]), made_up("ours", [99.0, 4.0, 4.0, 5.0])]
    summary = summarise(results, warmup=1)["ours"]
    assert (summary.seconds, summary.fastest_seconds, summary.slowest_seconds) == (4.0, 2.0, 5.0)
    assert summary.pairs_per_second == 2.0


def test_bars_are_reported_and_never_asserted() -> None:
    results = [made_up("ours", [1.0]), made_up("trl_default", [8.5]), made_up("trl_best", [3.5])]
    summaries = summarise(results, warmup=0)
    speed, best, _, memory = BARS[:4]
    assert ratio(speed, summaries) == 8.5
    assert ratio(memory, summaries) == 1.0
    table = ratios_table(summaries, "hh")
    assert f"| {speed.label} | 8.50 | ≥ 8.00 | reached |" in table
    assert f"| {best.label} | 3.50 | ≥ 4.00 | not reached |" in table
    assert f"| {memory.label} | 1.00 | ≤ 0.33 | not reached |" in table
    assert "reached" not in ratios_table(summaries, "en_demo")


@pytest.mark.parametrize(
    ("run", "changed", "said"),
    [
        ("trl_best", {"loss": [0.6950]}, "other first losses"),
        ("trl_best", {"loss": [math.nan]}, "other first losses"),
        ("trl_best_precomputed", {"loss": [0.7040]}, "other first losses"),
        ("trl_best", {"grad_norm": [2.11]}, "grad_norm"),
        ("trl_best", {"logps_chosen": [-101.1]}, "logps_chosen"),
        ("trl_best", {"data_digest": "other"}, "other tokens"),
    ],
)
def test_sides_that_disagree_are_named(run: str, changed: dict, said: str) -> None:
    (found,) = disagreements([made_up("ours", [1.0]), made_up(run, [1.0], **changed)])
    assert said in found
    assert run in found


def test_sides_that_agree_up_to_rounding_pass() -> None:
    near = made_up("trl_best", [1.0], loss=[0.6938], grad_norm=[2.09], logps_chosen=[-100.9])
    precomputed = made_up("ours_precomputed", [1.0], loss=[0.6990])
    assert disagreements([made_up("ours", [1.0]), near, precomputed]) == []


def test_unknown_runs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dpo_vs_trl.parse_arguments(["--runs", "ours,fast"])
    assert "no run is called 'fast'" in capsys.readouterr().err


@pytest.mark.parametrize(("run", "passes"), [("ours", 2), ("ours_precomputed", 1), ("ours_checkpointing", 2)])
def test_our_side_measures_a_run(run: str, passes: int, tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    rows, read = tmp_path / "rows.json", read_rows("hh", data_folder)[:16]
    for row in read:  # a start that all prompts share
        row["prompt"][0]["content"] = f"Please answer in English. {row['prompt'][0]['content']}"
    rows.write_text(json.dumps(read), encoding="utf-8")
    threads = torch.get_num_threads()
    job = Job(run, str(tiny_folder), str(rows), str(tmp_path), steps=1, warmup=1, threads=threads, profile=True)
    result = json.loads(json.dumps(measure(job)))
    assert len(result["step_seconds"]) == len(result["loss"]) == len(result["grad_norm"]) == 2
    assert min(result["step_seconds"]) > 0
    # by the policy, and by the reference where it is in the loop; no padding, each prompt once, its start once for all
    shared = result["shared_starts"][1]
    assert shared > SHARED_START_TOKENS
    assert result["step_positions"][1] == passes * (sum(map(sum, result["lengths"][8:])) - 7 * shared)
    assert result["loss"][0] == pytest.approx(math.log(2), abs=LOSS_TOLERANCE)
    assert result["process_peak_bytes"] >= result["loaded_bytes"] > 0
    assert set(result["profile"]) == set(GROUPS)
    assert min(result["profile"][name] for name in ("matrix products", "LoRA", "attention", "head", "optimizer")) > 0


@pytest.mark.slow
def test_sides_agree_on_a_tiny_model(tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the other side of the benchmark")
    runs = ["ours", "trl_default", "trl_best_precomputed", "trl_best_completions"]
    out = tmp_path / "results.json"
    asked = f"--data hh --data-folder {data_folder} --model {tiny_folder} --steps 1 --repeats 1 --threads 1 --out {out}"
    assert dpo_vs_trl.main([*asked.split(), "--runs", ",".join(runs)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [result["run"] for result in report["results"]] == runs
    assert report["disagreements"] == []
    positions = {result["run"]: result["step_positions"][1] for result in report["results"]}
    assert positions["trl_default"] > positions["trl_best_completions"] > positions["ours"]
    assert "alignkit, reference in the loop" in out.with_suffix(".md").read_text(encoding="utf-8")
