"""Reports opened in a real headless Chromium: on a phone and on a desk, in light and dark.

The browser is ALIGNKIT_CHROMIUM, or a Chromium or Chrome on PATH; `.ci/chromium FOLDER` installs one without root.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignkit.evaluation.html import write_report
from tests.evaluation.run_records import dpo_record, estimate, hostile_record, ppo_record

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (390, 1440)
SCHEMES = ("light", "dark")
SMALLEST = 12.0  # pixels of text
CONTRAST, LARGE_CONTRAST = 4.5, 3.0  # WCAG 2.2, level AA
BRIGHT, DARK = 200, 60  # mean of a background's red, green and blue

# Every visible text with its size in pixels, its colour and what it lies on. The size of text in an SVG is scaled.
TEXTS = """() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    const text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility({visibilityProperty: true, contentVisibilityAuto: true})) continue;
    if (element.closest('.hidden, .skip')) continue;
    const drawn = element.ownerSVGElement;
    const matrix = drawn && (element.closest('text') ?? element).getScreenCTM();
    const size = parseFloat(style.fontSize) * (matrix ? Math.hypot(matrix.a, matrix.b) : 1);
    let back = [255, 255, 255, 0], at = element;
    while (at && back[3] === 0) { back = rgba(getComputedStyle(at).backgroundColor); at = at.parentElement; }
    found.push({text: text.slice(0, 40), size, color: rgba(drawn ? style.fill : style.color), back,
                bold: Number(style.fontWeight) >= 700});
  }
  return found;
}"""
OVERFLOW = """() => [...document.querySelectorAll('body *')]
  .filter((each) => each.checkVisibility() && !each.closest('.hidden, .skip, .scroll')
    && each.getBoundingClientRect().right > innerWidth + 0.5)
  .map((each) => each.tagName + '.' + each.getAttribute('class')).slice(0, 5)"""
OPEN_ALL = "() => document.querySelectorAll('details').forEach((each) => { each.open = true; })"


def executable() -> str | None:
    return os.environ.get("ALIGNKIT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def measured_record() -> Any:
    record = dpo_record()
    record.add_evaluation("Safety: refusals", {"refusal_rate": estimate(0.9, 0.85, 0.94)}, rows=50)
    return record


RECORDS = {"dpo": measured_record, "ppo": ppo_record, "hostile": hostile_record}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = executable()
    if path is None:
        pytest.skip("no Chromium on PATH and no ALIGNKIT_CHROMIUM; `.ci/chromium FOLDER` installs one")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path)
        yield launched
        launched.close()


class Opened:
    """A page, and everything that it said, asked for or complained of."""

    def __init__(self, browser: Any, file: Path, **context: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.url = file.as_uri()
        self.page.goto(self.url)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()

    def background(self) -> float:
        """Mean of red, green and blue behind the page."""
        found = self.page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        return sum(found[:3]) / 3


def luminance(color: list[float]) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [value / 255 for value in color[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(text: list[float], back: list[float]) -> float:
    lighter, darker = sorted((luminance(text), luminance(back)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_computed_as_the_standard_says() -> None:
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    assert contrast([119, 119, 119], [255, 255, 255]) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", RECORDS)
def test_a_report_is_readable_and_silent(name: str, width: int, scheme: str, browser: Any, tmp_path: Path) -> None:
    file = write_report(RECORDS[name](), tmp_path)
    with Opened(browser, file, viewport={"width": width, "height": 900}, color_scheme=scheme) as opened:
        page = opened.page
        title = page.title()
        picture = page.screenshot(path=tmp_path / f"{name}_{width}_{scheme}.png", full_page=True)
        assert picture.startswith(b"\x89PNG")
        for unfold in (False, True):
            if unfold:
                page.evaluate(OPEN_ALL)
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width, page.evaluate(OVERFLOW)
            texts = page.evaluate(TEXTS)
            assert len(texts) > 100
            small = [(each["text"], each["size"]) for each in texts if each["size"] < SMALLEST]
            assert small == []
            assert [each for each in texts if each["back"][3] != 1] == []  # every text lies on a colour
            pale = [
                (each["text"], round(found, 2))
                for each in texts
                if (found := contrast(each["color"], each["back"]))
                < (LARGE_CONTRAST if each["size"] >= 24 else CONTRAST)
            ]
            assert pale == []
        assert (opened.background() > BRIGHT) if scheme == "light" else (opened.background() < DARK)
        assert page.title() == title  # a hostile text would have changed it
        assert page.evaluate("() => document.scripts.length") == 0
        assert opened.said == []
        assert opened.asked == [opened.url]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_theme_is_switched_by_mouse_and_by_keyboard_without_scripts(
    scheme: str, browser: Any, tmp_path: Path
) -> None:
    file = write_report(dpo_record(), tmp_path)
    with Opened(browser, file, color_scheme=scheme, java_script_enabled=False) as opened:
        page = opened.page
        page.get_by_text("Dark", exact=True).click()
        assert opened.background() < DARK
        page.keyboard.press("ArrowLeft")
        assert opened.background() > BRIGHT
        page.keyboard.press("ArrowLeft")
        assert (opened.background() > BRIGHT) is (scheme == "light")
        assert opened.said == []


def test_pointing_at_a_curve_shows_its_values(browser: Any, tmp_path: Path) -> None:
    with Opened(browser, write_report(dpo_record(), tmp_path), viewport={"width": 1440, "height": 900}) as opened:
        chart = opened.page.locator("#curve-loss svg[role=img]")
        assert chart.locator(".tip:visible").count() == 0
        box = chart.bounding_box()
        chart.hover(position={"x": box["width"] - 15, "y": box["height"] / 2})
        shown = chart.locator(".tip text:visible")
        assert shown.count() == 1
        assert shown.text_content() == "step 200.5900.660"  # training and held-out rows


def test_the_keyboard_reaches_the_results_and_the_folds(browser: Any, tmp_path: Path) -> None:
    with Opened(browser, write_report(dpo_record(), tmp_path)) as opened:
        page = opened.page
        page.keyboard.press("Tab")
        assert page.evaluate("() => document.activeElement.textContent") == "Skip to the results"
        page.locator("#settings summary").focus()
        page.keyboard.press("Enter")
        assert page.locator("#settings details[open]").count() == 1


def test_the_page_prints_in_light_colours(browser: Any, tmp_path: Path) -> None:
    with Opened(browser, write_report(dpo_record(), tmp_path), color_scheme="dark") as opened:
        opened.page.emulate_media(media="print")
        assert opened.background() > BRIGHT
        assert not opened.page.locator(".theme").is_visible()
        assert opened.page.pdf().startswith(b"%PDF")
