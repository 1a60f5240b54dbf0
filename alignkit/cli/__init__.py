"""Command lines: the option classes that recipes share, and the parser that reads them from YAML and arguments."""

from __future__ import annotations

from alignkit.cli.arguments import ModelArguments, RewardArguments, ScriptArguments
from alignkit.cli.parser import RecipeParser, plain_errors

__all__ = ["ModelArguments", "RecipeParser", "RewardArguments", "ScriptArguments", "plain_errors"]
