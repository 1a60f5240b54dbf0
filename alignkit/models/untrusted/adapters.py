"""Adapters from strangers: that config and weights belong together, and both to the base that they are put on."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import cached_file

from alignkit.data.plain_files import read_json_object
from alignkit.errors import ModelError
from alignkit.models.untrusted.configs import CONVERT, check_names
from alignkit.models.untrusted.tensors import TensorInfo, read_header

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 2**14
_MAX_ADAPTER_BYTES = 4 * 2**20
_PREFIX = "base_model.model."
_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<side>A|B)(\.\w+)?\.weight$")
_PATTERN_SECONDS = 3.0


class AdapterFiles(NamedTuple):
    """An adapter that was looked over: the folder that holds it, its config, and what tensors its weights are."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]


def find_adapter(name: str | Path, **hub_kwargs: Any) -> AdapterFiles:
    """Look over an adapter in a folder or on the Hub, whose files are fetched; PEFT is then given the folder.

    Args:
        name: a folder or a Hub id.
        hub_kwargs: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`.

    Raises:
        ModelError: as `check_adapter`, or the files cannot be fetched.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return check_adapter(folder / (hub_kwargs.get("subfolder") or ""))
    try:
        found = [
            cached_file(str(name), each, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
            for each in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
        ]
    except (OSError, ValueError) as error:
        raise ModelError(f"The adapter '{name}' cannot be fetched: {error}") from error
    config, weights = found
    if config is None or weights is None:
        missing = ADAPTER_CONFIG if config is None else ADAPTER_WEIGHTS
        raise ModelError(f"'{name}' holds no {missing}, and adapters are read from safetensors alone. {CONVERT}")
    return check_adapter(Path(config).parent)


def read_adapter_config(path: Path, *, folder: Path | None = None) -> dict[str, Any]:
    """Read `adapter_config.json` and see that what it asks for can be.

    Raises:
        ModelError: not readable, a rank that no adapter has, a number that is none, or a name that leads elsewhere.
    """
    config = read_json_object(path, folder=folder, max_bytes=_MAX_ADAPTER_BYTES, finite=True, error=ModelError)
    check_names(config, str(path))
    ranks = {"r": config.get("r", 8)}
    for table in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(table) or {}, dict):
            raise ModelError(f"'{path}' has a {table} that is no table. Fetch the adapter again.")
    ranks |= {f"rank_pattern[{key!r}]": value for key, value in (config.get("rank_pattern") or {}).items()}
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
            raise ModelError(
                f"'{path}' has {name}={rank!r}; a rank is a whole number from 1 to {MAX_RANK:,}. Fetch the adapter "
                "again, or do not use it."
            )
    alpha = config.get("lora_alpha", 8)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(f"'{path}' has lora_alpha={alpha!r}, which is no number. Fetch the adapter again.")
    return config


def check_adapter(folder: Path) -> AdapterFiles:
    """Look over an adapter's folder: its config, its weights, and that the two belong together.

    `adapter_model.bin` beside the safetensors is let lie, as many old repositories have both; nothing opens it. Where
    it is the only file of weights, the adapter is refused.

    Raises:
        ModelError: with the file's name and what to do.
    """
    config = read_adapter_config(folder / ADAPTER_CONFIG, folder=folder)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file() and not weights.is_symlink():
        if (folder / "adapter_model.bin").exists():
            raise ModelError(f"'{folder}' holds its weights as 'adapter_model.bin', not as safetensors. {CONVERT}")
        raise ModelError(f"'{folder}' holds {ADAPTER_CONFIG} without {ADAPTER_WEIGHTS}. Fetch the adapter again.")
    return AdapterFiles(folder, config, check_adapter_weights(weights, config, folder=folder))


def check_adapter_weights(
    path: Path, config: Mapping[str, Any], *, folder: Path | None = None
) -> dict[str, TensorInfo]:
    """Compare an adapter's weights with its config, and see that every number is finite.

    Args:
        path: `adapter_model.safetensors`.
        config: what `read_adapter_config` returned.
        folder: where a link may lead; by default the file's own.

    Raises:
        ModelError: malformed, ranks that are not the config's, or NaN and infinities.
    """
    tensors = read_header(path, folder=folder)
    if config.get("peft_type") == "LORA" and not config.get("target_parameters"):
        _check_ranks(path, tensors, config)
    try:
        with safe_open(path, framework="pt") as file:
            bad = [name for name in tensors if not _is_finite(file.get_tensor(name))]
    except (SafetensorError, OSError) as error:
        raise ModelError(f"'{path}' cannot be read ({error}). Fetch it again.") from error
    if bad:
        raise ModelError(
            f"'{path}' holds numbers that are not finite, in {bad[0]!r} and {len(bad) - 1} more: every output would be "
            "NaN. Use an earlier checkpoint of it, or another adapter."
        )
    return tensors


def _check_ranks(path: Path, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
    ranks = {config.get("r", 8), *(config.get("rank_pattern") or {}).values()}
    for name, tensor in tensors.items():
        found = _LORA.match(name)
        if found is None:
            continue
        side = found["side"]
        if len(tensor.shape) < 2 or tensor.shape[0 if side == "A" else 1] not in ranks:
            wanted = " or ".join(map(str, sorted(ranks)))
            raise ModelError(
                f"'{path}' does not belong to its {ADAPTER_CONFIG}: {name!r} has the shape {list(tensor.shape)}, and "
                f"the config's rank is {wanted}. Fetch both files again."
            )


def check_fits(files: AdapterFiles, base: nn.Module, path: str | Path) -> None:
    """See that an adapter is for `base`: that it has those layers, with those widths, and names them in bearable time.

    Raises:
        ModelError: a layer that `base` lacks, one of another width, or a pattern that takes too long to match.
    """
    _check_patterns(files.config, base, path)
    for name, tensor in files.tensors.items():
        found = _LORA.match(name.removeprefix(_PREFIX))
        if found is None or files.config.get("target_parameters"):
            continue
        try:
            module = base.get_submodule(found["module"])
        except AttributeError:
            raise ModelError(_another_base(path, f"it changes {found['module']!r}, which the base lacks")) from None
        if isinstance(module, BaseTunerLayer):  # another adapter sits there
            module = module.get_base_layer()
        if isinstance(module, nn.Linear):
            width = module.in_features if found["side"] == "A" else module.out_features
            given = tensor.shape[1 if found["side"] == "A" else 0]
            if width != given:
                raise ModelError(
                    _another_base(path, f"{found['module']!r} is {width} wide in the base, and {given} in the adapter")
                )


def _another_base(path: str | Path, what: str) -> str:
    return (
        f"The adapter '{path}' does not fit this base, so it was trained on another one: {what}. Give the base that "
        f"it was trained on, or correct base_model_name_or_path in its {ADAPTER_CONFIG}."
    )


def _check_patterns(config: Mapping[str, Any], base: nn.Module, path: str | Path) -> None:
    """Try the patterns by which an adapter names layers, since some never end.

    They are tried in another process, which can be stopped; Python's own matching cannot.
    """
    given: list[Any] = []
    for setting in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = config.get(setting) or []
        given += [value] if isinstance(value, str) else list(value)
    patterns = [each for each in map(str, given) if re.fullmatch(r"[\w.-]*", each) is None]
    if not patterns:  # plain names
        return
    names = [name for name, _ in base.named_modules() if name]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=_PATTERN_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"A pattern in {ADAPTER_CONFIG} of '{path}' (target_modules, rank_pattern or alike) takes longer than "
            f"{_PATTERN_SECONDS:g} s to match. Write the layers' names as a list, or do not use the adapter."
        ) from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(f"A pattern in {ADAPTER_CONFIG} of '{path}' cannot be matched: {reason}. Correct it.")


_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name), re.match(rf"(.*\\.)?({pattern})$", name), re.match(rf".*\\.{pattern}\\.", name)
"""


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())
