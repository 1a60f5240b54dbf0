"""After the upload: the files are fetched back at their commit and must be, and compute, what the local ones do."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import psutil
import torch
from huggingface_hub import HfApi, snapshot_download
from peft import PeftConfig, PeftModel, TaskType
from peft.utils import load_peft_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from alignkit.errors import PublishError
from alignkit.hub.staging import Staged, file_digest
from alignkit.hub.trouble import AGAIN, Patience
from alignkit.hub.upload import Uploaded
from alignkit.models.adapters import peft_warnings
from alignkit.models.reward_files import without_load_report
from alignkit.models.source import explain

_BY_HASH = "all {} files were fetched back at the commit and have the same SHA-256"
_TOKENS = 12
_SAFE = {"use_safetensors": True, "trust_remote_code": False}
_WEIGHTS = ("*.safetensors", "*.bin")
_HEAD_WEIGHT = "score.weight"
# Weights are read twice at most while a model is being loaded.
_MEMORY_PER_WEIGHT_BYTE = 2.0


class Verified(NamedTuple):
    """What was checked. `logits` is whether they were compared too; `text` says all of it in a sentence."""

    files: int
    logits: bool
    text: str


Verify = Callable[[HfApi, Staged, Uploaded, str, Patience], Verified]


def verify(api: HfApi, staged: Staged, uploaded: Uploaded, repo_id: str, patience: Patience) -> Verified:
    """Fetch the commit into a folder of its own and compare it with what was staged: bytes, then logits.

    Logits are compared where the base is on this machine and fits into memory: nothing is downloaded for it.

    Raises:
        PublishError: the Hub holds something else than what was sent, or the files could not be fetched.
    """
    with tempfile.TemporaryDirectory(prefix="alignkit-verify-") as cache:
        fetched = _fetch(api, staged, uploaded, repo_id, patience, cache)
        why_not = _compare_logits(staged, fetched)
    count = len(uploaded.sent)
    if why_not is not None:
        return Verified(count, False, f"{_BY_HASH.format(count)}; logits were not compared: {why_not}")
    loaded = f"the adapter on {staged.base.name}" if staged.base is not None else "the model"
    return Verified(count, True, f"{_BY_HASH.format(count)}; {loaded}, loaded from them, gives the same logits")


def verify_bytes(api: HfApi, staged: Staged, uploaded: Uploaded, repo_id: str, patience: Patience) -> Verified:
    """Fetch the commit and compare its bytes alone, as during a run, whose memory is not to be shared.

    Raises:
        PublishError: as `verify`.
    """
    with tempfile.TemporaryDirectory(prefix="alignkit-verify-") as cache:
        _fetch(api, staged, uploaded, repo_id, patience, cache)
    count = len(uploaded.sent)
    return Verified(count, False, f"{_BY_HASH.format(count)}; logits are not compared during training")


def _fetch(api: HfApi, staged: Staged, uploaded: Uploaded, repo_id: str, patience: Patience, cache: str) -> Path:
    def fetch() -> str:
        return api.snapshot_download(
            repo_id, revision=uploaded.commit, cache_dir=cache, allow_patterns=list(uploaded.sent)
        )

    doing = f"fetch back commit {uploaded.commit[:10]}, which was made but not checked,"
    fetched = Path(patience.ask(fetch, doing, repo_id))
    different = [name for name in uploaded.sent if _differs(fetched / name, staged.folder / name)]
    if different:
        raise PublishError(
            f"commit {uploaded.commit} of '{repo_id}' does not hold what was sent: {', '.join(different)}. {AGAIN}"
        )
    return fetched


def _differs(fetched: Path, sent: Path) -> bool:
    return not fetched.is_file() or file_digest(fetched) != file_digest(sent)


def _compare_logits(staged: Staged, fetched: Path) -> str | None:
    """Compare logits; return why that was not possible, or `None` after a comparison that held.

    Raises:
        PublishError: they differ, or what was fetched cannot be loaded while the local one can.
    """
    compare = _compare_adapters if staged.is_adapter else _compare_models
    with without_load_report(), peft_warnings():
        return compare(staged, fetched)


def _compare_adapters(staged: Staged, fetched: Path) -> str | None:
    assert staged.base is not None
    config = PeftConfig.from_pretrained(str(staged.folder))
    settings: dict[str, Any] = {}
    kind: Any = AutoModelForCausalLM
    if config.task_type == TaskType.SEQ_CLS:
        kind, settings["num_labels"] = AutoModelForSequenceClassification, _outputs(staged.folder)
    here = _folder_of(staged.base.here or staged.base.name)
    if here is None:
        return f"the base {staged.base.name} is not on this machine"
    base = _load(lambda: kind.from_pretrained(here, dtype="auto", **_SAFE, **settings), here)
    if isinstance(base, str):
        return f"the base {staged.base.name} {base}"
    try:
        model = PeftModel.from_pretrained(base, str(staged.folder), adapter_name="local").eval()
        local = _logits(model)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        return f"the local adapter cannot be loaded by plain PEFT: {_first_line(error)}"
    try:
        model.load_adapter(str(fetched), adapter_name="hub")
        model.set_adapter("hub")
        return _same(local, _logits(model))
    except (ValueError, RuntimeError, OSError) as error:
        raise PublishError(f"the adapter that the Hub holds cannot be loaded: {_first_line(error)}") from error


def _compare_models(staged: Staged, fetched: Path) -> str | None:
    architectures = AutoConfig.from_pretrained(str(staged.folder), trust_remote_code=False).architectures or [""]
    is_classifier = architectures[0].endswith("ForSequenceClassification")
    kind: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    # One after the other, so that two never lie in memory.
    found = []
    for folder in (staged.folder, fetched):
        model = _load(lambda folder=folder: kind.from_pretrained(folder, dtype="auto", **_SAFE), folder)
        if isinstance(model, str):
            if found:
                raise PublishError(f"the model that the Hub holds cannot be loaded: it {model}")
            return f"the model {model}"
        found.append(_logits(model))
        del model
    return _same(*found)


def _folder_of(name: str) -> Path | None:
    """Find a model on this machine: its folder, or its snapshot in the Hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, not whole, or no name of the Hub
        return None


