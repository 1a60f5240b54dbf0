"""The runs of `two_process_run` with sharded weights: to be started by `tests.two_processes.launch_sharded`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.invariants.two_process_run import SHARDED, main
from tests.two_processes import sharded

if __name__ == "__main__":
    with sharded():
        main(Path(sys.argv[1]), SHARDED, processes=2)
