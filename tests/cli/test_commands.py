"""The command `alignkit`: help, errors, exit codes, tables and JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from alignkit.cli.main import app
from alignkit.errors import ConfigError
from tests.hub.record_factory import make_record
from tests.invariants.source_tree import ROOT

COMMANDS = ("env", "show", "eval", "report", "publish", "export")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "NO_COLOR": "1"})


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A real process, whose output goes into pipes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "alignkit.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_record().save(tmp_path / "run")
    return tmp_path / "run"


def test_help_lists_the_commands_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, alignkit.cli.main; "
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    loaded = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert loaded.stdout.strip() == "[]"
    shown = invoke("--help")
    assert shown.exit_code == 0
    assert all(name in shown.output for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_examples(command: str) -> None:
    shown = invoke(command, "--help")
    assert shown.exit_code == 0
    assert f"alignkit {command}" in shown.output
    assert "--json" in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shw"], "Did you mean 'show'?"),
        (["show", "--jsn", "x"], "--json"),
        (["publish", "a", "b/c", "--dry-rn"], "--dry-run"),
        (["eval", "x", "--max-prompt", "3"], "--max-prompts"),
        (["export", "a"], "OUTPUT"),
        (["eval", "x", "--seed", "one"], "--seed"),
    ],
)
def test_a_wrong_command_line_names_the_nearest_and_exits_with_2(arguments: list[str], message: str) -> None:
    finished = invoke(*arguments)
    assert finished.exit_code == 2
    assert message in finished.output


def test_show_prints_figures_with_intervals(folder: Path) -> None:
    shown = invoke("show", str(folder))
    assert shown.exit_code == 0
    for part in ("owner/Some-1B", "held-out preferences: 298 rows", "0.644 [0.594, 0.694]", "owner/pairs, 1592 rows"):
        assert part in shown.output


def test_show_prints_the_record_as_json(folder: Path) -> None:
    shown = invoke("show", str(folder / "run_record.json"), "--json")
    assert json.loads(shown.output) == make_record().as_dict()


def test_markup_in_a_record_is_text(tmp_path: Path) -> None:
    record = make_record(settings={"x": "[red]no[/red]"}, changed=["x"])
    record.add_evaluation("[bold]b", {"[/]": 1.0}, rows=1)
    record.save(tmp_path)
    shown = invoke("show", str(tmp_path))
    assert shown.exit_code == 0, shown.output
    assert "[red]no[/red]" in shown.output
    assert "[bold]b" in shown.output


def test_the_report_is_written_where_it_is_wanted(folder: Path, tmp_path: Path) -> None:
    shown = invoke("report", str(folder), "--output", str(tmp_path / "elsewhere"), "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output)
    assert found["report"] == str(tmp_path / "elsewhere" / "report.html")
    assert Path(found["report"]).read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert not (folder / "report.html").exists()
    assert invoke("report", str(folder)).exit_code == 0
    assert (folder / "report.html").is_file()


def test_the_environment_names_no_folder_and_no_user() -> None:
    found = json.loads(invoke("env", "--json").output)
    assert {"alignkit", "versions", "machine", "compute_dtype", "extras"} <= found.keys()
    text = json.dumps(found)
    assert str(Path.home()) not in text
    assert os.uname().nodename not in text


def test_output_in_a_pipe_is_plain_and_errors_are_one_line(folder: Path, tmp_path: Path) -> None:
    shown = run("show", str(folder))
    assert shown.returncode == 0, shown.stderr
    assert "\x1b" not in shown.stdout
    failed = run("show", str(tmp_path / "nothing"))
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr
    assert "holds no run_record.json" in failed.stderr


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_what_was_measured_is_printed_even_where_the_run_cannot_be_written(
    extra: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"name": "preferences", "rows": 3, "metrics": {"accuracy": 0.75}, "baseline": None, "details": {}}
    monkeypatch.setattr("alignkit.evaluation.run.evaluate_run", lambda model, **_: [entry])
    (folder / "report.html").mkdir()  # as good as a folder that is not writable, and that holds for root too
    shown = invoke("eval", str(folder), "--data", "demo", *extra)
    assert "0.75" in shown.output
    assert isinstance(shown.exception, ConfigError)
    assert "--no-record" in str(shown.exception)


def test_a_model_without_an_adapter_is_compared_with_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict = {}
    monkeypatch.setattr("alignkit.evaluation.run.evaluate_run", lambda model, **given: seen.update(given) or [])
    assert invoke("eval", "owner/model", "--data", "demo", "--reference", "owner/base").exit_code == 0
    assert seen["reference"] == "owner/base"
