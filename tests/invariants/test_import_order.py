"""The import order: each layer uses only itself and the layers before it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.invariants.source_tree import ROOT, parse, python_files

ORDER = (
    "errors",
    "functional",
    "data",
    "models",
    "rollout",
    "checkpoint",
    "hub",
    "trainers",
    "evaluation",
    "pipelines",
    "cli",
    "recipes",
)
FUNCTIONAL_MAY_USE = {"torch", "alignkit"} | sys.stdlib_module_names
DATA_MAY_NOT_USE = {"accelerate", "bitsandbytes", "peft"}


def layer_of_file(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return "recipes" if parts[0] == "recipes" else parts[1]


def imported_names(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import in a file, also inside functions and type-checking blocks.

    `from a.b import c` yields `a.b.c`; whether `c` is a module or an object does not matter to the layers.
    """
    package = path.relative_to(root).parent.parts
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def complaint(layer: str, name: str) -> str | None:
    """Say what is wrong with `layer` importing `name`, or return None."""
    top, _, rest = name.partition(".")
    if layer == "functional" and top not in FUNCTIONAL_MAY_USE:
        return "functional/ uses torch and the standard library only"
    if layer == "data" and (top in DATA_MAY_NOT_USE or (top == "transformers" and "Model" in rest)):
        return "data/ uses no model code"
    if top == "recipes" and layer != "recipes":
        return "recipes are programs, not a library"
    if top != "alignkit" or layer == "recipes":
        return None
    target = rest.split(".")[0]
    if target == "__version__":
        return None  # the package's own face defines it
    if target not in ORDER:
        return "inside the package, import from the module that defines the name"
    if ORDER.index(target) > ORDER.index(layer):
        return f"{layer} comes before {target}"
    return None


def violations(root: Path) -> list[str]:
    found = []
    for path in python_files(root, "alignkit", "recipes"):
        if path == root / "alignkit" / "__init__.py":
            continue  # the public face points at every layer, lazily
        where = path.relative_to(root).as_posix()
        layer = layer_of_file(root, path)
        if layer not in ORDER:
            found.append(f"{where}: '{layer}' has no place in the import order")
            continue
        for line, name in imported_names(root, path):
            if text := complaint(layer, name):
                found.append(f"{where}:{line} imports {name}: {text}")
    return found


def test_every_layer_imports_only_what_comes_before_it() -> None:
    assert (ROOT / "alignkit" / "errors.py").is_file()
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("alignkit/data/x.py", "from alignkit.models.load import nf4", "data comes before models"),
        ("alignkit/data/x.py", "from ..models import load", "data comes before models"),
        ("alignkit/data/sub/x.py", "from ...models import load", "data comes before models"),
        ("alignkit/errors.py", "def f():\n    import alignkit.functional.masked", "errors comes before functional"),
        (
            "alignkit/models/x.py",
            "if TYPE_CHECKING:\n    from alignkit.trainers.dpo import DPOTrainer",
            "models comes before trainers",
        ),
        ("alignkit/models/x.py", "from alignkit import DPOTrainer", "the module that defines the name"),
        ("alignkit/models/x.py", "import alignkit", "the module that defines the name"),
        ("alignkit/trainers/x.py", "import recipes.dpo_lora", "programs, not a library"),
        ("alignkit/functional/x.py", "import numpy as np", "torch and the standard library only"),
        ("alignkit/functional/x.py", "from transformers import Trainer", "torch and the standard library only"),
        ("alignkit/data/x.py", "from peft import PeftModel", "no model code"),
        ("alignkit/data/x.py", "from transformers import AutoModelForCausalLM", "no model code"),
        ("alignkit/helpers.py", "import math", "no place in the import order"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, expected: str) -> None:
    plant(tmp_path, file, source)
    (found,) = violations(tmp_path)
    assert found.startswith(file)
    assert expected in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("alignkit/trainers/x.py", "from alignkit.functional.preference import LOSSES"),
        ("alignkit/functional/x.py", "import math\nimport torch.nn.functional as F\nfrom .masked import masked_mean"),
        ("alignkit/functional/x.py", "from alignkit.errors import ConfigError"),
        ("alignkit/data/x.py", "from transformers import PreTrainedTokenizerBase\nfrom . import records"),
        ("alignkit/models/x.py", "from alignkit import errors"),
        ("recipes/x.py", "import alignkit\nfrom alignkit import DPOTrainer"),
        ("alignkit/__init__.py", "from alignkit.trainers.dpo import DPOTrainer"),
    ],
)
def test_an_allowed_import_is_not_reported(tmp_path: Path, file: str, source: str) -> None:
    plant(tmp_path, file, source)
    assert violations(tmp_path) == []


def plant(root: Path, file: str, source: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
