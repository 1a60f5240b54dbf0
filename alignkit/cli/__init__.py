"""Command lines: the options and parser that recipes share, and the command `alignkit`.

Names are imported when they are first used: the command answers `--help` and completes names without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alignkit.cli.arguments import ModelArguments, RewardArguments, ScriptArguments
    from alignkit.cli.parser import RecipeParser, plain_errors

__all__ = ["ModelArguments", "RecipeParser", "RewardArguments", "ScriptArguments", "plain_errors"]

_MODULE_OF = {
    "ModelArguments": "alignkit.cli.arguments",
    "RewardArguments": "alignkit.cli.arguments",
    "ScriptArguments": "alignkit.cli.arguments",
    "RecipeParser": "alignkit.cli.parser",
    "plain_errors": "alignkit.cli.parser",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'alignkit.cli' has no attribute {name!r}")
    return vars(import_module(_MODULE_OF[name]))[name]
