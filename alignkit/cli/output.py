"""What commands print: tables for people, one JSON object for programs, and nothing else on standard output."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from alignkit.hub.record import plain

_FILE_COLUMNS = 120

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def console() -> Console:
    """A console for tables: as wide as the terminal; 120 columns and without colours where output goes elsewhere."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_FILE_COLUMNS)


def print_json(value: Any) -> None:
    """Print `value` as JSON, with everything beyond ASCII escaped, so that any pipe can carry it."""
    typer.echo(json.dumps(plain(value), indent=2, allow_nan=False))
