"""Where the sources are, and how the invariant tests read them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    """Yield every Python file below `root/folder`, sorted, for each of the folders that exist."""
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
