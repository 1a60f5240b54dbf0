"""Everything that only a GPU can show about DPO, in one call: see ../README.md.

    python tests/benchmarks/gpu/check_dpo.py --out results

Needs CUDA, torch, transformers, peft, accelerate and datasets; compares with TRL and loads in 4 bits where trl and
bitsandbytes are installed. Exits with 1 if an equality does not hold, with 3 where there is no CUDA.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: find this checkout's packages, not the siblings of this file
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from tests.benchmarks.gpu import equalities, kernels, memory
from tests.benchmarks.gpu.script import Call, Rows, parser_for, run_script

CAPS_GB = (8.0, 12.0, 16.0, 24.0)


def check_equalities(call: Call) -> tuple[Rows, str]:
    found = equalities.run(call.device)
    return found, equalities.table(found)


def time_kernels(call: Call) -> tuple[Rows, str]:
    found = kernels.run(call.shape, call.device)
    return found, kernels.table(found)


def measure_memory(call: Call) -> tuple[Rows, str]:
    found = memory.run(call.shape, call.device, call.arguments.caps, call.deadline)
    return found, memory.table(found, call.shape, call.note)


SECTIONS = {"equalities": check_equalities, "kernels": time_kernels, "memory": measure_memory}


def main(argv: list[str]) -> int:
    parser = parser_for("Check and measure alignkit's DPO on a GPU.", SECTIONS, CAPS_GB)
    return run_script("check_dpo", parser, SECTIONS, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
