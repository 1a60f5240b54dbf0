"""Counts of what was tried, printed at the end; tokenizers and models that the inputs go through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from datasets import disable_progress_bars
from transformers import PreTrainedTokenizerBase

from tests.fuzz.tokenizers import byte_level, dummy_prefix, one_word_one_id

_TALLIES = pytest.StashKey[dict[str, Counter[str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash.setdefault(_TALLIES, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many inputs each test tried, and what became of them."""
    tallies = config.stash.get(_TALLIES, {})
    if not tallies:
        return
    terminalreporter.section("inputs tried")
    for name, counts in sorted(tallies.items()):
        rest = ", ".join(f"{number} {what}" for what, number in counts.most_common() if what != "inputs")
        terminalreporter.line(f"{name}: {counts['inputs']} inputs" + (f"; {rest}" if rest else ""))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Counter[str]:
    """Counts of one test; `inputs` is how many it tried."""
    counts: Counter[str] = Counter()
    request.config.stash.setdefault(_TALLIES, {})[request.node.nodeid.split("tests/", 1)[-1]] = counts
    return counts


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep progress bars out of the output and caches out of the user's folder."""
    disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets_cache")
        yield


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """Three families: bytes that lose nothing, a dummy space before every text, and one id a word."""
    return {"bytes": byte_level(), "dummy prefix": dummy_prefix(), "words": one_word_one_id()}
