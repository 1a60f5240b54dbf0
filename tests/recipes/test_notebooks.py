"""The notebooks: kept without outputs, valid, and run whole on the demonstration model."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.invariants.source_tree import ROOT

FOLDER = ROOT / "recipes" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Who owns the repository on GitHub. To be replaced here and in the notebooks' badges when it is known.
OWNER = "OWNER"
BADGE = f"https://colab.research.google.com/github/{OWNER}/alignkit/blob/main/recipes/notebooks/"
ROWS = {"dpo_in_ten_lines": 8, "ppo_with_your_own_reward": 16, "evaluate_and_publish": 8}  # 16 are one rollout

# What is left in the folder, and what the last cells show.
EXPECTED = {
    "dpo_in_ten_lines": (["dpo/adapter_config.json", "dpo/run_record.json"], "reward accuracy"),
    "ppo_with_your_own_reward": (["ppo/adapter_config.json", "ppo/run_record.json"], "KL from the reference"),
    "evaluate_and_publish": (["dpo/adapter_config.json", "dpo/run_record.json"], "adapter_model.safetensors"),
}


def cells(path: Path, kind: str) -> list[str]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def code_of(path: Path) -> str:
    """The notebook as one program, in which magics do nothing."""
    return re.sub(r"^(\s*)%.*$", r"\1pass", "\n".join(cells(path, "code")), flags=re.MULTILINE)


def test_there_are_those_that_are_expected() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(EXPECTED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_kept_without_outputs(path: Path) -> None:
    notebook: Any = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
        assert cell.metadata == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_in_colab_and_measures_memory_around_training(path: Path) -> None:
    title = cells(path, "markdown")[0]
    assert f"]({BADGE}{path.name})" in title
    code = cells(path, "code")
    reports = [index for index, text in enumerate(code) if "alignkit.memory_report()" in text]
    (training,) = (index for index, text in enumerate(code) if ".train()" in text)
    assert reports[0] < training <= reports[-1]
    assert "torch.cuda.is_available()" in "".join(code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_name_in_a_notebook_exists(path: Path) -> None:
    tree = ast.parse(code_of(path))
    compile(tree, str(path), "exec")
    modules: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert missing == [], f"{node.module} has no {missing}"
        elif isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id} has no {node.attr}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_whole(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ALIGNKIT_NOTEBOOK_ROWS", str(ROWS[path.stem]))
    notebook: Any = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    shown = [
        output.get("text") or str(output.get("data", {}).get("text/plain", ""))
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", ()))
    text = "".join(shown)
    files, said = EXPECTED[path.stem]
    assert all((tmp_path / file).is_file() for file in files)
    assert said in text
    record = json.loads((tmp_path / files[1]).read_text(encoding="utf-8"))
    assert record["command"] is None
    assert record["evaluations"]
    assert f"demo on {ROWS[path.stem]} rows" in text
    assert len(re.findall(r"CPU: \d+\.\d\d GiB used", text)) >= 2
