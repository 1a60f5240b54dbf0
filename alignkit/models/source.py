"""What lies behind a model's name: a whole model, an adapter, or a GGUF file, on disk or on the Hub."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftConfig
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import cached_file, find_adapter_config_file

from alignkit.errors import ModelError, nearest
from alignkit.models.demo import DEMO_NAME, demo_model_path, is_demo_folder
from alignkit.models.untrusted.adapters import ADAPTER_CONFIG, read_adapter_config
from alignkit.models.untrusted.configs import CONVERT, check_config
from alignkit.models.untrusted.folders import CONFIG, check_folder, check_model_weights

__all__ = [
    "ADAPTER_CONFIG",
    "HUB_KWARGS",
    "LOADING_ERRORS",
    "Source",
    "check_whole_model",
    "explain",
    "hub_kwargs_of",
    "locate",
    "locate_base",
]

HUB_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")
# What transformers raises over a checkpoint that is not what it says; running out of memory is another matter.
LOADING_ERRORS = (
    *(OSError, ValueError, ImportError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
    *(RuntimeError, SafetensorError, struct.error),
)
_WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin", "model*.index.json")


@dataclass(frozen=True, slots=True)
class Source:
    """One place to load from.

    `name` is a folder or a Hub id and `kwargs` are the Hub options that belong to it. `gguf_file` names the file inside
    it where the weights are GGUF. `adapter` is the adapter's config where it holds an adapter instead of a model.
    """

    name: str
    kwargs: dict[str, Any]
    gguf_file: str | None = None
    adapter: PeftConfig | None = None

    @property
    def base(self) -> str:
        """Where the adapter's base model is, as its config recorded it."""
        base = None if self.adapter is None else self.adapter.base_model_name_or_path
        if not base:
            raise ModelError(
                f"The adapter in '{self.name}' does not record its base model (base_model_name_or_path is empty in "
                f"{ADAPTER_CONFIG}). Load the base yourself, wrap it with PeftModel.from_pretrained(base, "
                f"'{self.name}', is_trainable=True) and pass that as the model."
            )
        # The demonstration model is converted on each machine, so a path recorded on another one means ours.
        return str(demo_model_path()) if is_demo_folder(base) else base

    @property
    def base_kwargs(self) -> dict[str, Any]:
        """The Hub options for the base: the adapter's revision and subfolder are its own, not the base's."""
        kwargs = {key: value for key, value in self.kwargs.items() if key not in ("revision", "subfolder")}
        if self.adapter is not None and self.adapter.revision is not None:
            kwargs["revision"] = self.adapter.revision
        return kwargs


def hub_kwargs_of(source: Source) -> dict[str, Any]:
    """The Hub options that belong to an adapter's files."""
    names = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
    return {key: source.kwargs[key] for key in names if key in source.kwargs}


def locate(model: str | Path, kwargs: Mapping[str, Any]) -> Source:
    """Find out what `model` is without loading it.

    Args:
        model: a name on the Hub, a folder, a `.gguf` file, or `"demo"` (the embedded demonstration model; write
            `./demo` for a folder of that name).
        kwargs: options for the Hub: those of `HUB_KWARGS`.

    Raises:
        ModelError: the path does not exist, or a folder holds a whole model together with an adapter.
    """
    if model == DEMO_NAME and isinstance(model, str):
        return Source(str(demo_model_path()), {})
    path = Path(model).expanduser()
    if path.is_file():
        return _from_file(path, dict(kwargs))
    if path.is_dir():
        return _from_folder(path, dict(kwargs))
    if _looks_local(model):
        raise ModelError(f"No such path: '{model}'.{_nearest_path(path)}")
    return _from_hub(str(model), dict(kwargs))


def locate_base(source: Source) -> Source:
    """Find out what the base of an adapter is.

    Raises:
        ModelError: none is recorded, nothing is there, or it is an adapter itself, which may lead back to this one.
    """
    base = locate(source.base, source.base_kwargs)
    if base.adapter is not None:
        raise ModelError(
            f"The base of the adapter '{source.name}' is itself an adapter ('{source.base}'). Merge that one into its "
            "base first (merge_and_unload, then save_pretrained)."
        )
    return base


