"""Sizes, and habits that no linter knows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.invariants.source_tree import ROOT, parse, python_files

FILE_LINES = 400
RECIPE_LINES = 120
FUNCTION_LINES = 60
CODE = ("alignkit", "recipes", "tests")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".ipynb", ".sh"}

# Files that may call getattr or hasattr, each with its reason.
PROBING_ALLOWED: dict[str, str] = {}

# Spelled with brackets, so that this file does not contain what it looks for.
LEFTOVERS = re.compile(
    r"\bTOD[O]\b|\bFIXM[E]\b|/wor[k]/[a-z.]|bash_job[s]|before-sto[p]|\bsub-?agen[t]|\b(?:DESIGN|ANCHORS|SPEC)\.m[d]\b"
    r"|pypi\.or[g]|pythonhoste[d]\.org|download\.pytorc[h]|/opt/(?:wheel[s]|pyp[i])|/tmp/ven[v]"
)


def too_long(root: Path) -> list[str]:
    """List files and functions past their limits, with their lengths."""
    found = []
    for path in python_files(root, *CODE):
        where = path.relative_to(root).as_posix()
        is_recipe = path.parent == root / "recipes"
        lines, limit = len(path.read_text(encoding="utf-8").splitlines()), RECIPE_LINES if is_recipe else FILE_LINES
        if lines > limit:
            found.append(f"{where}: {lines} lines, limit {limit}")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    found.append(f"{where}:{node.lineno} {node.name}: {lines} lines, limit {FUNCTION_LINES}")
    return found


def probing(root: Path, allowed: dict[str, str]) -> list[str]:
    """List calls of getattr and hasattr in the library: what an object is must be known, not felt for."""
    found = []
    for path in python_files(root, "alignkit"):
        where = path.relative_to(root).as_posix()
        if where in allowed:
            continue
        for node in ast.walk(parse(path)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in {"getattr", "hasattr"}
            ):
                found.append(f"{where}:{node.lineno} calls {node.func.id}")
    return found


def leftovers(root: Path) -> list[str]:
    """List lines that speak of unfinished work or of the place where the code was written."""
    roots = [root / name for name in (*CODE, "model_cards", ".ci")]
    files = [path for folder in roots for path in folder.rglob("*") if path.suffix in TEXT_SUFFIXES or not path.suffix]
    files += [path for path in root.glob("*") if path.suffix in TEXT_SUFFIXES]
    found = []
    for path in sorted(path for path in files if path.is_file()):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if match := LEFTOVERS.search(line):
                found.append(f"{path.relative_to(root).as_posix()}:{number} says '{match.group()}'")
    return found


def test_files_and_functions_are_short() -> None:
    assert too_long(ROOT) == []


def test_the_library_does_not_probe_objects() -> None:
    assert probing(ROOT, PROBING_ALLOWED) == []


def test_every_allowed_probe_is_still_needed() -> None:
    needed = {line.split(":")[0] for line in probing(ROOT, {})}
    assert set(PROBING_ALLOWED) <= needed


def test_nothing_unfinished_or_foreign_is_left_in_the_text() -> None:
    assert leftovers(ROOT) == []


@pytest.mark.parametrize(
    ("file", "lines", "reported"),
    [
        ("alignkit/a.py", FILE_LINES, False),
        ("alignkit/a.py", FILE_LINES + 1, True),
        ("tests/a.py", FILE_LINES + 1, True),
        ("recipes/a.py", RECIPE_LINES, False),
        ("recipes/a.py", RECIPE_LINES + 1, True),
    ],
)
def test_a_long_file_is_reported(tmp_path: Path, file: str, lines: int, reported: bool) -> None:
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text("x = 1\n" * lines, encoding="utf-8")
    assert bool(too_long(tmp_path)) is reported


@pytest.mark.parametrize(("lines", "reported"), [(FUNCTION_LINES, False), (FUNCTION_LINES + 1, True)])
def test_a_long_function_is_reported(tmp_path: Path, lines: int, reported: bool) -> None:
    (tmp_path / "alignkit").mkdir()
    (tmp_path / "alignkit" / "a.py").write_text("def f():\n" + "    x = 1\n" * (lines - 1), encoding="utf-8")
    assert bool(too_long(tmp_path)) is reported


def test_a_probe_is_reported(tmp_path: Path) -> None:
    (tmp_path / "alignkit").mkdir()
    (tmp_path / "alignkit" / "a.py").write_text("def f(x):\n    return hasattr(x, 'y') and getattr(x, 'y')\n")
    assert sorted(probing(tmp_path, {})) == ["alignkit/a.py:2 calls getattr", "alignkit/a.py:2 calls hasattr"]
    assert probing(tmp_path, {"alignkit/a.py": "a reason"}) == []


@pytest.mark.parametrize("word", ["TO" + "DO", "FIX" + "ME", "/wo" + "rk/main", "DESIGN" + ".md"])
def test_a_leftover_is_reported(tmp_path: Path, word: str) -> None:
    (tmp_path / "README.md").write_text(f"fine\nsee {word}\n", encoding="utf-8")
    assert len(leftovers(tmp_path)) == 1
