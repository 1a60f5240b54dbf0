"""Time and memory of a PPO update, alignkit against TRL 1.12, on a CPU: see README.md beside this file.

    python tests/benchmarks/ppo_vs_trl.py --trl-python TRL_ENVIRONMENT/bin/python --updates 3 --out results.json

Exits with 1 if the sides do not agree on the prompts, on the rewards of given completions, and on a first KL of zero.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a script: find this checkout's packages, not the siblings of this file
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

from alignkit.models.demo import demo_model_path  # noqa: E402
from tests.benchmarks.data import DATASETS, read_rows  # noqa: E402
from tests.benchmarks.dpo_vs_trl import BUSY_LOAD, environment, run_module  # noqa: E402
from tests.benchmarks.ppo_runs import (  # noqa: E402
    COMPLETION_TOKENS,
    MAX_PROMPT_TOKENS,
    PPO_BARS,
    PPO_EPOCHS,
    PPO_RUNS,
    PROMPTS,
    PPOJob,
)
from tests.benchmarks.report import GB, Result, publish  # noqa: E402
from tests.benchmarks.runs import LORA_RANK  # noqa: E402

SCORE_SCALE = 0.2  # of the reward model's head, so that its rewards are of about the size of 1
PROBE_TOLERANCE = 0.05  # of the rewards' spread: bf16 rounds the sides' passes differently
KL_TOLERANCE = 0.5  # nats per completion: TRL's log-probs come from generation, and bf16 rounds those differently


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare a PPO update with TRL's on a CPU.")
    parser.add_argument("--trl-python", help="the Python of an environment with trl==1.12.0; needed by TRL's runs")
    parser.add_argument("--data", choices=sorted(DATASETS), default="hh")
    parser.add_argument("--data-folder", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", default="demo", help="a folder, or 'demo'")
    parser.add_argument("--updates", type=int, default=3, help="rollouts that count, each with its optimizer steps")
    parser.add_argument("--warmup", type=int, default=1, help="rollouts before those")
    parser.add_argument("--repeats", type=int, default=2, help="processes per run")
    parser.add_argument("--runs", default=",".join(PPO_RUNS), help="names separated by commas; all by default")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="write everything measured as JSON, and the tables beside it as .md")
    arguments = parser.parse_args(argv)
    arguments.runs = [name for name in arguments.runs.split(",") if name]
    for name in arguments.runs:
        if name not in PPO_RUNS:
            parser.error(f"no run is called {name!r}; there are {', '.join(PPO_RUNS)}")
        if PPO_RUNS[name].side == "trl" and arguments.trl_python is None:
            parser.error(f"{name} needs --trl-python; README.md beside this script says how to make that environment")
    if not arguments.runs or min(arguments.updates, arguments.repeats) < 1 or arguments.warmup < 0:
        parser.error("at least one run, one update and one repeat are needed")
    return arguments


def choose_rows(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Return the first `PROMPTS` different prompts of up to `MAX_PROMPT_TOKENS`, each with a completion to reward.

    Raises:
        ValueError: there are fewer.
    """
    chosen: dict[tuple[int, ...], dict[str, Any]] = {}
    for row in rows:
        ids, answer = _prompt_ids(row["prompt"], tokenizer), row["chosen"]
        text = answer if isinstance(answer, str) else answer[-1]["content"]
        probe = tokenizer(text, add_special_tokens=False)["input_ids"][:COMPLETION_TOKENS]
        if probe and 0 < len(ids) <= MAX_PROMPT_TOKENS:
            chosen.setdefault(tuple(ids), {"prompt": row["prompt"], "prompt_ids": ids, "probe_ids": probe})
        if len(chosen) == PROMPTS:
            return list(chosen.values())
    raise ValueError(
        f"the data set has {len(chosen)} prompts of up to {MAX_PROMPT_TOKENS} tokens, {PROMPTS} are needed"
    )


def _prompt_ids(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def save_reward_model(model: str, folder: Path) -> tuple[Path, Path]:
    """Save one reward model twice: as a sequence classifier, and as an adapter of `model` that changes no layer.

    Its head is random, from a fixed seed: what it likes does not matter here, only that both sides compute it.
    """
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.bfloat16)
    head = classifier.get_submodule("score").weight
    noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    head.data.copy_(SCORE_SCALE * noise / head.shape[1] ** 0.5)
    classifier.config.pad_token_id = 0  # asked for by its own forward pass, which neither side runs
    classifier.save_pretrained(folder / "classifier")
    lora = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    get_peft_model(classifier, lora).save_pretrained(folder / "adapter")
    return folder / "classifier", folder / "adapter"


def run_job(job: PPOJob, trl_python: str | None) -> Result:
    """Make one run in its own process, TRL's in its own environment."""
    python = trl_python if PPO_RUNS[job.run].side == "trl" and trl_python is not None else sys.executable
    with tempfile.TemporaryDirectory(prefix="alignkit-benchmark-") as scratch:
        job_file, result_file = Path(scratch, "job.json"), Path(scratch, "result.json")
        job_file.write_text(json.dumps({**asdict(job), "scratch": scratch}), encoding="utf-8")
        paths = (str(job_file), str(result_file))
        run_module("tests.benchmarks.ppo_side", *paths, threads=job.threads, python=python)
        return json.loads(result_file.read_text(encoding="utf-8"))


