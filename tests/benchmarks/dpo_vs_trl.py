"""Time and memory of a DPO step, alignkit against TRL, on a CPU: see README.md beside this file.

    python tests/benchmarks/dpo_vs_trl.py --data hh --steps 4 --repeats 2 --threads 2 --out results.json

Exits with 1 if the sides do not agree on data, loss, log-probabilities and gradient norm of the first step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a script: find this checkout's packages, not the siblings of this file
    sys.path[0] = str(ROOT)

from transformers import AutoTokenizer  # noqa: E402

from alignkit.models.demo import demo_model_path  # noqa: E402
from tests.benchmarks.arithmetic import Ceiling  # noqa: E402
from tests.benchmarks.data import DATASETS, first_rows, read_rows  # noqa: E402
from tests.benchmarks.report import ceiling_lines, disagreements, markdown, publish, summarise  # noqa: E402
from tests.benchmarks.runs import MAX_LENGTH, PAIRS_PER_STEP, RUNS, Job  # noqa: E402

VERSIONS = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
BUSY_LOAD = 0.5  # load average over the last minute above which a machine is not idle


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare a DPO step with TRL's on a CPU.")
    parser.add_argument("--data", choices=sorted(DATASETS), default="hh")
    parser.add_argument("--data-folder", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", default="demo", help="a folder, or 'demo'")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps that count")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those")
    parser.add_argument("--repeats", type=int, default=2, help="processes per run")
    parser.add_argument("--runs", default=",".join(RUNS), help="names separated by commas; all by default")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--profile", default="", help="runs to profile besides, separated by commas")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON, and the tables beside it as .md")
    arguments = parser.parse_args(argv)
    arguments.runs = [name for name in arguments.runs.split(",") if name]
    arguments.profile = [name for name in arguments.profile.split(",") if name]
    for name in arguments.runs + arguments.profile:
        if name not in RUNS:
            parser.error(f"no run is called {name!r}; there are {', '.join(RUNS)}")
    if not arguments.runs or min(arguments.steps, arguments.repeats) < 1 or arguments.warmup < 0:
        parser.error("at least one run, one step and one repeat are needed")
    return arguments


def environment() -> dict[str, Any]:
    """What a published figure must name."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = {line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")}
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = "+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
    installed = {name: _version(name) for name in VERSIONS}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit + changed,
        "cpu": f"{', '.join(sorted(names)) or platform.machine()}, {os.cpu_count()} cores",
        "load_before": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **{name: v for name, v in installed.items() if v}},
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_module(module: str, *arguments: str, threads: int, python: str = sys.executable) -> str:
    """Run a module of this folder in a fresh process of `python` without a GPU or a network; return what it printed.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
    """
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [python, "-m", module, *arguments],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n" + "\n".join(done.stderr.splitlines()[-25:]))
    return done.stdout


def run_job(job: Job) -> dict[str, Any]:
    """Make one run in its own process."""
    with tempfile.TemporaryDirectory(prefix="alignkit-benchmark-") as scratch:
        job_file, result_file = Path(scratch, "job.json"), Path(scratch, "result.json")
        job_file.write_text(json.dumps({**asdict(job), "scratch": scratch}), encoding="utf-8")
        run_module("tests.benchmarks.side", str(job_file), str(result_file), threads=job.threads)
        return json.loads(result_file.read_text(encoding="utf-8"))


def measure_ceiling(shape: dict[str, int], threads: int) -> Ceiling:
    """Measure the matrix-product rate in its own process."""
    with tempfile.TemporaryDirectory(prefix="alignkit-benchmark-") as scratch:
        file = Path(scratch, "shape.json")
        file.write_text(json.dumps(shape), encoding="utf-8")
        return Ceiling(
            **json.loads(run_module("tests.benchmarks.arithmetic", str(file), str(threads), threads=threads))
        )


def compare(arguments: argparse.Namespace, model: str, rows_file: Path) -> tuple[list[dict], dict[str, Any]]:
    """Make all runs, sides alternating, every second repeat in reverse; return their results and the profiles."""
    results = []
    for repeat in range(arguments.repeats):
        order = arguments.runs if repeat % 2 == 0 else arguments.runs[::-1]
        for name in order:
            job = Job(name, model, str(rows_file), "", arguments.steps, arguments.warmup, arguments.threads)
            results.append(run_job(job))
            seconds = " ".join(f"{step:.2f}" for step in results[-1]["step_seconds"])
            print(f"{name}, repeat {repeat + 1}: {seconds} s", file=sys.stderr, flush=True)
    profiles = {}
    for name in arguments.profile:
        job = Job(name, model, str(rows_file), "", arguments.steps, arguments.warmup, arguments.threads, profile=True)
        profiles[name] = run_job(job)["profile"]
    return results, profiles


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    about = environment()
    if about["load_before"] > BUSY_LOAD:
        print(f"The machine is busy (load {about['load_before']:.1f}): times will mislead.", file=sys.stderr)
    model = str(demo_model_path()) if arguments.model == "demo" else arguments.model
    with tempfile.TemporaryDirectory(prefix="alignkit-benchmark-") as folder:
        needed = PAIRS_PER_STEP * (arguments.warmup + arguments.steps)
        rows = read_rows(arguments.data, arguments.data_folder)
        rows = first_rows(rows, needed, AutoTokenizer.from_pretrained(model), MAX_LENGTH)
        rows_file = Path(folder, "rows.json")
        rows_file.write_text(json.dumps(rows), encoding="utf-8")
        results, profiles = compare(arguments, model, rows_file)
    summaries = summarise(results, arguments.warmup)
    ceiling = measure_ceiling(results[0]["shape"], arguments.threads)
    report = {
        "environment": about,
        **{name: vars(arguments)[name] for name in ("data", "steps", "warmup", "repeats", "threads")},
        "disagreements": disagreements(results),
        "ceiling": asdict(ceiling),
        "ceiling_lines": ceiling_lines(results, summaries, ceiling, arguments.warmup),
        "summaries": {name: asdict(summary) for name, summary in summaries.items()},
        "profiles": profiles,
        "results": results,
    }
    return publish(report, markdown(report, summaries), arguments.out)


if __name__ == "__main__":
    # A run that is stopped takes its side's process along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
