"""Tables of results."""

from __future__ import annotations

import io
import math
from pathlib import Path

from rich.console import Console, RenderableType

from alignkit.evaluation.generation import Answers
from alignkit.evaluation.preference import summarize_labelled, summarize_pairs
from alignkit.evaluation.report import answers_table, before_after_table, how_to_load

BEFORE = summarize_pairs(math.log(2), [0.0] * 4, [0.0] * 4, [5, 9, 3, 4], [7, 4, 3, 6])
AFTER = summarize_pairs(0.51234, [1.0, 0.0, 2.0, 1.0], [0.0, 1.0, 0.0, 0.5], [5, 9, 3, 4], [7, 4, 3, 6])


def text_of(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=140, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def line(text: str, start: str) -> str:
    (found,) = (row for row in text.splitlines() if row.strip("│ ").startswith(start))
    return found


def test_before_and_after_stand_side_by_side() -> None:
    text = text_of(before_after_table(BEFORE, AFTER))
    assert "4 pairs" in text
    assert "0.6931" in line(text, "loss")
    assert "0.5123" in line(text, "loss")
    assert "0.500 (all rewards equal)" in line(text, "reward accuracy")
    assert "0.750 [0.301, 0.954]" in line(text, "reward accuracy")
    assert "0.625 [" in line(text, "baseline: prefer the shorter")


def test_unpaired_rows_are_called_completions() -> None:
    summary = summarize_labelled(0.4, [2.0, 1.0, 0.0], [True, False, False], [3, 5, 3])
    assert "3 completions" in text_of(before_after_table(summary, summary))


def test_answers_keep_what_looks_like_markup() -> None:
    text = text_of(answers_table([Answers("Why?", "[bold]because[/bold]", "So [1].")]))
    for part in ("Why?", "[bold]because[/bold]", "So [1].", "before", "after"):
        assert part in text


def test_without_a_reference_there_is_one_column_of_answers() -> None:
    text = text_of(answers_table([Answers("Why?", None, "So.")]))
    assert "before" not in text
    assert "So." in text


def test_a_long_prompt_shows_its_end() -> None:
    text = text_of(answers_table([Answers("START" + "x" * 2000 + "END", "a", "b")]))
    assert "START" not in text
    assert "END" in text


def test_how_to_load_names_the_right_library(tmp_path: Path) -> None:
    assert "AutoModelForCausalLM" in how_to_load(tmp_path)
    assert "peft" not in how_to_load(tmp_path).replace(str(tmp_path), "")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "from peft import AutoPeftModelForCausalLM" in how_to_load(tmp_path)
