"""The model card of a run: rendered from its record, so that it says what was measured and no more."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from alignkit.data.front_matter import check_yaml, front_matter
from alignkit.errors import DataError
from alignkit.hub.card_text import base_advice, intended_use, limits, memory_needed, reward_advice, snippet, what_it_is
from alignkit.hub.metadata import card_metadata, default_name, merged_metadata
from alignkit.hub.record import RECORD_FILE, RunRecord, write_text
from alignkit.hub.wording import (
    base_name,
    count,
    evaluated_on,
    evaluation_title,
    figure,
    metric_title,
    size,
    training_time,
)

CARD_FILE = "README.md"

_SAMPLES = 4
# Of those that `alignkit report` draws, the ones that a card shows where they lie beside it.
_PICTURES = ("accuracy.png", "margin.png", "reward.png", "kl.png", "frontier.png")
_SAMPLE_CHARACTERS = 1500
# Written by the libraries beneath us, without a word of a person in it.
_TEMPLATES = ("# Model Card for Model ID", "[More Information Needed]", "should probably proofread and complete it")
# Of the text, and of the metadata above it (which older cards lack), so that what a person changes there stays too.
_SEAL = re.compile(r"\n*<!-- Written by alignkit from run_record\.json \(([0-9a-f]{16})(?: ([0-9a-f]{16}))?\) -->\s*\Z")

logger = logging.getLogger(__name__)


def render_card(
    record: RunRecord,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """Return the text of a run's model card, metadata included.

    Args:
        record: of the run.
        repo_id: where the model will be on the Hub; by default the card speaks of the folder that it lies in.
        license: an identifier of the Hub; by default the base's.
        pictures: names of image files beside the card, to be shown.

    Raises:
        DataError: metadata that the Hub would not take.
    """
    name = default_name(record) if repo_id is None else repo_id.split("/")[-1]
    metadata = card_metadata(record, model_name=name, license=license)
    body = _render(record, title=name, repo_id=repo_id, pictures=pictures)
    return _sealed(metadata, body)


def _sealed(metadata: ModelCardData, body: str) -> str:
    unsealed = f"---\n{metadata}\n---\n\n{body}\n"
    seal = f"{_digest(body)} {_metadata_digest(ModelCard(unsealed))}"
    return f"{unsealed}\n<!-- Written by alignkit from {RECORD_FILE} ({seal}) -->\n"


def _metadata_digest(card: ModelCard) -> str:
    return _digest(json.dumps(card.data.to_dict(), sort_keys=True, default=str))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def card_for(folder: str | Path, record: RunRecord, *, repo_id: str | None = None, license: str | None = None) -> str:
    """Return the card that belongs into `folder`: a run's, or the one that a person wrote there, its metadata mended.

    Args:
        folder: it may hold a `README.md`.
        record, repo_id, license: as for `render_card`.

    Raises:
        DataError: metadata that the Hub would not take, or a `README.md` that cannot be read.
    """
    pictures = [name for name in _PICTURES if (Path(folder) / name).is_file()]
    rendered = render_card(record, repo_id=repo_id, license=license, pictures=pictures)
    path = Path(folder) / CARD_FILE
    if not path.is_file():
        return rendered
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows write a mark first
        check_yaml(front_matter(text))
        # A card without metadata gets an empty block, for which huggingface_hub would print a warning.
        theirs = ModelCard(text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}")
    except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"'{path}' cannot be read ({error}): mend its metadata, or remove the file.") from error
    ours = ModelCard(rendered)
    if is_generated(theirs.text):
        seal = _SEAL.search(theirs.text)
        if seal is None or seal[2] is None or _metadata_digest(theirs) == seal[2]:
            return rendered
        mended = merged_metadata(theirs.data.to_dict(), ours.data.to_dict(), license=license)
        return f"---\n{mended}\n---\n{ours.text}"
    mended = merged_metadata(theirs.data.to_dict(), ours.data.to_dict(), license=license)
    return f"---\n{mended}\n---\n{theirs.text}"


def write_card(
    folder: str | Path,
    record: RunRecord,
    *,
    repo_id: str | None = None,
    license: str | None = None,
) -> Path:
    """Write the card of a run to `README.md` in `folder`; the text of a person's own card stays. Return its path.

    Raises:
        DataError: as `card_for`.
    """
    return write_text(Path(folder) / CARD_FILE, card_for(folder, record, repo_id=repo_id, license=license))


def is_generated(body: str) -> bool:
    """Whether the text of a card (without metadata) comes from alignkit, PEFT or transformers, and was not edited."""
    seal = _SEAL.search(body)
    if seal is None:
        return not body.strip() or any(template in body for template in _TEMPLATES)
    written = body[: seal.start()].lstrip("\n")
    return _digest(written) == seal[1]


def _render(record: RunRecord, *, title: str, repo_id: str | None, pictures: Sequence[str]) -> str:
    environment = Environment(
        loader=PackageLoader("alignkit.hub"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    samples = record.samples[:_SAMPLES]
    text = environment.get_template("card.md.jinja").render(
        title=title,
        record=record,
        pictures=[(Path(name).stem.replace("_", " "), name) for name in pictures],
        what=what_it_is(record),
        evaluations=[_evaluation(each) for each in record.evaluations],
        base_advice=base_advice(record, repo_id),
        reward_advice=reward_advice(record),
        snippet=snippet(record, repo_id),
        memory=memory_needed(record),
        intended=intended_use(record),
        limits=[*map(_inline, record.notes), *limits(record)],
        training=_training(record),
        settings=_yaml({name: record.settings[name] for name in record.changed if name in record.settings}),
        data=[_data_row(each) for each in record.data],
        samples=[_sample(each) for each in samples],
        samples_have_before=any(each.get("before") is not None for each in samples),
        versions=_versions(record),
    )
    return text.strip("\n")


def _evaluation(entry: Mapping[str, Any]) -> dict[str, Any]:
    metrics, baseline = entry["metrics"], entry.get("baseline") or {}
    values = [*metrics.values(), *baseline.values()]
    return {
        "name": _inline(evaluation_title(entry["name"])),
        "rows": f"{entry['rows']} rows" + (f" of {_inline(data)}" if (data := evaluated_on(entry)) else ""),
        "has_baseline": bool(baseline),
        "has_intervals": any(isinstance(value, Mapping) and value.get("low") is not None for value in values),
        "table": [
            {"title": _inline(metric_title(name)), "before": figure(baseline.get(name)), "after": figure(metric)}
            for name, metric in metrics.items()
        ],
    }


def _training(record: RunRecord) -> list[tuple[str, str]]:
    base, adapter, usage, machine = record.base, record.adapter, record.usage, record.hardware
    rows = [("base", base_name(base) + (f", {base['note']}" if base.get("note") else ""))]
    if base.get("revision"):
        rows.append(("revision of the base", f"`{base['revision']}`"))
    packed = f", weights packed as {base['quantization']}" if base.get("quantization") else ""
    rows.append(("size", f"{count(base['parameters'])} parameters, {base.get('dtype') or 'unknown dtype'}{packed}"))
    if adapter is not None:
        shape = f", r={adapter['r']}, alpha={adapter.get('alpha')}" if "r" in adapter else ""
        rows.append(("trained", f"{adapter['kind']}{shape}: {count(adapter['trainable_parameters'])} parameters"))
    else:
        rows.append(("trained", "all parameters"))
    if record.reward:
        rows.append(("reward", ", ".join(map(_inline, record.reward))))
    if usage.get("training_seconds") is not None:
        rows.append(("training", training_time(usage)))
    if usage.get("peak_memory_bytes"):
        where = "of the device" if machine.get("device") == "cuda" else "of the process"
        rows.append(("peak memory", f"{size(usage['peak_memory_bytes'])} {where}"))
    processes = f", {machine['processes']} processes" if machine.get("processes", 1) > 1 else ""
    threads = f", {machine['threads']} thread{'s' * (machine['threads'] > 1)}" if machine.get("threads") else ""
    rows.append(("machine", f"{machine.get('device_name', 'unknown')}{threads}{processes}"))
    rows.append(("seed", str(record.seeds.get("seed"))))
    return [(name, _inline(value)) for name, value in rows]


def _data_row(entry: Mapping[str, Any]) -> dict[str, str]:
    preparation = entry.get("preparation") or {}
    drops = {reason: found["count"] for reason, found in preparation.get("drops", {}).items()}
    source = _inline(str(entry.get("source") or "given as rows"))
    if entry.get("hub_id"):
        source = f"[{source}](https://huggingface.co/datasets/{entry['hub_id']})"
        source += f" at `{entry['revision'][:8]}`" if entry.get("revision") else ""
    return {
        "name": _inline(entry["name"]),
        "source": source,
        "rows": "a stream" if entry.get("rows") is None else f"{entry['rows']:,}",
        "dropped": ", ".join(f"{number} {reason}" for reason, number in drops.items()) or "none",
        "digest": f"`{entry['sha256'][:16]}…`" if entry.get("sha256") else "–",
    }


def _sample(entry: Mapping[str, Any]) -> str:
    parts = [("Prompt", entry["prompt"]), ("Before", entry.get("before")), ("After", entry["after"])]
    return "\n\n".join(f"{title}:\n\n{_fenced(text)}" for title, text in parts if text is not None)


def _fenced(text: str) -> str:
    """Text as a code block that it cannot end; what is cut is counted."""
    cut = len(text) - _SAMPLE_CHARACTERS
    shown = text if cut <= 0 else f"{text[:_SAMPLE_CHARACTERS]}\n… ({cut:,} more characters)"
    shown = "".join(each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}" for each in shown)
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown}\n{fence}"


def _inline(text: str) -> str:
    """Text for one line of Markdown, or one cell of a table, without markup of its own."""
    flat = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return flat.replace("|", r"\|").replace("<", "&lt;")


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=False).strip() or "{}"


def _versions(record: RunRecord) -> list[tuple[str, str]]:
    # PEFT looks for this spelling of its own line, and adds another where it does not find it.
    names = {"peft": "PEFT", "torch": "PyTorch", "transformers": "Transformers", "python": "Python"}
    return [
        ("alignkit", record.alignkit),
        *((names.get(name, name), version) for name, version in record.versions.items()),
    ]
