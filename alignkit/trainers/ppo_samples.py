"""Completions of a rollout for people to read: on a terminal, in a file, and in a tracker.

What a model writes is text from an untrusted source. A terminal obeys some of it, so it is shown with everything that
is not printable escaped; the file holds it unchanged, as JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from alignkit.errors import printable
from alignkit.rollout.collect import Rollout

SHOWN_CHARACTERS = 600  # of a prompt (its end) or a completion (its beginning) in a table


def sample_rows(rollout: Rollout, *, step: int, number: int) -> list[dict[str, Any]]:
    """Return what is to be known of each completion, as values that JSON can hold.

    Args:
        rollout: B completions.
        step: optimizer steps done before it.
        number: how many rollouts came before it.
    """
    rewards = rollout.rewards
    components = {
        name: [value if counts else None for value, counts in zip(values.tolist(), applies.tolist(), strict=True)]
        for name, (values, applies) in rewards.components.items()
    }
    sources = [
        source for source, seeds in zip(rollout.prompts.sources, rollout.prompts.seeds, strict=True) for _ in seeds
    ]
    scores, totals, kept = rollout.scores.tolist(), rewards.totals.tolist(), rewards.kept.tolist()
    return [
        {
            "step": step,
            "rollout": number,
            "prompt": sources[index],
            "completion": rollout.texts[index],
            "tokens": len(completion.ids),
            "finished": completion.finished,
            "kept": kept[index],
            "rewards": {name: column[index] for name, column in components.items()},
            "reward": totals[index],
            "score": scores[index],
        }
        for index, completion in enumerate(rollout.completions)
    ]


def samples_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return rows of `sample_rows` as a `rich` table."""
    table = Table(title=f"rollout {rows[0]['rollout']}, step {rows[0]['step']}", title_justify="left", show_lines=True)
    table.add_column("prompt", overflow="fold", ratio=2)
    table.add_column("completion", overflow="fold", ratio=3)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("rewards", overflow="fold", ratio=1)
    table.add_column("tokens", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(_end(printable(prompt_text(row["prompt"])))),  # `Text`, because a string's [brackets] are markup
            Text(_beginning(printable(row["completion"]))),
            f"{row['score']:.3f}" if row["kept"] else "dropped",
            Text(_listed(row["rewards"])),
            f"{row['tokens']}{'' if row['finished'] else ', cut'}",
        )
    return table


def prompt_text(source: Any) -> str:
    """Return a prompt as text: one line per message of a conversation."""
    if isinstance(source, str):
        return source
    return "\n".join(f"{message['role']}: {message['content']}" for message in source)


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows to a file, one line of JSON each: all of them or, with the `OSError` that stopped it, none."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def keep_rows_before(path: Path, step: int) -> int:
    """Remove the rows of rollouts that a run which begins at `step` will make again, and a torn last line.

    Returns:
        How many lines were removed.
    """
    if not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _is_before(line, step)]
    if len(kept) < len(lines):
        whole = path.with_suffix(".new")
        whole.write_text("".join(kept), encoding="utf-8")
        os.replace(whole, path)
    return len(lines) - len(kept)


def put_aside(path: Path) -> Path:
    """Rename a file `x.jsonl` to `x-1.jsonl`, or the next number that is free, and return where it lies."""
    number = 1
    while (target := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    return path.rename(target)


def send_to_trackers(rows: Sequence[dict[str, Any]], report_to: Sequence[str], folder: Path) -> None:
    """Show rows in Weights & Biases as a table, in TensorBoard as text, where the run reports to them.

    Args:
        rows: of `sample_rows`.
        report_to: names of trackers.
        folder: where TensorBoard's files go, unless TENSORBOARD_LOGGING_DIR says otherwise.
    """
    columns = ("step", "prompt", "completion", "score", "tokens")
    cells = [[row["step"], prompt_text(row["prompt"]), *(row[name] for name in columns[2:])] for row in rows]
    if "wandb" in report_to:
        wandb = importlib.import_module("wandb")
        if wandb.run is not None:
            table = wandb.Table(columns=list(columns), data=cells)
            wandb.log({"completions/samples": table}, commit=False)  # goes out with the next log's numbers
    if "tensorboard" in report_to:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
        blocks = [
            "\n".join(f"    {line}" for line in f"{cell[1]}{cell[2]}\n[{cell[3]:.3f}]".split("\n")) for cell in cells
        ]
        with tensorboard.SummaryWriter(os.environ.get("TENSORBOARD_LOGGING_DIR", str(folder))) as writer:
            writer.add_text("completions/samples", "\n\n---\n\n".join(blocks), rows[0]["step"])


def _is_before(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] < step
    except (ValueError, KeyError, TypeError, RecursionError):  # a kill tore it
        return False


def _end(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else "…" + text[-SHOWN_CHARACTERS:]


def _beginning(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def _listed(rewards: dict[str, float | None]) -> str:
    said = {name: "none" if value is None else f"{value:.3f}" for name, value in rewards.items()}
    return "\n".join(f"{printable(name)} {value}" for name, value in said.items())
