"""`alignkit export`: an adapter merged into its base, for programs that know no adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from alignkit.cli.output import AsJson, console, print_json


def export(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or its name on the Hub.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Folder to write to; it must be new or empty.", show_default=False)
    ],
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", "-f", help="merged, gguf or ollama; give it more than once for several. [merged]"),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, where the adapter's own record of it is wrong.")] = None,
    outtype: Annotated[str, typer.Option(help="Weights of the GGUF file: f32, f16, bf16 or q8_0.")] = "f16",
    name: Annotated[str | None, typer.Option(help="What the GGUF file calls the model.")] = None,
    converter: Annotated[Path | None, typer.Option(help="A clone of llama.cpp to convert with.")] = None,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its 16-bit base; write GGUF and an Ollama Modelfile.

    Each result is loaded back and compared with the adapter on its base; what differs too much is an error.

    [bold]Examples[/bold]

      alignkit export outputs/dpo_lora merged/

      alignkit export outputs/dpo_lora ollama/ --format ollama --outtype q8_0
    """
    from alignkit.hub import export as exporting

    exported = exporting.export(
        adapter,
        output,
        formats=tuple(formats or ["merged"]),
        base=base,
        outtype=outtype,
        name=name,
        converter=converter,
    )
    if as_json:
        print_json(exported.as_dict())
        return
    table = Table(title="Exported", title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    for key, value in exported.as_dict().items():
        table.add_row(key.replace("_", " "), str(value))
    console().print(table)
