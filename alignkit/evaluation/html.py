"""The report of a run: one HTML file that needs nothing else, no network and no script.

Everything that a model or a dataset wrote is escaped, and what is invisible or reorders text is written out, so that a
page about hostile text stays a page about text. A Content-Security-Policy forbids the rest.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from alignkit.evaluation.advice import RULES, advise
from alignkit.evaluation.curves import panels
from alignkit.evaluation.html_charts import chart
from alignkit.evaluation.html_text import visible
from alignkit.evaluation.html_view import View, view
from alignkit.hub.record import RunRecord, write_text
from alignkit.trainers.ppo_diagnosis import DIAGNOSES

REPORT_FILE = "report.html"
_TEMPLATES = "evaluation/templates"
_OPEN_SAMPLES = 6  # the others are folded


def write_report(record: RunRecord, folder: str | Path) -> Path:
    """Write `report.html` into `folder`, making it as needed, through a temporary file; return its path.

    Args:
        record: of a run, finished or not. What it lacks is left out of the page.
        folder: usually the run's output directory.
    """
    return write_text(Path(folder) / REPORT_FILE, render_report(record))


def render_report(record: RunRecord) -> str:
    """Return the page as text."""
    environment = Environment(
        loader=PackageLoader("alignkit", _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader is not None
    style = environment.loader.get_source(environment, "report.css")[0]
    shown = view(record)
    charts = [(panel.is_main, chart(panel)) for panel in panels(record.log)]
    return environment.get_template("report.html.jinja").render(
        record=record,
        view=shown,
        open_samples=_OPEN_SAMPLES,
        sections=_sections(shown),
        advice=advise(record),
        rules=len(RULES) + (len(DIAGNOSES) if record.method == "ppo" else 0),
        main_charts=[each for is_main, each in charts if is_main],
        other_charts=[each for is_main, each in charts if not is_main],
        style=Markup(style),
        style_hash="sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )


def _shown(value: Any) -> Any:
    """Every text that a template writes goes through here before it is escaped; markup of the templates does not."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _sections(shown: View) -> list[tuple[str, str]]:
    """Anchors and titles of what the page holds."""
    every = (
        ("summary", "In short", True),
        ("next", "What to try next", True),
        ("evaluations", "Before and after", bool(shown.evaluations)),
        ("safety", "Safety", bool(shown.safety)),
        ("curves", "Curves", True),
        ("samples", "Samples", bool(shown.samples)),
        ("data", "Data", bool(shown.data)),
        ("settings", "Settings", True),
        ("machine", "Model and machine", True),
    )
    return [(anchor, title) for anchor, title, is_there in every if is_there]
