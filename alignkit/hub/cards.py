"""The card of a repository, until there is a better one."""

from __future__ import annotations

from pathlib import Path

from alignkit.hub.record import RunRecord

_GENERATED = (
    "<!-- alignkit",
    "[More Information Needed]",
    "generated automatically",
    "with alignkit's `RewardTrainer`",
)


def is_generated(path: str | Path) -> bool:
    """Whether a library wrote this card, so that nothing of a person's is lost with it."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    return any(mark in text for mark in _GENERATED)


def write_card(folder: Path, record: RunRecord | None, *, repo_id: str) -> Path:
    """Write `README.md`."""
    path = folder / "README.md"
    path.write_text(f"---\nlibrary_name: peft\ntags:\n- alignkit\n---\n<!-- alignkit -->\n# {repo_id}\n")
    return path
