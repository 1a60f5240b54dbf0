"""Resumes of runs whose weights are sharded: `tests.two_processes.launch_sharded` starts it with FOLDER CASE..."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.resume.two_process_run import main
from tests.two_processes import sharded

if __name__ == "__main__":
    with sharded():
        main(Path(sys.argv[1]), sys.argv[2:])
