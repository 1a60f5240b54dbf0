"""What README.md says of PPO is what the code says."""

from __future__ import annotations

import ast
import dataclasses
import re

import alignkit
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.ppo_metrics import METRICS
from tests.invariants.source_tree import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    (text,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", README, flags=re.DOTALL | re.MULTILINE)
    return text


def rows(text: str) -> list[list[str]]:
    """Cells of the table in `text`, without its heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    table = [[f"`{name}`", metric.meaning, metric.healthy] for name, metric in METRICS.items()]
    assert rows(section("PPO's metrics")) == table


def is_said(text: str, default: object) -> bool:
    """Whether a cell of the options' table names this default."""
    if text == "off":
        return default is None or default is False
    if text == "the policy's":
        return default is None
    if isinstance(default, str):
        return text == f"`{default}`"
    return float(text.replace(",", "").removesuffix(" (TRL's)")) == default


def test_every_option_exists_and_has_the_default_that_is_named() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(PPOConfig)}
    table = rows(section("Options"))
    assert len(table) > 15
    for names, values, _ in table:
        options = re.findall(r"`(\w+)`", names.split(", with")[0])
        said = values.split(", ")
        said = said if len(said) > 1 else said * len(options)  # one value for all of them
        for option, text in zip(options, said, strict=True):
            assert is_said(text, defaults[option]), (option, text, defaults[option])


def test_the_example_imports_what_there_is() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", section("Reward models and PPO"), flags=re.DOTALL)
    tree = ast.parse(code)
    names = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "alignkit"
        for alias in node.names
    ]
    assert set(names) <= set(alignkit.__all__)
    fields = {field.name for field in dataclasses.fields(PPOConfig)}
    (config,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "PPOConfig"
    )
    assert {keyword.arg for keyword in config.keywords} <= fields
