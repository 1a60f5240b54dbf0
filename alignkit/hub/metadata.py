"""The metadata of a model card (the YAML block that the Hub reads), made from a run record and checked offline.

The fields are those of https://huggingface.co/docs/hub/model-cards; `ModelCard.validate` would ask the Hub itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from alignkit.errors import DataError, nearest
from alignkit.hub.record import RunRecord
from alignkit.hub.wording import base_name, metric_title, value_of

PIPELINE_TAGS = ("text-generation", "text-classification")
LIBRARIES = ("peft", "transformers")
# Identifiers that the Hub knows: https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
    ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 grok2-community gemma unknown other
    """.split()  # noqa: SIM905
)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code")
_BASELINES = ("shorter",)  # figures that are no result of the model
_PIPELINE_OF = {"reward": "text-classification"}


def card_metadata(record: RunRecord, *, model_name: str, license: str | None = None) -> ModelCardData:
    """Return the metadata of a run's card.

    Args:
        record: of the run.
        model_name: what the model index calls it.
        license: an identifier of the Hub; by default the base's, and none where that is not known.

    Raises:
        DataError: a `license` that the Hub does not know, with the nearest that it knows.
    """
    hub_id, adapted = record.base.get("hub_id"), record.adapter is not None
    relation = "adapter" if adapted else "finetune"
    tags = ["alignkit", record.method, *([str(record.adapter["kind"]).lower()] if record.adapter else [])]
    tags += [f"base_model:{relation}:{hub_id}"] if hub_id else []
    tags += ["reward-model"] if record.method == "reward" else []
    results = _results(record)
    of_base = record.base.get("license")
    languages = [each for each in record.base.get("language") or [] if _LANGUAGE.fullmatch(str(each))]
    data = ModelCardData(
        base_model=hub_id,
        datasets=sorted({each["hub_id"] for each in record.data if each.get("hub_id")}) or None,
        eval_results=results or None,
        model_name=model_name if results else None,
        language=languages or None,
        library_name="peft" if adapted else "transformers",
        license=license or _known_license(of_base),
        license_name=str(of_base) if license is None and _known_license(of_base) == "other" else None,
        pipeline_tag=_PIPELINE_OF.get(record.method, "text-generation"),
        tags=tags,
    )
    check_metadata(data.to_dict())
    return data


def _known_license(of_base: Any) -> str | None:
    """A base's license as the Hub takes it: one that it does not list is "other"."""
    return of_base if of_base is None or of_base in LICENSES else "other"


def _results(record: RunRecord) -> list[EvalResult]:
    task = _PIPELINE_OF.get(record.method, "text-generation")
    held_out = next((each for each in record.data if each["name"].startswith("eval")), {})
    found = []
    for evaluation in record.evaluations:
        details = evaluation.get("details") or {}
        if details.get("other_run"):  # a comparison, and no result of this model
            continue
        given = details.get("data")
        measured_on: Mapping[str, Any] = given if isinstance(given, Mapping) else held_out
        for name, metric in evaluation["metrics"].items():
            value = value_of(metric)
            if value is None or name in _BASELINES:
                continue
            found.append(
                EvalResult(
                    task_type=task,
                    dataset_type=measured_on.get("hub_id") or "local",
                    dataset_name=f"{evaluation['name']}, {measured_on.get('source') or 'rows of its own'}",
                    dataset_config=evaluation["name"],  # results of one data set are told apart by it
                    metric_type=name,
                    metric_name=metric_title(name),
                    metric_value=round(value, 6),
                )
            )
    return found


def check_metadata(data: Mapping[str, Any]) -> None:
    """See that the Hub would take this metadata, without asking it.

    Raises:
        DataError: naming the field, what is wrong and what is allowed.
    """
    _one_of("library_name", data.get("library_name"), LIBRARIES)
    _one_of("pipeline_tag", data.get("pipeline_tag"), PIPELINE_TAGS)
    if data.get("license") is not None:
        _one_of("license", data["license"], LICENSES)
    languages = data.get("language") or []
    for language in [languages] if isinstance(languages, str) else languages:
        if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
            raise DataError(f"language: {language!r} is no ISO 639 code such as 'en'.")
    for name in ("base_model", "datasets"):
        values = data.get(name) or []
        for repo_id in [values] if isinstance(values, str) else values:
            _check_repo_id(name, repo_id)
    tags = data.get("tags") or []
    if any(not isinstance(tag, str) or not tag.strip() or "\n" in tag for tag in tags):
        raise DataError(f"tags: {tags!r} must be words.")
    for entry in data.get("model-index") or []:
        _check_model_index(entry)
    if yaml.safe_load(yaml.safe_dump(dict(data), allow_unicode=True)) != dict(data):
        raise DataError("the metadata does not survive YAML: it holds values that are neither text nor numbers.")


def _one_of(field: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        hint = nearest(str(value), allowed)
        few = f" Allowed: {', '.join(allowed)}." if len(allowed) < 10 else ""
        raise DataError(f"{field}: {value!r} is not one that the Hub knows.{hint}{few}")


def _check_repo_id(field: str, repo_id: Any) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise DataError(f"{field}: {repo_id!r} is no id of the Hub (owner/name): {error}") from error


def _check_model_index(entry: Any) -> None:
    results = entry.get("results") if isinstance(entry, Mapping) else None
    if not results or not entry.get("name"):
        raise DataError("model-index: each entry needs a name and results.")
    for result in results:
        missing = [
            f"{part}.{key}"
            for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name"))
            if not result.get(part, {}).get(key)
        ]
        missing += ["metrics.type" for metric in result.get("metrics") or [{}] if not metric.get("type")]
        missing += ["metrics.value" for metric in result.get("metrics") or [{}] if metric.get("value") is None]
        if missing:
            raise DataError(f"model-index: a result lacks {', '.join(missing)}.")


def merged_metadata(theirs: Mapping[str, Any], ours: Mapping[str, Any], *, license: str | None = None) -> ModelCardData:
    """Join the metadata of a card that somebody wrote with a run's: theirs stays, save what only the run knows.

    Library, base and measured results are the run's; tags and datasets are joined; a `license` that was asked for is
    taken; everything else of theirs wins.

    Raises:
        DataError: what comes out would not be taken by the Hub.
    """
    joined = {**ours, **{key: value for key, value in theirs.items() if value not in (None, [], "")}}
    for name in ("library_name", "base_model", "model-index", "pipeline_tag"):
        joined.pop(name, None)
        if name in ours:
            joined[name] = ours[name]
    for name in ("tags", "datasets"):
        values = [*_listed(ours.get(name)), *_listed(theirs.get(name))]
        kept = [each for each in values if not str(each).startswith("base_model:") or each in _listed(ours.get(name))]
        if kept:
            joined[name] = list(dict.fromkeys(kept))
    if license is not None:
        joined["license"] = license
        joined.pop("license_name", None)
    check_metadata(joined)
    return ModelCardData(**joined)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def default_name(record: RunRecord) -> str:
    """What a run's model is called where no repository says: base and method."""
    return f"{base_name(record.base).split('/')[-1]}-{record.method}"
