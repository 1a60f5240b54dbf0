"""`import alignkit` is cheap and silent, and every public name is where the face says it is."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

import alignkit
from tests.invariants.source_tree import ROOT, parse

HEAVY = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "numpy", "peft", "scipy", "torch", "transformers")

# Any attempt to resolve a host or to connect ends the subprocess with a traceback.
BLOCK_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError(f"the network was used: {args}")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = refuse
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that cannot use the network, with no offline switch to help it."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    command = [sys.executable, "-W", "error", "-c", BLOCK_NETWORK + code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_import_loads_nothing_heavy() -> None:
    result = run(f"import sys, alignkit\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"
    assert result.stderr == ""


def test_the_network_block_works() -> None:
    result = run("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')")
    assert result.returncode != 0
    assert "the network was used" in result.stderr


def test_every_public_name_resolves_without_network() -> None:
    result = run(
        "import alignkit\nfor name in alignkit.__all__:\n    print(name, eval(f'alignkit.{name}') is not None)"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{name} True" for name in alignkit.__all__]


def test_the_three_lists_of_the_face_agree() -> None:
    """`__all__`, the table of modules and the imports for type checkers name the same things."""
    (block,) = [node for node in parse(ROOT / "alignkit" / "__init__.py").body if isinstance(node, ast.If)]
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == alignkit._MODULE_OF
    assert {*typed, "__version__"} == set(alignkit.__all__)
    assert len(alignkit.__all__) == len(set(alignkit.__all__))


def test_dir_lists_the_public_names() -> None:
    assert set(alignkit.__all__) <= set(dir(alignkit))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'alignkit' has no attribute 'DPOTrianer'"):
        alignkit.DPOTrianer  # noqa: B018