def summarise(results: list[Result], warmup: int) -> dict[str, dict[str, float]]:
    """Bring the repeats of each run together, in the order of `PPO_RUNS`: medians over repeats, then over updates."""
    summaries = {}
    for name in PPO_RUNS:
        repeats = [result for result in results if result["run"] == name]
        if not repeats:
            continue
        counted = [result["update_seconds"][warmup:] for result in repeats]
        first = repeats[0]
        summaries[name] = {
            "seconds": statistics.median(map(statistics.median, zip(*counted, strict=True))),
            "fastest_seconds": min(map(min, counted)),
            "slowest_seconds": max(map(max, counted)),
            "peak_bytes": statistics.median(result["peak_above_loaded_bytes"] for result in repeats),
            "process_bytes": statistics.median(result["process_peak_bytes"] for result in repeats),
            "positions": statistics.median(first["update_positions"][warmup:]),
            "completion_tokens": statistics.median(first["completion_tokens"][warmup:]),
            "first_reward": first["rewards"][0],
            "last_reward": first["rewards"][-1],
            "first_kl": first["kl"][0],
        }
    return summaries


def disagreements(results: list[Result]) -> list[str]:
    """Compare every run with the first; an empty list means that all agree."""
    found, first = [], results[0]
    spread = statistics.pstdev(first["probe_rewards"]) or 1.0
    for result in results:
        both = f"{result['run']} and {first['run']}"
        if result["prompt_digest"] != first["prompt_digest"]:
            found.append(f"{both} have other prompts: {result['prompt_digest']}, {first['prompt_digest']}")
        pairs = zip(result["probe_rewards"], first["probe_rewards"], strict=True)
        apart = max(abs(a - b) for a, b in pairs)
        if not apart <= PROBE_TOLERANCE * spread:
            found.append(f"{both} reward the same completions differently, by up to {apart:.4f} (spread {spread:.4f})")
        if not abs(result["kl"][0]) <= KL_TOLERANCE:
            found.append(f"{result['run']} starts with a KL of {result['kl'][0]:.3f} from its own reference")
    return found


def markdown(report: dict[str, Any], summaries: dict[str, dict[str, float]]) -> str:
    """What was run where, the runs, and the ratios with their bars; nothing is asserted."""
    about = report["environment"]
    trl = next((result["versions"] for result in report["results"] if "trl_" in result["run"]), None)
    lines = [
        f"`{about['command']}`, commit {about['commit']}; {about['cpu']}, {report['threads']} threads; "
        + f"{about['versions']}"
        + (f"; TRL's environment {trl}" if trl else "")
        + f". {PROMPTS} prompts × {COMPLETION_TOKENS} tokens, {PPO_EPOCHS} epochs, {report['updates']} updates after "
        f"{report['warmup']} of warm-up, {report['repeats']} repeats; data: {report['data']}.",
        "",
        "| run | s / update | fastest to slowest | positions / update | completion tokens | reward, first and last | "
        "peak above one copy of the weights, GB | process, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in summaries.items():
        lines.append(
            f"| `{name}`: {PPO_RUNS[name].summary} | {each['seconds']:.2f} | {each['fastest_seconds']:.2f} to "
            f"{each['slowest_seconds']:.2f} | {each['positions']:,.0f} | {each['completion_tokens']:,.0f} | "
            f"{each['first_reward']:.3f}, {each['last_reward']:.3f} | {each['peak_bytes'] / GB:.2f} | "
            f"{each['process_bytes'] / GB:.2f} |"
        )
    lines += ["", "| ratio | measured | bar | |", "|---|---|---|---|"]
    for bar in PPO_BARS:
        if bar.ours not in summaries or bar.theirs not in summaries:
            continue
        ours, theirs = summaries[bar.ours], summaries[bar.theirs]
        is_speed = bar.quantity == "speed"
        value = theirs["seconds"] / ours["seconds"] if is_speed else ours["peak_bytes"] / theirs["peak_bytes"]
        reached = bar.target is not None and (value >= bar.target if is_speed else value <= bar.target)
        said = ("–", "") if bar.target is None else (f"{'≥' if is_speed else '≤'} {bar.target:.2f}", reached)
        verdict = {True: "reached", False: "not reached"}.get(said[1], "")  # type: ignore[arg-type]
        lines.append(f"| {bar.label} | {value:.2f} | {said[0]} | {verdict} |")
    if report["disagreements"]:
        lines += ["", "**The sides do not agree:**", "", *(f"- {line}" for line in report["disagreements"])]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    about = environment()
    if about["load_before"] > BUSY_LOAD:
        print(f"The machine is busy (load {about['load_before']:.1f}): times will mislead.", file=sys.stderr)
    model = str(demo_model_path()) if arguments.model == "demo" else arguments.model
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="alignkit-benchmark-") as folder:
        rows = choose_rows(read_rows(arguments.data, arguments.data_folder), AutoTokenizer.from_pretrained(model))
        rows_file = Path(folder, "rows.json")
        rows_file.write_text(json.dumps(rows), encoding="utf-8")
        files = (str(rows_file), *map(str, save_reward_model(model, Path(folder))))
        for repeat in range(arguments.repeats):
            for name in arguments.runs if repeat % 2 == 0 else arguments.runs[::-1]:
                job = PPOJob(name, model, *files, "", arguments.updates, arguments.warmup, arguments.threads)
                results.append(run_job(job, arguments.trl_python))
                seconds = " ".join(f"{update:.2f}" for update in results[-1]["update_seconds"])
                rewards = " ".join(f"{reward:.3f}" for reward in results[-1]["rewards"])
                print(f"{name}, repeat {repeat + 1}: {seconds} s, rewards {rewards}", file=sys.stderr, flush=True)
    summaries = summarise(results, arguments.warmup)
    report = {
        "environment": about,
        **{name: vars(arguments)[name] for name in ("data", "updates", "warmup", "repeats", "threads")},
        "disagreements": disagreements(results),
        "summaries": summaries,
        "results": results,
    }
    return publish(report, markdown(report, summaries), arguments.out)


if __name__ == "__main__":
    # A run that is stopped takes its side's process along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
