"""A run's results in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignkit.errors import printable
from alignkit.evaluation.generation import Answers
from alignkit.evaluation.preference import Estimate, PreferenceSummary

_FILE_COLUMNS = 120
_PROMPT_END = 300  # characters of a prompt that are shown: its last ones, where the question is


def report_console(*, quiet: bool) -> Console:
    """Return a console for tables: as wide as the terminal, and 120 columns where output goes to a file."""
    console = Console(quiet=quiet)
    return console if console.is_terminal else Console(quiet=quiet, width=_FILE_COLUMNS)


def before_after_table(before: PreferenceSummary, after: PreferenceSummary) -> Table:
    """Return loss, accuracy and margin before and after, and what preferring the shorter completion would score."""
    rows = "pairs" if after.is_paired else "completions"
    table = Table(title=f"Held-out preferences: {after.rows} {rows}, 95 % intervals", title_justify="left")
    table.add_column("")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    table.add_row("loss", f"{before.loss:.4f}", f"{after.loss:.4f}")
    table.add_row("reward accuracy", _accuracy(before), _accuracy(after))
    table.add_row("reward margin", _interval(before.margin), _interval(after.margin))
    table.add_section()
    table.add_row("baseline: prefer the shorter", "", _interval(after.shorter))
    return table


def answers_table(answers: Sequence[Answers]) -> Table:
    """Return prompts and answers side by side; a column is left out where nobody answered."""
    table = Table(title="Greedy answers to held-out prompts", title_justify="left", show_lines=True)
    has_reference = any(answer.reference is not None for answer in answers)
    for heading in ("prompt", *(["before"] if has_reference else []), "after"):
        table.add_column(heading, ratio=1, overflow="fold")
    for answer in answers:
        prompt = answer.prompt if len(answer.prompt) <= _PROMPT_END else "…" + answer.prompt[-_PROMPT_END:]
        texts = [prompt, *([answer.reference or ""] if has_reference else []), answer.policy]
        table.add_row(*(Text(printable(text)) for text in texts))
    return table


def _accuracy(summary: PreferenceSummary) -> str:
    if summary.ties == summary.rows:
        return f"{summary.accuracy.value:.3f} (all rewards equal)"
    return _interval(summary.accuracy)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]".replace("[", r"\[")


def how_to_load(folder: str | Path) -> str:
    """Return the lines of Python that load what was saved in `folder` without alignkit."""
    package, loader = ("peft", "AutoPeftModelForCausalLM")
    if not (Path(folder) / "adapter_config.json").is_file():
        package, loader = ("transformers", "AutoModelForCausalLM")
    return (
        f"Saved in {folder}. Load it with plain {package}:\n"
        f"    from {package} import {loader}\n"
        f'    model = {loader}.from_pretrained("{folder}")'
    )
