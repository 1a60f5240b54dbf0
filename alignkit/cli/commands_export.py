"""`alignkit export`: an adapter merged into its base, for programs that know no adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from alignkit.cli.output import AsJson, console, print_json
from alignkit.errors import printable
from alignkit.hub.wording import base_name, size

if TYPE_CHECKING:
    from alignkit.hub.export import Exported


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
    for what, value in _facts(exported):
        table.add_row(what, Text(printable(value)))
    console().print(table)


def _facts(exported: Exported) -> Iterator[tuple[str, str]]:
    merged, gguf = exported.merged, exported.gguf
    for file in exported.files:
        yield "file", f"{exported.path / file} ({size((exported.path / file).stat().st_size)})"
    yield "merged into", f"{base_name(merged.base)}, {merged.dtype}"
    yield (
        "adapter against merged",
        f"KL {merged.agreement.mean_kl:.1e} nats per token ({merged.tolerance:.1e} allowed), where the adapter itself "
        f"makes {merged.effect:.1e}; same first choice for {merged.agreement.same_top:.1%} of tokens",
    )
    if gguf is not None:
        for reader, found in gguf.checks.items():
            yield (
                f"GGUF as {reader} reads it",
                f"{gguf.outtype}: KL {found.mean_kl:.1e} nats per token, same first choice for {found.same_top:.1%}",
            )
    for note in (*merged.notes, *(() if gguf is None else gguf.notes)):
        yield "note", note
