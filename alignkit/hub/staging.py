"""The export that goes up: a folder of its own with what a reader of the repository needs, complete and checked.

What may go up is listed here; everything else stays: training arguments and optimizer states (pickles, which have held
tokens), checkpoints, rollouts, critics and references.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from alignkit.data.plain_files import check_regular, read_json_object
from alignkit.errors import ConfigError, DataError, ModelError
from alignkit.hub.bases import BaseName, name_base
from alignkit.hub.card import write_card
from alignkit.hub.plain_card import is_written, write_plain_card
from alignkit.hub.record import RECORD_FILE, RunRecord

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL_WEIGHTS, MODEL_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
CARD = "README.md"

_MAX_JSON_BYTES = 512 * 2**20  # the largest tokenizers have 40 MB

_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_MODEL_FILES = (MODEL_CONFIG, "generation_config.json")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "bpe.codes",
    "emoji.json",
    "normalizer.json",
    "tekken.json",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
_STORY_FILES = (CARD, RECORD_FILE, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
_REPORT_FILES = ("report.html", "*.png")
# Fields in which transformers and PEFT note where something was loaded from.
_ORIGINS = ("name_or_path", "_name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")


@dataclass(frozen=True, slots=True)
class Staged:
    """What is about to go up.

    Attributes:
        folder: holds exactly the files that go up.
        files: their names, sorted.
        is_adapter: an adapter, or a whole model.
        base: what the adapter belongs to; `None` for a whole model.
        keeps_card: the card is one that a person wrote, and goes up as it is.
    """

    folder: Path
    files: tuple[str, ...]
    is_adapter: bool
    base: BaseName | None
    keeps_card: bool

    def digest(self, name: str) -> str:
        """SHA-256 of a file, in hexadecimal."""
        return file_digest(self.folder / name)

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def stage(sources: Sequence[Path], folder: Path, *, repo_id: str, base_model: str | None = None) -> Staged:
    """Copy what may go up into `folder`, name the base for what it is, write the card, and check that all is there.

    Args:
        sources: folders to take files from; a file of an earlier one hides that of a later one. The first one holds the
            weights, the first one with a tokenizer gives all of it, and of a later one report and pictures go up only
            if it holds the record of the same run.
        folder: empty, and outside the sources.
        repo_id: where it will go, for the card.
        base_model: the base's name on the Hub, where the user knows better than the files.

    Raises:
        ModelError: there is no adapter or model, or one that is broken or pickled.
        ConfigError: `base_model` is given for a whole model.
    """
    weights = sources[0]
    is_adapter = _is_adapter(weights)
    _copy_found([weights], _ADAPTER_FILES if is_adapter else (*_MODEL_FILES, *_model_weights(weights)), folder)
    with_tokenizer = (source for source in sources if any(_found([source], _TOKENIZER_FILES)))
    _copy_found([source for source in (next(with_tokenizer, None),) if source is not None], _TOKENIZER_FILES, folder)
    _copy_found(sources, _STORY_FILES, folder)
    _prefer_written_card(sources, folder)
    record = RunRecord.load(folder) if (folder / RECORD_FILE).is_file() else None
    _copy_found([weights, *(each for each in sources[1:] if _is_of_run(each, record))], _REPORT_FILES, folder)
    base = None
    if is_adapter:
        base = _name_base_in_config(folder / ADAPTER_CONFIG, record, base_model)
    elif base_model is not None:
        raise ConfigError(f"base_model={base_model!r} names the base of an adapter, and '{weights}' is a whole model")
    _forget_origins(folder)
    keeps_card = (folder / CARD).is_file() and is_written(folder / CARD)
    if not keeps_card:
        (folder / CARD).unlink(missing_ok=True)
    if record is not None:
        if base is not None and base.is_on_hub and record.base.get("hub_id") is None:
            record.base |= {"hub_id": base.name, "revision": base.revision, "note": "trained on a local copy"}
            record.save(folder)
        write_card(folder, record, repo_id=repo_id)
    elif not keeps_card:
        write_plain_card(folder / CARD, repo_id=repo_id, base=base)
    files = tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
    _check_weights(folder, is_adapter=is_adapter)
    return Staged(folder, files, is_adapter, base, keeps_card)


def _is_adapter(folder: Path) -> bool:
    if not folder.is_dir():
        raise ModelError(f"'{folder}' is no folder. Give a trainer, or the folder that it saved to.")
    if (folder / ADAPTER_CONFIG).is_file():
        if (folder / ADAPTER_WEIGHTS).is_file():
            return True
        raise ModelError(
            f"'{folder}' holds {ADAPTER_CONFIG} without {ADAPTER_WEIGHTS}. Only safetensors are published: save the "
            "adapter again with model.save_pretrained(folder)."
        )
    if any((folder / name).is_file() for name in (MODEL_WEIGHTS, MODEL_INDEX)) and (folder / MODEL_CONFIG).is_file():
        return False
    if any(folder.glob("*.bin")):
        raise ModelError(
            f"'{folder}' holds weights as .bin only, which are pickles and are not published: save the model again "
            "with model.save_pretrained(folder)."
        )
    checkpoints = sorted(folder.glob("checkpoint-*"))
    hint = f" It holds checkpoints: give one of them, such as '{checkpoints[-1]}'." if checkpoints else ""
    raise ModelError(f"'{folder}' holds neither an adapter nor a model to publish. Train, then save_model().{hint}")


def _found(sources: Sequence[Path], patterns: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for source in sources:
        for pattern in patterns:
            for path in sorted(source.glob(pattern)):
                if path.is_file():
                    check_regular(path, folder=source, error=ModelError)  # a link to a key would be published with it
                    yield path.relative_to(source).as_posix(), path


def _copy_found(sources: Sequence[Path], patterns: Sequence[str], folder: Path) -> None:
    for name, path in _found(sources, patterns):
        if not (folder / name).exists():
            _copy(path, folder / name)


def _model_weights(folder: Path) -> tuple[str, ...]:
    """Name the files of a whole model's weights as transformers would load it: shards of an earlier save stay here."""
    if (folder / MODEL_WEIGHTS).is_file():
        return (MODEL_WEIGHTS,)
    shards = {str(name) for name in read_json(folder / MODEL_INDEX).get("weight_map", {}).values()}
    strange = sorted(name for name in shards if Path(name).name != name or Path(name).suffix != ".safetensors")
    if strange:
        raise ModelError(f"{MODEL_INDEX} names {strange[0]!r}, which is no safetensors file beside it.")
    return (MODEL_INDEX, *(glob.escape(name) for name in sorted(shards)))


