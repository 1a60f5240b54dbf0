"""One entry for exports: a merged model, a GGUF file, an Ollama Modelfile, each checked before anything is kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Trainer

from alignkit.errors import ConfigError, nearest
from alignkit.hub.gguf import OUT_TYPES, GgufFile, convert_to_gguf, fetch_converter
from alignkit.hub.merge import MERGE_FILE, Merged, merge_adapter, summary
from alignkit.hub.merge_inputs import new_folder
from alignkit.hub.ollama import write_modelfile
from alignkit.hub.record import plain, write_json
from alignkit.models.load import load_tokenizer

__all__ = ["EXPORT_FILE", "FORMATS", "Exported", "Merged", "export", "merge_adapter"]

FORMATS = {
    "merged": "the whole model in safetensors, in the folder `merged`",
    "gguf": "a GGUF file for llama.cpp, `model.gguf`",
    "ollama": "`model.gguf` and a `Modelfile` for Ollama",
}
EXPORT_FILE = "export.json"
GGUF_NAME = "model.gguf"


@dataclass(frozen=True, slots=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: the output directory.
        files: what lies in it, relative to it.
        merged: the merge and its check; its folder is gone where "merged" was not asked for.
        gguf: the GGUF file and its check, where one was asked for.
    """

    path: Path
    files: tuple[str, ...]
    merged: Merged
    gguf: GgufFile | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: where it lies, and what `export.json` says."""
        return plain(
            {
                "path": str(self.path),
                "files": self.files,
                "merged": summary(self.merged),
                "gguf": _gguf_summary(self.gguf),
            }
        )


def export(
    adapter: str | Path | Trainer,
    output_dir: str | Path,
    *,
    formats: Sequence[str] = ("merged",),
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    outtype: str = "f16",
    name: str | None = None,
    converter: str | Path | None = None,
    trust_remote_code: bool = False,
    **hub_kwargs: Any,
) -> Exported:
    """Export an adapter in one or several formats; `export.json` beside them holds the figures of every check.

    On any error nothing is left at `output_dir`.

    Args:
        adapter: an adapter's folder or Hub id, or a trainer.
        output_dir: a folder that does not exist yet, or is empty.
        formats: some of `FORMATS`.
        base: see `merge_adapter`.
        dtype: of the merged weights: see `merge_adapter`.
        outtype: precision of the GGUF file, one of `alignkit.hub.gguf.OUT_TYPES`.
        name: of the model, in the GGUF file; by default the output directory's.
        converter: a clone of llama.cpp, for models that the pinned converter does not know.
        trust_remote_code: allow model code from the base's repository to run.
        hub_kwargs: `revision`, `token`, `cache_dir`, ... of the adapter.

    Raises:
        ConfigError: an unknown format or precision, or `output_dir` is not empty.
        ModelError: see `merge_adapter` and `convert_to_gguf`.
    """
    _check_options(formats, outtype)
    target = Path(output_dir).expanduser()
    wants_gguf = "gguf" in formats or "ollama" in formats
    if wants_gguf:
        fetch_converter(converter)  # before the long part
    with new_folder(target) as folder:
        merged = merge_adapter(
            adapter, folder / "merged", base=base, dtype=dtype, trust_remote_code=trust_remote_code, **hub_kwargs
        )
        gguf = None
        if wants_gguf:
            gguf = convert_to_gguf(
                merged.path, folder / GGUF_NAME, outtype=outtype, name=name or target.name, converter=converter
            )
        files = _finish(folder, formats, merged, gguf)
    return Exported(
        path=target,
        files=files,
        merged=replace(merged, path=target / "merged"),
        gguf=None if gguf is None else replace(gguf, path=target / GGUF_NAME),
    )


def _finish(folder: Path, formats: Sequence[str], merged: Merged, gguf: GgufFile | None) -> tuple[str, ...]:
    """Write the Modelfile and `export.json`, remove what was not asked for, and return what lies in `folder`."""
    if "ollama" in formats:
        tokenizer, generation = load_tokenizer(merged.path), _generation(merged.path)
        write_modelfile(folder, GGUF_NAME, tokenizer, generation=generation, license_name=merged.base["license"])
    if "merged" in formats:
        (merged.path / MERGE_FILE).unlink()  # export.json says it
    else:
        shutil.rmtree(merged.path)
    figures = {"formats": sorted(set(formats)), "merged": summary(merged), "gguf": _gguf_summary(gguf)}
    write_json(folder / EXPORT_FILE, figures)
    return tuple(sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()))


def _check_options(formats: Sequence[str], outtype: str) -> None:
    if isinstance(formats, str) or not formats:
        raise ConfigError(f"formats is a list with one or more of {', '.join(FORMATS)}.")
    for each in formats:
        if each not in FORMATS:
            raise ConfigError(f"Unknown format {each!r}: there are {', '.join(FORMATS)}.{nearest(each, FORMATS)}")
    if outtype not in OUT_TYPES:
        raise ConfigError(f"outtype {outtype!r} is not one of {', '.join(OUT_TYPES)}.{nearest(outtype, OUT_TYPES)}")


def _generation(folder: Path) -> GenerationConfig | None:
    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None


def _gguf_summary(gguf: GgufFile | None) -> dict[str, Any] | None:
    if gguf is None:
        return None
    return {
        "outtype": gguf.outtype,
        "bytes": gguf.bytes,
        "converter": gguf.converter,
        "kl_unit": "nats per token, KL(merged model || GGUF as read back)",
        "checks": gguf.checks,
        "notes": list(gguf.notes),
    }
