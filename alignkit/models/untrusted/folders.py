"""A whole folder from a stranger, looked over before any library opens something in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from alignkit.data.plain_files import MAX_DEPTH, check_regular, nesting_depth, read_bytes, read_json_object
from alignkit.errors import ModelError
from alignkit.models.untrusted.configs import CONVERT, check_config, check_names, check_weight_map
from alignkit.models.untrusted.tensors import read_header

CONFIG = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_OPENED = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken", ".gguf", ".spm")
_SETTINGS = (
    CONFIG,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)
_TOKENIZERS = ("tokenizer.json", "vocab.json", "tekken.json")
_MAX_SETTINGS_BYTES = 16 * 2**20
_MAX_TOKENIZER_BYTES = 512 * 2**20
_MAX_TEMPLATE_BYTES = 4 * 2**20


def check_folder(folder: Path) -> None:
    """Look over a folder that a model, an adapter or a tokenizer may be loaded from.

    Every file that a loader might open is a plain one inside the folder; every settings file is JSON of bearable size
    and depth, and names no file outside. Pickles are let lie: nothing opens them. Weights are another matter
    (`check_model_weights`, `adapters.check_adapter`), since not every use of a folder loads them.

    Raises:
        ModelError: with the file's name and what to do.
    """
    for path in _opened(folder):
        size = check_regular(path, folder=folder, error=ModelError)
        if path.suffix == ".jinja" and size > _MAX_TEMPLATE_BYTES:
            raise ModelError(f"'{path}' is a chat template of {size:,} bytes. Remove it, and give a template yourself.")
    for name in _SETTINGS:
        path = folder / name
        if path.is_file():
            settings = read_json_object(path, folder=folder, max_bytes=_MAX_SETTINGS_BYTES, error=ModelError)
            check_names(settings, str(path))
            if name == CONFIG:  # tokenizers are loaded by it too; code is another question, for who loads the model
                check_config(settings, str(path), trust_remote_code=True)


def check_model_weights(folder: Path) -> None:
    """Look over the weights of a whole model in a folder.

    Raises:
        ModelError: weights that are not safetensors, an index that leads elsewhere, shards that are missing, or files
            that are not what their headers say.
    """
    indices = sorted(folder.glob("model*.safetensors.index.json"))
    weights = {path.name for path in folder.glob("model*.safetensors")}
    if (folder / CONFIG).is_file():
        named = read_json_object(folder / CONFIG, folder=folder, error=ModelError).get("transformers_weights")
        weights |= {named} if isinstance(named, str) and (folder / named).is_file() else set()
    for index in indices:
        shards = check_weight_map(read_json_object(index, folder=folder, error=ModelError), str(index))
        missing = [name for name in shards if not (folder / name).exists()]
        if missing:
            raise ModelError(f"'{index}' names '{missing[0]}', which is missing. Fetch the folder again.")
        weights |= set(shards)
    for name in sorted(weights):
        if name.endswith(".safetensors"):
            read_header(folder / name, folder=folder)
    if not weights:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)
        if pickled:
            raise ModelError(f"'{folder}' holds its weights as '{pickled[0]}', not as safetensors. {CONVERT}")


def check_tokenizer(folder: Path) -> None:
    """Look over the large files of a tokenizer in a folder.

    Raises:
        ModelError: too large, or nested so deep that it would overwhelm its reader.
    """
    for name in _TOKENIZERS:
        path = folder / name
        if path.is_file():
            depth = nesting_depth(read_bytes(path, folder=folder, max_bytes=_MAX_TOKENIZER_BYTES, error=ModelError))
            if depth > MAX_DEPTH:
                raise ModelError(
                    f"'{path}' nests {depth:,} deep, and no tokenizer nests more than {MAX_DEPTH}: it is made to "
                    "overwhelm its reader. Do not use what came with it."
                )


def _opened(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _OPENED:
            yield path
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        yield from sorted(templates.glob("*.jinja"))