def _load(load: Callable[[], PreTrainedModel], folder: Path) -> PreTrainedModel | str:
    """Load a model, or say why it cannot be: the rest of a sentence about it."""
    weights = sum(path.stat().st_size for kind in _WEIGHTS for path in folder.glob(kind))
    if weights * _MEMORY_PER_WEIGHT_BYTE > psutil.virtual_memory().available:
        return f"needs more memory than is free ({weights / 2**30:.1f} GiB of weights)"
    try:
        return load().eval()
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        return f"cannot be loaded here ({explain(error, folder.name)})"


def _outputs(folder: Path) -> int:
    weights = load_peft_weights(str(folder), device="cpu")
    return next((tensor.shape[0] for name, tensor in weights.items() if name.endswith(_HEAD_WEIGHT)), 1)


@torch.no_grad()
def _logits(model: torch.nn.Module) -> Tensor:
    """Logits of a few fixed tokens, spread over the vocabulary: `(1, T, V)`, or `(1, K)` of a classifier."""
    config = cast(Any, model).config.get_text_config()
    ids = torch.tensor([[(7919 * place + 11) % config.vocab_size for place in range(_TOKENS)]])
    return cast(Any, model)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def _same(local: Tensor, hub: Tensor) -> None:
    if local.shape != hub.shape or not torch.allclose(local.float(), hub.float(), rtol=1e-5, atol=1e-5):
        raise PublishError(
            "what the Hub holds gives other logits than the local files, although every byte is the same. Please "
            "report this as a bug."
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