def _is_of_run(folder: Path, record: RunRecord | None) -> bool:
    """Whether what lies in `folder` was made of the run of `record`, and not of an earlier one with the same folder."""
    if record is None or not (folder / RECORD_FILE).is_file():
        return False
    try:
        found = RunRecord.load(folder)
    except DataError:  # of another version, so of another run
        return False
    return (found.method, found.created) == (record.method, record.created)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    if source.stat().st_size != target.stat().st_size:
        raise ModelError(f"'{source}' changed while it was copied. Wait until nothing writes to it, and publish again.")


def _prefer_written_card(sources: Sequence[Path], folder: Path) -> None:
    """Take the first card that a person wrote, not the first that a library left."""
    cards = [source / CARD for source in sources if (source / CARD).is_file()]
    written = [card for card in cards if is_written(card)]
    if written:
        shutil.copyfile(written[0], folder / CARD)


def _name_base_in_config(path: Path, record: RunRecord | None, given: str | None) -> BaseName:
    config = read_json(path)
    base = name_base(config.get("base_model_name_or_path") or "", record, given)
    config["base_model_name_or_path"] = base.name
    if base.revision is not None and config.get("revision") is None:
        config["revision"] = base.revision
    write_text_json(path, config)
    return base


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: it is none.
    """
    return read_json_object(path, max_bytes=_MAX_JSON_BYTES, error=ModelError)


def write_text_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as transformers and PEFT lay it out."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _forget_origins(folder: Path) -> None:
    """Drop the notes of where a tokenizer or model was loaded from, where they are paths of this machine."""
    for name in ("tokenizer_config.json", MODEL_CONFIG, "generation_config.json"):
        path = folder / name
        if path.is_file():
            content = read_json(path)
            paths = [key for key in _ORIGINS if isinstance(content.get(key), str) and _is_path(content[key])]
            if paths:
                write_text_json(path, {key: value for key, value in content.items() if key not in paths})


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~", ".", "\\")) or text[1:3] in (":\\", ":/") or Path(text).exists()


def _check_weights(folder: Path, *, is_adapter: bool) -> None:
    """See that the weights are whole and finite, and that the shards of an index are all there."""
    if not is_adapter and (folder / MODEL_INDEX).is_file():
        shards = set(read_json(folder / MODEL_INDEX).get("weight_map", {}).values())
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise ModelError(f"{MODEL_INDEX} names files that are missing: {', '.join(missing)}. Save the model again.")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as tensors:
                names = list(tensors.keys())
                bad = [name for name in names if not _is_finite(tensors.get_tensor(name))]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path.name} cannot be read ({error}). Save the model again.") from error
        if not names:
            raise ModelError(f"{path.name} holds no weights. Save the model again.")
        if bad:
            raise ModelError(
                f"{path.name} holds numbers that are not finite, in {bad[0]} and {len(bad) - 1} more: the run went "
                "wrong. Publish an earlier checkpoint."
            )


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())
