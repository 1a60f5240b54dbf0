"""What the GPU scripts share: their options, the environment they ran in, and a report after every section."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.gpu.shapes import Shape, eight_billion

NO_CUDA = 3  # exit code: nothing was checked
VERSIONS = ("torch", "transformers", "peft", "accelerate", "datasets", "trl", "bitsandbytes")

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a script, as its sections see it.

    Attributes:
        arguments: of the command line.
        device: where everything runs.
        deadline: of `time.monotonic`; no measurement starts after it.
        shape: of the model that memory and time are measured with.
        note: what the figures mean where the shape is not the real one.
    """

    arguments: argparse.Namespace
    device: torch.device
    deadline: float
    shape: Shape
    note: str


# A section returns what it found and the same as markdown. A row that says `passed: False` fails the call.
Section = Callable[[Call], tuple[Rows, str]]


def parser_for(purpose: str, sections: Mapping[str, Section], caps_gb: tuple[float, ...]) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--sections", default=",".join(sections), help=f"some of {', '.join(sections)}")
    parser.add_argument("--caps", default=",".join(f"{cap:g}" for cap in caps_gb), help="memory of the cards, in GB")
    parser.add_argument("--seconds", type=float, default=540, help="start no further measurement after this long")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for the results")
    parser.add_argument("--cpu-dry-run", action="store_true", help="run every section, tiny, on the CPU")
    return parser


def run_script(name: str, parser: argparse.ArgumentParser, sections: Mapping[str, Section], argv: list[str]) -> int:
    """Run the sections that were asked for and write `name`.json and `name`.md; return the exit code."""
    arguments = _parsed(parser, sections, argv)
    started = time.monotonic()
    if not torch.cuda.is_available() and not arguments.cpu_dry_run:
        print("No CUDA device here: nothing was checked. --cpu-dry-run tries the script itself on the CPU.")
        return NO_CUDA
    device = torch.device("cpu") if arguments.cpu_dry_run else torch.device("cuda", torch.cuda.current_device())
    shape, note = eight_billion(tiny=arguments.cpu_dry_run)
    call = Call(arguments, device, started + arguments.seconds, shape, note)
    report: dict[str, Any] = {"environment": _environment(device)}
    texts = [", ".join(f"{key} {value}" for key, value in report["environment"].items())]
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    for section in arguments.sections:
        rows, text = sections[section](call)
        report[section] = rows
        failed += [row["name"] for row in rows if row.get("passed") is False]
        texts.append(f"## {section}\n\n{text}")
        print(texts[-1], flush=True)
        # After every section, so that an interrupted call leaves what it has.
        (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (arguments.out / f"{name}.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    print(f"FAILED: {'; '.join(failed)}" if failed else f"done in {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


def _parsed(parser: argparse.ArgumentParser, sections: Mapping[str, Section], argv: list[str]) -> argparse.Namespace:
    arguments = parser.parse_args(argv)
    arguments.sections = arguments.sections.split(",")
    arguments.caps = [float(cap) for cap in arguments.caps.split(",")]
    unknown = set(arguments.sections) - set(sections)
    if unknown:
        parser.error(f"no section is called {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    return arguments


def _environment(device: torch.device) -> dict[str, Any]:
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {"device": card, "python": platform.python_version(), **versions, "command": " ".join(sys.argv)}
