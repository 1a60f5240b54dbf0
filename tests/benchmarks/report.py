"""From the runs' results to agreement, ratios and tables."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.arithmetic import Ceiling, ModelShape, step_operations
from tests.benchmarks.runs import BARS, PAIRS_PER_STEP, RUNS, WITHOUT_BARS, Bar

Result = dict[str, Any]

# How far two sides may be apart in the first step, before which they have the same weights.
LOSS_TOLERANCE = 1e-3
# A precomputed reference was scored in other batches than the policy is, and bf16 rounds those differently.
PRECOMPUTED_LOSS_TOLERANCE = 1e-2
GRADIENT_TOLERANCE = 0.05  # relative
LOGPS_TOLERANCE = 0.01  # relative: at the first step the loss is log 2 whatever is scored, this is not

GB = 1e9


@dataclass(frozen=True, slots=True)
class Summary:
    """One run over all its repeats.

    Attributes:
        seconds: per optimizer step, median over steps (each a median over repeats) after the warm-up.
        fastest_seconds, slowest_seconds: over all counted steps and repeats.
        peak_bytes: of resident memory in `train()` above the loaded model, median over repeats.
        process_bytes: peak of the whole process, median over repeats.
        positions: embedded in a step, policy and reference together, padding included, median over steps.
        setup_seconds: making the trainer: tokenization, and the reference where it is precomputed.
    """

    run: str
    seconds: float
    fastest_seconds: float
    slowest_seconds: float
    peak_bytes: float
    process_bytes: float
    positions: float
    setup_seconds: float
    first_loss: float
    first_grad_norm: float

    @property
    def pairs_per_second(self) -> float:
        return PAIRS_PER_STEP / self.seconds


def summarise(results: list[Result], warmup: int) -> dict[str, Summary]:
    """Bring the repeats of each run together, in the order of `RUNS`."""
    summaries = {}
    for name in RUNS:
        repeats = [result for result in results if result["run"] == name]
        if not repeats:
            continue
        counted = [result["step_seconds"][warmup:] for result in repeats]
        steps = [statistics.median(step) for step in zip(*counted, strict=True)]
        summaries[name] = Summary(
            run=name,
            seconds=statistics.median(steps),
            fastest_seconds=min(map(min, counted)),
            slowest_seconds=max(map(max, counted)),
            peak_bytes=statistics.median(result["peak_above_loaded_bytes"] for result in repeats),
            process_bytes=statistics.median(result["process_peak_bytes"] for result in repeats),
            positions=statistics.median(repeats[0]["step_positions"][warmup:]),
            setup_seconds=statistics.median(result["setup_seconds"] for result in repeats),
            first_loss=repeats[0]["loss"][0],
            first_grad_norm=repeats[0]["grad_norm"][0],
        )
    return summaries


def disagreements(results: list[Result]) -> list[str]:
    """Compare every run's data and first step with those of the first run; an empty list means that all agree."""
    found = []
    first = results[0]
    for result in results[1:]:
        both = f"{result['run']} and {first['run']}"
        if result["data_digest"] != first["data_digest"]:
            found.append(f"{both} trained on other tokens: {result['data_digest']}, {first['data_digest']}")
        precomputed = any(RUNS[each["run"]].is_precomputed for each in (result, first))
        tolerance = PRECOMPUTED_LOSS_TOLERANCE if precomputed else LOSS_TOLERANCE
        if not abs(result["loss"][0] - first["loss"][0]) <= tolerance:
            found.append(f"{both} have other first losses: {result['loss'][0]:.6f}, {first['loss'][0]:.6f}")
        for key, relative in (("grad_norm", GRADIENT_TOLERANCE), ("logps_chosen", LOGPS_TOLERANCE)):
            a, b = result[key][0], first[key][0]
            if not abs(a - b) <= relative * abs(b):
                found.append(f"{both} differ in the first step's {key}: {a:.6g}, {b:.6g}")
    return found


def ratio(bar: Bar, summaries: dict[str, Summary]) -> float | None:
    """The bar's ratio, or `None` if one of its runs was not made."""
    ours, theirs = summaries.get(bar.ours), summaries.get(bar.theirs)
    if ours is None or theirs is None:
        return None
    return theirs.seconds / ours.seconds if bar.quantity == "speed" else ours.peak_bytes / theirs.peak_bytes


