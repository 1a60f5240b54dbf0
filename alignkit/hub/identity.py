"""What a run was made of, in words that can be published: its base, adapter, data, machine and options.

Nothing here holds a path of the machine or a secret: local models and files are named without their folders, and
options that hold either are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from datasets import Dataset
from huggingface_hub import metadata_load, try_to_load_from_cache
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from transformers import PreTrainedModel

from alignkit.data.front_matter import check_yaml, front_matter
from alignkit.data.plain_files import read_bytes
from alignkit.data.report import PreparationReport
from alignkit.errors import DataError
from alignkit.hub.bases import hub_place
from alignkit.hub.discretion import is_path, is_secret, last_part, without_secrets
from alignkit.models.demo import DEMO_HUB_ID, DEMO_LICENSE, demo_origin, is_demo_copy
from alignkit.models.heads import SCORE, VALUE
from alignkit.models.lora import is_quantized

_DATA_URL = re.compile(r"hf://datasets/(?P<id>[^@]+)@(?P<revision>[0-9a-f]+)/")
# Options that say where things lie or how they look on the screen, not what was computed.
_MAX_CARD_BYTES = 4 * 2**20
_UNTOLD = ("output_dir", "logging_dir", "run_name", "local_rank", "_n_gpu", "disable_tqdm", "reference_cache_dir")
_SAID_OF_ROWS = ("label", "margin")  # beside their tokens
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes", "trl")


def describe_base(model: PreTrainedModel | PeftModel, revision: str | None = None) -> dict[str, Any]:
    """Describe the model that a run starts from.

    Args:
        model: with or without adapters.
        revision: the branch, tag or commit that was asked for, of a model of the Hub; by default the main branch.

    Returns:
        `name` (for people), `hub_id` and `revision` (`None` where the base is no repository of the Hub), `note` (what
        it is if not simply that repository, else `None`), `license` (an SPDX or Hub identifier; `None`: not known),
        `language`, `architecture`, `model_type`, `parameters`, `dtype`, `quantization` ("nf4", "int8", another
        method, or `None`).
    """
    base = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
    origin = str(base.config._name_or_path or "")
    if is_demo_copy(origin):
        place = {
            "name": DEMO_HUB_ID.split("/")[-1],
            "hub_id": DEMO_HUB_ID,
            "revision": None,
            "note": f"dequantized from {demo_origin()}, so its weights are not exactly the repository's",
        }
        facts = {"license": DEMO_LICENSE, "language": ["en"]}
    else:
        place = _place(origin, base, revision)
        facts = _card_facts(origin, place)
    return {
        **place,
        **facts,
        "architecture": type(base).__name__,
        "model_type": base.config.model_type,
        "parameters": count_parameters(base),
        "dtype": _dtype(base),
        "quantization": quantization_of(base),
    }


def _place(origin: str, base: PreTrainedModel, revision: str | None) -> dict[str, Any]:
    if not origin:
        return _local(f"a {type(base).__name__} made in memory", None)
    place = hub_place(origin)
    if place is None:
        return _local(last_part(origin), "a local model, which is on no Hub under this name")
    hub_id, commit = place
    revision = commit or _cached_commit(hub_id, revision)
    return {"name": hub_id.split("/")[-1], "hub_id": hub_id, "revision": revision, "note": None}


def _cached_commit(hub_id: str, revision: str | None) -> str | None:
    """The commit of a repository's snapshot in the Hub's cache, which a model that was loaded by name lies in."""
    cached = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    place = hub_place(cached) if isinstance(cached, str) else None
    return None if place is None else place[1]


def _local(name: str, note: str | None) -> dict[str, Any]:
    return {"name": name, "hub_id": None, "revision": None, "note": note}


def _card_facts(origin: str, place: Mapping[str, Any]) -> dict[str, Any]:
    """License and language out of the base's own card, where it lies on this machine."""
    facts: dict[str, Any] = {"license": None, "language": []}
    card = Path(origin) / "README.md"
    if place["hub_id"] is not None and not card.is_file():
        cached = try_to_load_from_cache(place["hub_id"], "README.md", revision=place["revision"])
        card = Path(cached) if isinstance(cached, str) else card
    if not card.is_file():
        return facts
    try:
        check_yaml(front_matter(read_bytes(card, max_bytes=_MAX_CARD_BYTES).decode("utf-8", "replace")))
        data = metadata_load(card) or {}
    except (
        DataError,
        ValueError,
        OSError,
        yaml.YAMLError,
        RecursionError,
    ):  # somebody else's card, which need not be well formed
        return facts
    licenses = [text for text in _listed(data.get("license")) if isinstance(text, str)]
    # YAML 1.1 reads Norwegian's code as "no".
    languages = ["no" if each is False else each for each in _listed(data.get("language"))]
    facts["license"] = ", ".join(licenses) or None
    facts["language"] = [each for each in languages if isinstance(each, str)]
    return facts


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def count_parameters(model: torch.nn.Module) -> int:
    """Weights of the model without its adapters and scalar heads; packed 4-bit weights count as what they stand for."""
    total = 0
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name or name.startswith((f"{SCORE}.", f"{VALUE}.")):
            continue
        packed: Any = parameter
        shape = packed.quant_state.shape if type(parameter).__name__ == "Params4bit" else parameter.shape
        total += torch.Size(shape).numel()
    return total