def check_whole_model(source: Source, *, trust_remote_code: bool = False, variant: str | None = None) -> dict[str, Any]:
    """Look over a whole model before it is loaded, and return its config as a dictionary.

    Args:
        source: a folder or a repository.
        trust_remote_code: whether the user allows the repository's code to run.
        variant: of the weights, as for `from_pretrained`.

    Raises:
        ModelError: nothing there, a config or weights that are not to be loaded, or a model type that needs code.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(source.name, **source.kwargs)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"The model cannot be loaded: {explain(error, source.name)}") from error
    if not config:
        raise ModelError(f"'{source.name}' holds no model: it has neither config.json nor adapter_config.json.")
    model_type = config.get("model_type")
    if "auto_map" in config and model_type not in CONFIG_MAPPING and not trust_remote_code:
        raise ModelError(
            f"'{source.name}' (model type {model_type!r}) needs its own Python code to run. If you trust its authors, "
            "pass trust_remote_code=True."
        )
    if "auto_map" not in config and model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"'{source.name}' has the model type {model_type!r}, which the installed transformers does not know. A "
            "newer transformers may."
        )
    folder = Path(source.name).expanduser() / source.kwargs.get("subfolder", "")
    check_config(config, f"{folder / CONFIG}", trust_remote_code=trust_remote_code)
    if folder.is_dir():
        check_model_weights(folder)
    elif "transformers_weights" not in config:
        _fetch_safetensors(source, variant)
    return config


def _fetch_safetensors(source: Source, variant: str | None) -> None:
    """Fetch a repository's weights, or their index; transformers then finds them in the cache.

    Asked for safetensors where there are none, it would send for somebody else's conversion of the pickles.
    """
    part = f".{variant}" if variant else ""
    names = (f"model{part}.safetensors", f"model.safetensors.index{part}.json")
    try:
        found = any(
            cached_file(source.name, name, _raise_exceptions_for_missing_entries=False, **source.kwargs)
            for name in names
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"The model cannot be loaded: {explain(error, source.name)}") from error
    if not found:
        raise ModelError(f"'{source.name}' holds no {names[0]}. {CONVERT}")


def explain(error: BaseException, name: str) -> str:
    """Say in one sentence why transformers or the Hub refused `name`."""
    for cause in _chain(error):
        if isinstance(cause, GatedRepoError):
            return f"'{name}' is gated: accept its terms on the Hub and log in with `hf auth login`."
        if isinstance(cause, RevisionNotFoundError):
            return f"'{name}' has no such revision on the Hub."
        if isinstance(cause, RepositoryNotFoundError):
            return f"'{name}' is neither a folder here nor a repository on the Hub that you can read."
        if isinstance(cause, LocalEntryNotFoundError):
            return f"'{name}' is neither a folder here nor in the local cache, and the Hub was not reached."
        if isinstance(cause, HfHubHTTPError):
            return f"the Hub answered with an error for '{name}': {_first_line(cause)}"
    if "trust_remote_code" in str(error):
        return f"'{name}' needs its own Python code to run. If you trust its authors, pass trust_remote_code=True."
    return _first_line(error)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _from_file(path: Path, kwargs: dict[str, Any]) -> Source:
    if path.suffix.lower() == ".gguf":
        return Source(str(path.parent), kwargs, gguf_file=path.name)
    raise ModelError(f"'{path}' is a file. Give the folder that holds the model, or a .gguf file.")


def _from_folder(path: Path, kwargs: dict[str, Any]) -> Source:
    folder = path / kwargs.get("subfolder", "")
    if folder.is_dir():
        check_folder(folder)
    has_adapter = (folder / ADAPTER_CONFIG).is_file()
    has_weights = any(True for pattern in _WEIGHT_FILES for _ in folder.glob(pattern))
    if has_adapter and has_weights:
        raise ModelError(
            f"'{folder}' holds both a whole model and an adapter, so it is unclear what to train. Move "
            f"{ADAPTER_CONFIG} and its weights to a folder of their own, or load the two yourself and pass a PeftModel."
        )
    if has_adapter:
        read_adapter_config(folder / ADAPTER_CONFIG, folder=folder)
        return Source(str(path), kwargs, adapter=_adapter_config(str(path), kwargs))
    gguf = sorted(folder.glob("*.gguf"))
    if gguf and not has_weights:
        if len(gguf) > 1:
            names = ", ".join(file.name for file in gguf)
            raise ModelError(f"'{folder}' holds several GGUF files ({names}). Give the path of one of them.")
        return Source(str(folder), kwargs, gguf_file=gguf[0].name)
    if not (folder / "config.json").is_file():
        raise ModelError(f"'{folder}' holds no model: neither config.json nor {ADAPTER_CONFIG} nor a .gguf file.")
    return Source(str(path), kwargs)


def _from_hub(name: str, kwargs: dict[str, Any]) -> Source:
    # from_pretrained asks the same question, so this costs no extra request: the answer is cached, "no" included.
    try:
        found = find_adapter_config_file(name, **kwargs)
    except OSError as error:
        raise ModelError(f"The model cannot be loaded: {explain(error, name)}{_nearest_path(Path(name))}") from error
    if found is None:
        return Source(name, kwargs)
    read_adapter_config(Path(found))
    # From where it was fetched to, so that what was looked over is what is read.
    return Source(name, kwargs, adapter=_adapter_config(name, {}, folder=str(Path(found).parent)))


def _adapter_config(name: str, kwargs: Mapping[str, Any], *, folder: str | None = None) -> PeftConfig:
    options = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in kwargs}
    try:
        return PeftConfig.from_pretrained(folder or name, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{ADAPTER_CONFIG} of '{name}' cannot be read: {_first_line(error)}") from error


def _looks_local(model: str | Path) -> bool:
    if isinstance(model, Path):
        return True
    return model.startswith(("/", ".", "~")) or "\\" in model or model.count("/") > 1 or model.endswith(".gguf")


def _nearest_path(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, (entry.name for entry in path.parent.iterdir()))