def ratios_table(summaries: dict[str, Summary], data: str) -> str:
    """Ratios as markdown, each with its bar where it has one; nothing is asserted."""
    lines = ["| ratio | measured | bar | |", "|---|---|---|---|"]
    for bar in BARS:
        value = ratio(bar, summaries)
        if value is None:
            continue
        target, verdict = "", ""
        if bar.target is not None and data not in WITHOUT_BARS:
            sign, reached = ("≥", value >= bar.target) if bar.quantity == "speed" else ("≤", value <= bar.target)
            target, verdict = f"{sign} {bar.target:.2f}", "reached" if reached else "not reached"
        lines.append(f"| {bar.label} | {value:.2f} | {target} | {verdict} |")
    return "\n".join(lines)


def runs_table(summaries: dict[str, Summary]) -> str:
    """The runs as markdown."""
    lines = [
        "| run | s / step (fastest–slowest) | pairs / s | positions / step | peak above weights, GB "
        "| whole process, GB | setup, s | first loss | first gradient norm |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, each in summaries.items():
        lines.append(
            f"| {RUNS[name].summary} | {each.seconds:.2f} ({each.fastest_seconds:.2f}–{each.slowest_seconds:.2f}) "
            f"| {each.pairs_per_second:.2f} | {each.positions:.0f} | {each.peak_bytes / GB:.2f} "
            f"| {each.process_bytes / GB:.2f} | {each.setup_seconds:.1f} | {each.first_loss:.4f} "
            f"| {each.first_grad_norm:.3f} |"
        )
    return "\n".join(lines)


def ceiling_lines(results: list[Result], summaries: dict[str, Summary], ceiling: Ceiling, warmup: int) -> list[str]:
    """Say what share of the measured matrix-product rate the steps of our own runs reach."""
    lines = [
        f"bf16 matrix products: {ceiling.blocks / 1e12:.2f} TFLOP/s in the blocks' shape, "
        f"{ceiling.head / 1e12:.2f} TFLOP/s in the head's."
    ]
    by_name = {result["run"]: result for result in results}
    for name, each in summaries.items():
        if RUNS[name].side != "alignkit":
            continue
        result = by_name[name]
        shape = ModelShape(**result["shape"])
        lengths = result["lengths"]
        steps = [lengths[start : start + PAIRS_PER_STEP] for start in range(0, len(lengths), PAIRS_PER_STEP)]
        counted = list(zip(steps, result["shared_starts"], strict=True))[warmup:]
        in_loop = not RUNS[name].is_precomputed
        operations = [step_operations(shape, *step, with_reference=in_loop) for step in counted]
        least = statistics.median(ceiling.seconds(step) for step in operations)
        tera = statistics.median(step.blocks + step.head for step in operations) / 1e12
        lines.append(
            f"`{name}`: {tera:.2f} TFLOP a step would take {least:.2f} s at that rate; the step takes "
            f"{each.seconds:.2f} s and so reaches {least / each.seconds:.0%} of it."
        )
    return lines


def profile_table(groups: dict[str, float]) -> str:
    """A profile as markdown, with shares of the step."""
    total = sum(groups.values())
    lines = ["| kind of work | s | share |", "|---|---|---|"]
    lines += [f"| {name} | {seconds:.2f} | {seconds / total:.0%} |" for name, seconds in groups.items()]
    return "\n".join(lines)


def markdown(report: dict[str, Any], summaries: dict[str, Summary]) -> str:
    """The whole report: what was run where, the runs, the ratios, the ceiling, and the profiles that were made."""
    about = report["environment"]
    parts = [
        f"`{about['command']}`, commit {about['commit']}; {about['cpu']}, {report['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + f". {PAIRS_PER_STEP} pairs a step, {report['steps']} steps after {report['warmup']} of warm-up, "
        f"{report['repeats']} repeats; data: {report['data']}.",
        runs_table(summaries),
        ratios_table(summaries, report["data"]),
        "\n".join(f"- {line}" for line in report["ceiling_lines"]),
    ]
    for name, groups in report["profiles"].items():
        parts += [f"Profile of a step of `{name}`:", profile_table(groups)]
    if report["disagreements"]:
        parts += ["**The sides do not agree:**", "\n".join(f"- {line}" for line in report["disagreements"])]
    return "\n\n".join(parts) + "\n"


def publish(report: dict[str, Any], text: str, out: Path | None) -> int:
    """Print the tables, write them beside everything measured, and return the exit status: 1 if the sides disagree."""
    print(text)
    if out is not None:
        out.write_text(json.dumps(report, indent=1), encoding="utf-8")
        out.with_suffix(".md").write_text(text, encoding="utf-8")
    return 1 if report["disagreements"] else 0
