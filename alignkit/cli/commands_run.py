"""`alignkit show` and `alignkit report`: a run's record in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from alignkit.cli.output import AsJson, console, print_json
from alignkit.errors import ConfigError, printable

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Output directory of a run, or its run_record.json.", show_default=False)
]


def show(run: RunFolder, as_json: AsJson = False) -> None:
    """Show what a run was made of and what it measured.

    [bold]Examples[/bold]

      alignkit show outputs/dpo_lora

      alignkit show outputs/dpo_lora --json | jq .evaluations
    """
    from alignkit.hub.record import RunRecord

    record = RunRecord.load(run)
    if as_json:
        print_json(record.as_dict())
        return
    screen = console()
    table = Table(title=Text(f"Run: {printable(record.method)}"), title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in _facts(record):
        table.add_row(Text(printable(name)), Text(printable(value)))
    screen.print(table)
    for evaluation in record.evaluations:
        screen.print(evaluation_table(evaluation))
    if not record.evaluations:
        screen.print("Nothing was evaluated. `alignkit eval` does it.", markup=False)


def _facts(record: Any) -> Iterator[tuple[str, str]]:
    from alignkit.hub.wording import base_name, count, size, training_time

    base, usage = record.base, record.usage
    yield "base", base_name(base) + (f" ({base['note']})" if base.get("note") else "")
    yield "parameters", count(base["parameters"])
    if record.adapter is not None:
        yield "trained", f"{record.adapter['kind']}, {count(record.adapter['trainable_parameters'])} parameters"
    for entry in record.data:
        yield f"data: {entry['name']}", f"{entry.get('source') or 'given as rows'}, {entry.get('rows')} rows"
    for name in record.changed:
        yield name, str(record.settings.get(name))
    if usage.get("training_seconds") is not None:
        yield "training", training_time(usage)
    if usage.get("peak_memory_bytes"):
        yield "peak memory", size(usage["peak_memory_bytes"])
    yield "finished", record.finished or "no"


def evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """An evaluation of a record: each metric with its interval, before and after where there is a before."""
    from alignkit.hub.wording import evaluation_title, figure, metric_title

    baseline = evaluation.get("baseline") or {}
    title = f"{evaluation_title(evaluation['name'])}: {evaluation['rows']} rows, 95 % intervals"
    table = Table(title=Text(printable(title)), title_justify="left")
    for heading in ("", "before", "after") if baseline else ("", "value"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, metric in evaluation["metrics"].items():
        shown = [figure(baseline.get(name))] if baseline else []
        table.add_row(*(Text(printable(cell)) for cell in (metric_title(name), *shown, figure(metric))))
    return table


def report(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the files; by default the run's own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the run's report: one HTML file that needs no network, and its curves as PNG.

    [bold]Examples[/bold]

      alignkit report outputs/dpo_lora

      alignkit report outputs/dpo_lora --output /tmp/report
    """
    from alignkit.evaluation.html import write_report
    from alignkit.evaluation.pictures import write_pictures
    from alignkit.hub.record import RunRecord

    record = RunRecord.load(run)
    folder = output or (run if run.is_dir() else run.parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures, page = write_pictures(record, folder), write_report(record, folder)
    except OSError as error:
        raise ConfigError(f"'{folder}' cannot be written to: {error.strerror}. Pass --output.") from error
    if as_json:
        print_json({"report": str(page), "pictures": [str(path) for path in pictures]})
        return
    console().print(f"Report: {page}", *(f"Picture: {path}" for path in pictures), sep="\n", markup=False)