def quantization_of(base: PreTrainedModel) -> str | None:
    """How the weights are packed: "nf4", "fp4", "int8", the name of another method, or `None`."""
    if not is_quantized(base):
        return None
    config = vars(base.config).get("quantization_config")
    if config is None:  # packed by hand, not by transformers
        return "an unknown method"
    settings = dict(config) if isinstance(config, Mapping) else config.to_dict()
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "4bit"))
    return "int8" if settings.get("load_in_8bit") else str(settings.get("quant_method", "unknown"))


def _dtype(base: PreTrainedModel) -> str:
    return str(base.dtype).removeprefix("torch.")


def describe_adapter(model: PreTrainedModel | PeftModel) -> dict[str, Any] | None:
    """Describe the active adapter before training; `None` for a whole model.

    Returns:
        `kind`, LoRA's settings, `continued` (whether it changes the base already, from an earlier training), and
        `trainable_parameters` of the whole model.
    """
    if not isinstance(model, PeftModel):
        return None
    own = model.active_adapters[0]
    config: PeftConfig = model.peft_config[own]
    found: dict[str, Any] = {"kind": str(PeftType(config.peft_type).value)}
    if isinstance(config, LoraConfig):
        targets = config.target_modules
        found |= {
            "r": config.r,
            "alpha": config.lora_alpha,
            "dropout": config.lora_dropout,
            "target_modules": sorted(targets) if isinstance(targets, set | list) else targets,
            "use_dora": bool(config.use_dora),
            "use_rslora": bool(config.use_rslora),
            "modules_to_save": list(config.modules_to_save or []),
        }
    outer = [each for name, each in model.named_parameters() if f".lora_B.{own}." in name]  # zeros in a new adapter
    found["continued"] = any(bool(each.detach().any()) for each in outer)
    found["trainable_parameters"] = sum(each.numel() for each in model.parameters() if each.requires_grad)
    return found


def describe_data(name: str, given: Any, prepared: Any, report: PreparationReport | None) -> dict[str, Any]:
    """Describe one dataset of a run.

    Args:
        name: "train", "eval", or the key of a dict of evaluation sets.
        given: what the trainer was handed.
        prepared: its rows as token ids, whose SHA-256 is the data's identity; a stream has none.
        report: what preparation kept and dropped.

    Returns:
        `name`, `source`, `hub_id` and `revision` (`None` for local rows), `split`, `rows` (kept), `sha256`, and
        `preparation`: counts and row ids, without any text of the rows.
    """
    info = given.info if isinstance(given, Dataset) else None
    files = (info.download_checksums if info is not None else None) or {}
    url = next((found for key in files if (found := _DATA_URL.match(key))), None)
    named = str(info.dataset_name) if info is not None and info.dataset_name not in (None, "generator") else None
    return {
        "name": name,
        "source": url["id"] if url else named,
        "hub_id": url["id"] if url else None,
        "revision": url["revision"] if url else None,
        "split": str(given.split) if isinstance(given, Dataset) and given.split is not None and url else None,
        "rows": len(prepared) if isinstance(prepared, Dataset) else None,
        "sha256": rows_digest(prepared) if isinstance(prepared, Dataset) else None,
        "preparation": None if report is None else _without_text(report.as_dict()),
    }


