"""The report's page: what it holds, and that nothing of what others wrote gets out of its place."""

from __future__ import annotations

import base64
import copy
import hashlib
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from alignkit.evaluation.html import render_report, write_report
from alignkit.evaluation.html_tables import evaluation_table
from alignkit.hub.record import RunRecord
from tests.evaluation.run_records import (
    HOSTILE_TEXTS,
    dpo_record,
    estimate,
    hostile_record,
    ppo_record,
)

VOID = {"meta", "link", "input", "br"}


class Page(HTMLParser):
    """Elements, attributes and text of a page, by a parser that knows nothing of ours."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.sections: dict[str, str] = {}
        self._section = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self._section = str(dict(attrs)["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))
        if "section" in self.open:
            self.sections[self._section] = self.sections.get(self._section, "") + data

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    def text(self, section: str) -> str:
        return " ".join(self.sections[section].split())


RECORDS = {
    "dpo": dpo_record,
    "ppo": ppo_record,
    "hostile": hostile_record,
    "empty": lambda: RunRecord(method="dpo", alignkit="0.1.0", created="", base={}),
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_page_is_whole_and_needs_nothing(name: str) -> None:
    page = Page(render_report(RECORDS[name]()))
    assert page.open == []
    found = {tag for tag, _ in page.elements}
    assert not found & {"script", "iframe", "object", "embed", "form", "base", "img", "video", "audio", "foreignobject"}
    for tag, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "style"], (tag, attributes)
        for key in ("src", "href", "action", "srcset", "xlink:href"):
            value = attributes.get(key)
            assert value is None or value.startswith("#") or value == "data:,", (tag, attributes)
    (style,) = [text for tag, text in page.texts if tag == "style"]
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize("name", RECORDS)
def test_the_policy_allows_this_style_and_nothing_else(name: str) -> None:
    page = Page(render_report(RECORDS[name]()))
    (policy,) = [each["content"] for each in page.tags("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    (style,) = [text for tag, text in page.texts if tag == "style"]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


@pytest.mark.parametrize("name", RECORDS)
def test_anchors_lead_somewhere_and_headings_do_not_skip(name: str) -> None:
    page = Page(render_report(RECORDS[name]()))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {str(each["href"])[1:] for each in page.tags("a")} <= set(ids)
    assert {each for _, attributes in page.elements if (each := attributes.get("aria-labelledby"))} <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    charts = [each for each in page.tags("svg") if each.get("role") == "img"]
    assert all(each["aria-label"] for each in charts)


def test_headline_figures_and_intervals_are_said() -> None:
    page = Page(render_report(dpo_record()))
    (lead,) = [text for tag, text in page.texts if tag == "p" and text.startswith("DPO:")]
    assert lead == (
        "DPO: a LoRA adapter of rank 16 on tiny-chat, trained with 1,592 pairs in 20 steps and 18 min. Reward "
        "accuracy on held-out data: 64.4 % (95 % interval [58.8, 69.6]), 50.0 % before."
    )
    summary = page.text("summary")
    assert "+14.4 pt from 50.0 % [44.4, 55.6] before" in summary
    assert "Held-out preferences, 298 rows" in summary


def test_the_table_shows_every_metric_before_and_after() -> None:
    text = Page(render_report(dpo_record())).text("evaluations")
    for shown in ("64.4 %", "[58.8, 69.6]", "0.391", "[0.273, 0.515]", "+0.391", "0.630", "−0.063", "53.7 %"):
        assert shown in text
    assert "prefer the shorter" in text


def test_accuracy_is_drawn_on_the_scale_of_its_baseline() -> None:
    rows = {row.name: row for row in evaluation_table(dpo_record().evaluations[0]).metrics}
    accuracy, shorter, margin = (rows[name].plot for name in ("accuracy", "shorter", "margin"))
    assert accuracy is not None
    assert shorter is not None
    assert margin is not None
    assert accuracy.reference == shorter.reference
    assert accuracy.reference != margin.reference


def test_metrics_of_both_sides_share_a_row() -> None:
    metrics = {
        "tokens": estimate(28.0, 26.0, 30.0),
        "perplexity": 11.5,
        "subset/donotanswer": estimate(0.6, 0.5, 0.7),
    }
    baseline = {"tokens": estimate(35.0, 33.0, 37.0), "perplexity": 12.5}
    answers = {"name": "answers", "rows": 9, "metrics": metrics, "baseline": baseline}
    text = Page(render_report(dpo_record(evaluations=[answers])))
    shown = text.text("evaluations")
    assert "tokens per answer 35.00[33.00, 37.00] 28.00[26.00, 30.00] −7.000" in shown
    assert "perplexity 12.50 11.50 −1.000" in shown
    assert "subset donotanswer 60.0 %" in shown
    assert "reference" not in shown


def test_a_safety_evaluation_has_its_own_section() -> None:
    record = dpo_record()
    assert "safety" not in Page(render_report(record)).sections
    record.add_evaluation("Safety: refusals", {"refusal_rate": estimate(0.9, 0.85, 0.94)}, rows=200)
    page = Page(render_report(record))
    assert "refusal rate" in page.text("safety")
    assert "90.0 %" in page.text("safety")
    assert "refusal rate" not in page.text("evaluations")


def test_differences_are_marked_and_rewards_shown() -> None:
    page = Page(render_report(dpo_record()))
    assert [text for tag, text in page.texts if tag == "ins" if "has" not in text][-1] == "pun"
    assert [text for tag, text in page.texts if tag == "del"][-1] == "joke at all, sorry"
    assert "reward 0.500" in Page(render_report(ppo_record())).text("samples")
    assert "reward" not in page.text("samples")


def test_data_settings_and_machine_are_told() -> None:
    page = Page(render_report(dpo_record()))
    data = page.text("data")
    for shown in ("1,592", "1,600", "8 (0.5 %)", "86, 516, 925, 1103", "371", "ab" * 32):
        assert shown in data
    settings = page.text("settings")
    assert settings.index("learning_rate") < settings.index("3 settings at their defaults") < settings.index("beta")
    machine = page.text("machine")
    for shown in ("12.88 GB", "5.37 GB", "18 min", "2.13.0", "apache-2.0", "134,515,008"):
        assert shown in machine


def test_a_run_that_was_not_measured_claims_nothing() -> None:
    page = Page(render_report(dpo_record(evaluations=[], samples=[], log=[], finished=None)))
    assert "makes no claim" in page.text("summary")
    assert "no curves" in page.text("curves")
    assert "resume_from_checkpoint" in page.text("next")
    assert not {"evaluations", "samples", "safety"} & set(page.sections)


def test_what_others_wrote_stays_text() -> None:
    text = render_report(hostile_record())
    page = Page(text)
    shown = "".join(data for _, data in page.texts)
    assert HOSTILE_TEXTS[0] in shown
    assert HOSTILE_TEXTS[1] in shown
    assert "⟨U+202E⟩" in shown
    assert "⟨U+D800⟩" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert "49" not in page.text("samples").replace("{{ 7 * 7 }}", "")
    text.encode("utf-8")


def test_long_texts_are_cut_and_folded_and_many_points_thinned() -> None:
    text = render_report(hostile_record())
    assert len(text) < 6_000_000
    page = Page(text)
    assert "180,000 characters of the prompt are left out" in page.text("samples")
    assert "of 700 points" in page.text("curves")
    assert "values are no numbers" in page.text("curves")
    assert "not marked" in page.text("samples")


def test_only_the_first_samples_are_shown() -> None:
    record = dpo_record(samples=[{"prompt": f"prompt {n}", "before": "a", "after": "b"} for n in range(60)])
    text = Page(render_report(record)).text("samples")
    assert "36 more are in run_record.json" in text
    assert "prompt 23" in text
    assert "prompt 24" not in text


def test_a_record_that_was_saved_makes_the_same_page(tmp_path: Path) -> None:
    record = dpo_record()
    before = copy.deepcopy(record)
    page = render_report(record)
    assert record == before  # rendering only reads
    record.save(tmp_path)
    assert render_report(RunRecord.load(tmp_path)) == page


def test_the_file_is_written_whole_and_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    path = write_report(dpo_record(), folder)
    assert path == folder / "report.html"
    assert path.read_bytes().decode("utf-8") == render_report(dpo_record())
    write_report(ppo_record(), folder)
    assert [each.name for each in folder.iterdir()] == ["report.html"]
