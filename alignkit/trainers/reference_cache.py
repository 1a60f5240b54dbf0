"""The reference's log-probabilities, computed once and kept on disk under the content of all that they depend on.

The key is a hash of the reference's weights (base, and the reference adapter where there is one), of their dtype and
quantization, of the token ids as truncated, and of what else enters a sequence's log-probability. Learning rate, seed,
rank, batch size and layout are not in it, so a sweep over those pays once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from alignkit.checkpoint.atomic import file_in_place
from alignkit.checkpoint.lock import shared_cache
from alignkit.data.collate import ID_COLUMNS
from alignkit.errors import ConfigError, TrainingError, printable
from alignkit.models.bundle import REFERENCE, ModelBundle
from alignkit.trainers.resuming import agreed

if TYPE_CHECKING:
    from alignkit.trainers.dpo import DPOTrainer

logger = logging.getLogger(__name__)

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
FORMAT = b"alignkit reference log-probabilities 1"


def with_reference_logps(trainer: DPOTrainer, dataset: Dataset | IterableDataset, name: str) -> Dataset:
    """Return `dataset` with the columns `ref_chosen_logps` and `ref_rejected_logps`, from the cache if they are there.

    Raises:
        ConfigError: a stream, which cannot be computed ahead.
        TrainingError: a log-probability that is not finite.
    """
    if isinstance(dataset, IterableDataset):
        raise ConfigError(
            f"precompute_ref_log_probs needs a dataset of known length, and '{name}' is a stream. Set it to False, or "
            "load the dataset without streaming."
        )
    if set(COLUMNS) <= set(dataset.column_names):
        return dataset
    rows = [tuple(len(ids) for ids in row) for row in zip(*(dataset[column] for column in ID_COLUMNS), strict=True)]
    folder = trainer.args.reference_cache_path
    path = folder / f"{_key(trainer, dataset)}.safetensors"
    is_main = trainer.accelerator.is_main_process
    with shared_cache(path) if is_main else contextlib.nullcontext():
        if agreed(lambda: _read(path, len(rows)) is not None, is_main):
            logger.info("Reference log-probabilities of '%s' come from %s", name, path)
            logps = cast(Tensor, _read(path, len(rows)))
        else:
            logps = _compute(trainer, dataset, rows, name)
            if not bool(torch.isfinite(logps).all()):
                bad = int((~torch.isfinite(logps)).any(1).nonzero()[0])
                raise TrainingError(f"the reference gives row {bad} of '{name}' a log-probability that is not finite")
            if is_main:
                _write(path, logps)
    for column, values in zip(COLUMNS, logps.unbind(1), strict=True):
        dataset = dataset.add_column(column, values.tolist())
    return dataset


def model_digest(bundle: ModelBundle) -> str:
    """Hash the reference: names, dtypes, shapes and bytes of every weight that its log-probabilities depend on."""
    digest = hashlib.sha256()
    model: Any = bundle.model if bundle.reference is None else bundle.reference
    worn = bundle.adapters.get(REFERENCE) if bundle.reference is None else None
    if isinstance(model, PeftModel):
        others = _weights_of(model, {name for name in model.peft_config if name != worn and bundle.reference is None})
        if worn is not None:
            # Sets are sorted: their own order differs from process to process.
            digest.update(json.dumps(model.peft_config[worn].to_dict(), sort_keys=True, default=sorted).encode())
    else:
        others = set()
    config = model.config.to_dict()  # equal weights under another RoPE scaling or soft-cap are another model
    for name in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: _base_name(item[0])):
        if name in others:
            continue
        digest.update(f"{_base_name(name)} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _weights_of(model: PeftModel, adapters: set[str]) -> set[str]:
    """Names in the state dict that belong to `adapters`: those that follow a place where PEFT keeps adapters.

    The adapter's name alone does not tell: an adapter may be called like one of the model's own modules.
    """
    places = {"modules_to_save"}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            places |= {*module.adapter_layer_names, *module.other_param_names}
    parts = {name: name.split(".") for name in model.state_dict()}
    return {
        name
        for name, path in parts.items()
        if any(place in places and adapter in adapters for place, adapter in pairwise(path))
    }


def _base_name(name: str) -> str:
    """A weight's name without PEFT's wrappers, so that it does not matter which layers an adapter sits on."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def _key(trainer: DPOTrainer, dataset: Dataset) -> str:
    digest = hashlib.sha256(FORMAT)
    digest.update(model_digest(trainer.bundle).encode())
    digest.update(f"ld_alpha={trainer.args.ld_alpha} compute={trainer.bundle.compute_dtype}".encode())
    digest.update(f"autocast={trainer.args.mixed_precision} max_length={trainer.args.max_length}".encode())
    for column in ID_COLUMNS:
        for ids in dataset[column]:
            digest.update(len(ids).to_bytes(4, "little") + torch.tensor(ids, dtype=torch.int32).numpy().tobytes())
    key = [digest.hexdigest()]
    return broadcast_object_list(key, from_process=0)[0]  # processes hold equal models; one key rules all the same


def _compute(trainer: DPOTrainer, dataset: Dataset, rows: list[tuple[int, ...]], name: str) -> Tensor:
    """Score every pair, `(rows, 2)`: longest first, so that memory fails early and batches hold equals."""
    args, accelerator = trainer.args, trainer.accelerator
    if not trainer.bundle.can_reference and trainer.state.global_step:
        raise ConfigError(
            "the reference of a model that is trained whole exists only before training. Pass this dataset as "
            "eval_dataset when the trainer is made, or pass a ref_model."
        )
    order = sorted(range(len(rows)), key=lambda row: -sum(rows[row]))
    size = args.precompute_ref_batch_size or args.per_device_train_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    logps = torch.zeros(len(rows), 2, dtype=torch.float64)
    if args.place_model_on_device:
        cast(nn.Module, trainer.model).to(args.device)
    bar = tqdm(
        mine, desc=f"Reference log-probs, {name}", disable=args.disable_tqdm or not accelerator.is_local_main_process
    )
    model = cast(nn.Module, trainer.model)
    was_training = model.training
    model.eval()  # dropout, where it is left on, must not reach what is kept
    for batch in bar:
        inputs = trainer.data_collator([dataset[row] for row in batch])
        logps[batch] = trainer.reference_logps(trainer._prepare_inputs(inputs)).double().cpu()
    model.train(was_training)
    return cast(Tensor, accelerator.reduce(logps.to(accelerator.device), reduction="sum")).cpu().float()


def _read(path: Path, rows: int) -> Tensor | None:
    """The cached tensor, or `None` if there is none that is whole."""
    if not path.is_file():
        return None
    try:
        logps = load_file(path)["logps"]
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning("%s cannot be read (%s); computing it anew", path, printable(str(error)))
        return None
    return logps if logps.shape == (rows, 2) and bool(torch.isfinite(logps).all()) else None


def _write(path: Path, logps: Tensor) -> None:
    """Another run sees the whole file or none."""
    with file_in_place(path) as staged:
        save_file({"logps": logps.contiguous()}, staged)
