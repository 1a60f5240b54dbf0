"""Everything that only a GPU can show about DPO, in one call: see ../README.md.

    python tests/benchmarks/gpu/check_dpo.py --out results

Needs CUDA, torch, transformers, peft, accelerate and datasets; compares with TRL and loads in 4 bits where trl and
bitsandbytes are installed. Exits with 1 if an equality does not hold.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
if not __package__:  # run as a script: find this checkout's packages, not the siblings of this file
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

SECTIONS = ("equalities", "kernels", "memory")
CAPS_GB = (8.0, 12.0, 16.0, 24.0)
VERSIONS = ("torch", "transformers", "peft", "accelerate", "datasets", "trl", "bitsandbytes")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and measure alignkit's DPO on a GPU.")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of equalities, kernels, memory")
    parser.add_argument("--caps", default=",".join(f"{cap:g}" for cap in CAPS_GB), help="memory of the cards, in GB")
    parser.add_argument("--seconds", type=float, default=540, help="start no further measurement after this long")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for the results")
    parser.add_argument("--cpu-dry-run", action="store_true", help="run every section, tiny, on the CPU")
    arguments = parser.parse_args(argv)
    arguments.sections = arguments.sections.split(",")
    arguments.caps = [float(cap) for cap in arguments.caps.split(",")]
    unknown = set(arguments.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section is called {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return arguments


def environment(device: torch.device) -> dict[str, Any]:
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {"device": card, "python": platform.python_version(), **versions, "command": " ".join(sys.argv)}


def run_section(name: str, arguments: argparse.Namespace, device: torch.device, deadline: float) -> tuple[list, str]:
    """Run a section; return what it measured, and the same as markdown."""
    from tests.benchmarks.gpu import equalities, kernels, memory, shapes

    shape, note = shapes.eight_billion(tiny=arguments.cpu_dry_run)
    if name == "equalities":
        found = equalities.run(device)
        return found, equalities.table(found)
    if name == "kernels":
        found = kernels.run(shape, device)
        return found, kernels.table(found)
    found = memory.run(shape, device, arguments.caps, deadline)
    return found, memory.table(found, shape, note)


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    started = time.monotonic()
    if not torch.cuda.is_available() and not arguments.cpu_dry_run:
        print("No CUDA device here: nothing was checked. --cpu-dry-run tries the script itself on the CPU.")
        return 0
    device = torch.device("cpu") if arguments.cpu_dry_run else torch.device("cuda", torch.cuda.current_device())
    report: dict[str, Any] = {"environment": environment(device)}
    texts = [", ".join(f"{name} {value}" for name, value in report["environment"].items())]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.sections:
        report[name], text = run_section(name, arguments, device, started + arguments.seconds)
        texts.append(f"## {name}\n\n{text}")
        print(texts[-1], flush=True)
        # After every section, so that an interrupted call leaves what it has.
        (arguments.out / "check_dpo.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (arguments.out / "check_dpo.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    failed = [each["name"] for each in report.get("equalities", ()) if not each["passed"]]
    print(f"NOT EQUAL: {'; '.join(failed)}" if failed else f"done in {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
