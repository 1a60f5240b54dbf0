"""Everything that only a GPU can show about PPO, in one call: see ../README.md.

    python tests/benchmarks/gpu/check_ppo.py --out results

Needs CUDA, torch, transformers, peft, accelerate and datasets; loads in 4 bits where bitsandbytes is installed. Exits
with 1 if an equality does not hold or a measurement fails otherwise than for memory, with 3 where there is no CUDA.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: find this checkout's packages, not the siblings of this file
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from tests.benchmarks.gpu import ppo_equalities, ppo_memory
from tests.benchmarks.gpu.script import Call, Rows, parser_for, run_script

CAPS_GB = (12.0, 16.0, 24.0)  # those that have a recipe
# Enough to fill the largest recipe's batch of generation and its passes: more of them cost time and no memory.
PROMPTS = 32


def check_equalities(call: Call) -> tuple[Rows, str]:
    found = ppo_equalities.run(call.device)
    return found, ppo_equalities.table(found)


def measure_memory(call: Call) -> tuple[Rows, str]:
    found = ppo_memory.run(call)
    return found, ppo_memory.table(found, call)


SECTIONS = {"equalities": check_equalities, "memory": measure_memory}


def main(argv: list[str]) -> int:
    parser = parser_for("Check and measure alignkit's PPO on a GPU.", SECTIONS, CAPS_GB)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="prompts of a rollout; 0: the recipe's own number")
    return run_script("check_ppo", parser, SECTIONS, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
