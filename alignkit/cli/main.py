"""The command `alignkit`: what is done to a run from the shell, each command beside its Python function.

Exit codes: 0 done; 1 it cannot be done, and one line says why; 2 the command line is wrong; 130 interrupted;
143 ended by SIGTERM.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import typer

from alignkit.cli import commands_env, commands_evaluate, commands_export, commands_publish, commands_run
from alignkit.errors import AlignkitError

app = typer.Typer(
    name="alignkit",
    help="Evaluate, report, publish and export what alignkit's trainers made.",
    epilog="Training is in the recipes: accelerate launch recipes/dpo_lora.py --help",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command("env")(commands_env.env)
app.command("show")(commands_run.show)
app.command("eval")(commands_evaluate.evaluate)
app.command("report")(commands_run.report)
app.command("publish")(commands_publish.publish)
app.command("export")(commands_export.export)


def main() -> None:
    """Run the command line; an error of alignkit's own is one line and exit code 1.

    SIGTERM ends it by an exception, so that copies of models in temporary folders are removed.
    """
    before = signal.signal(signal.SIGTERM, _end)
    try:
        app()
    except AlignkitError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: Any) -> None:
    sys.exit(128 + number)
