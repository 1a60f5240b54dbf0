"""The same preference pairs for every side of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignkit.data.prepare import prepare_preferences
from alignkit.data.reasons import BadRow
from alignkit.data.records import Preference, Transcripts, to_record

# Where each data set lies below the data folder, and how its rows are read. "hh" renders the transcripts as
# conversations through the chat template, "hh_text" leaves them as the plain text that they are.
DATASETS: dict[str, tuple[str, Transcripts]] = {
    "hh": ("hh_harmless_train.jsonl", Transcripts.TO_MESSAGES),
    "hh_text": ("hh_harmless_train.jsonl", Transcripts.AS_TEXT),
    "en_demo": ("dpo_en_demo.json", Transcripts.TO_MESSAGES),
}


def read_rows(name: str, folder: Path) -> list[dict[str, Any]]:
    """Read a data set as rows of `prompt`, `chosen`, `rejected`, in the order of its file; malformed rows are left out.

    Raises:
        FileNotFoundError: the data set is not in `folder`.
    """
    file, transcripts = DATASETS[name]
    path = folder / file
    text = path.read_text(encoding="utf-8")
    raw = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    rows = []
    for row in raw:
        try:
            record = to_record(row, transcripts=transcripts)
        except BadRow:
            continue
        assert isinstance(record, Preference)
        rows.append({"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected})
    return rows


def first_rows(
    rows: list[dict[str, Any]], count: int, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, Any]]:
    """Return the first `count` rows that no side would drop, so that every side's batches hold the same pairs.

    Raises:
        ValueError: there are fewer.
    """
    # Some rows are cut to nothing or to the same tokens; a few more than needed make up for them.
    candidates = rows[: count + 50 + count // 4]
    prepared, _ = prepare_preferences(candidates, tokenizer, max_length=max_length, max_drop_fraction=1.0)
    kept = list(prepared["row_id"])[:count]
    if len(kept) < count:
        raise ValueError(f"the data set has {len(kept)} usable pairs among {len(candidates)}, {count} are needed")
    return [candidates[row] for row in kept]
