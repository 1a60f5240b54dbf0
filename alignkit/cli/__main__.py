"""`python -m alignkit.cli`: the command `alignkit` where its script is not on the path."""

from __future__ import annotations

from alignkit.cli.main import main

main()