def rows_digest(prepared: Dataset) -> str:
    """SHA-256 over the rows' token ids, labels and margins, in order.

    It is equal for equal data under the same tokenizer and truncation.
    """
    digest = hashlib.sha256()
    columns = sorted(name for name in prepared.column_names if name.endswith("_ids"))
    said = [name for name in _SAID_OF_ROWS if name in prepared.column_names]
    for batch in prepared.select_columns([*columns, *said]).with_format("arrow").iter(batch_size=1000):
        table = cast(Any, batch)
        for column in said:
            numbers = table.column(column).to_numpy().astype("<f8")
            digest.update(f"{column} {len(numbers)}".encode() + numbers.tobytes())
        for column in columns:
            ids = table.column(column).combine_chunks()
            digest.update(f"{column} {len(ids)}".encode())
            for numbers in (ids.value_lengths(), ids.flatten()):
                digest.update(numbers.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()


def _without_text(value: Any) -> Any:
    """The report without the excerpts of rows that it shows in a terminal."""
    if isinstance(value, Mapping):
        return {key: _without_text(item) for key, item in value.items() if key != "example"}
    return value


def describe_settings(args: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the options of `args` (a dataclass) that can be published, and the names of those not at their defaults.

    Secrets, paths of the machine and display options are left out.
    """
    settings, changed = {}, []
    for each in fields(args):
        given = vars(args).get(each.name)
        value = _publishable(given)
        if each.name in _UNTOLD or is_secret(each.name, given) or value is None:
            continue
        settings[each.name] = value
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if value != _publishable(default):
            changed.append(each.name)
    return settings, changed


def _publishable(value: Any) -> Any:
    """The value as JSON would hold it; `None` for paths and for what is no plain value."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str):
        return None if is_path(value) else without_secrets(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        kept = {str(key): _publishable(item) for key, item in value.items() if not is_secret(str(key), item)}
        return {without_secrets(key): item for key, item in kept.items() if item is not None}
    if isinstance(value, Sequence):
        return [item for item in map(_publishable, value) if item is not None]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def describe_command() -> str | None:
    """The command line without the folders of its paths and without secrets; `None` in a notebook."""
    program = Path(sys.argv[0] if sys.argv else "")
    if program.suffix != ".py" or program.name == "ipykernel_launcher.py" or not program.is_file():
        return None
    return shlex.join(["python", program.name, *_told_arguments(sys.argv[1:])])


def _told_arguments(arguments: Sequence[str]) -> Iterator[str]:
    before = ""
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        name = option or before
        before = "" if equals or not option else option
        if is_secret(name, value) and (equals or not option):
            value = "…"
        yield option + equals + _told(value)


def _told(value: str) -> str:
    """One value of the command line; of a mapping, what can be published of it."""
    mapping: Any = None
    if value.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            mapping = json.loads(value)
    if isinstance(mapping, dict):
        return json.dumps(_publishable(mapping), ensure_ascii=False)
    return last_part(value) if is_path(value) else without_secrets(value)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide about numbers, as installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device, processes: int) -> dict[str, Any]:
    """The machine, without its name: system, processor, cores, device, memory in bytes, processes of the run."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "processes": processes,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device_name": properties.name, "device_memory_bytes": properties.total_memory}
    else:
        found["device_name"] = _processor()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
