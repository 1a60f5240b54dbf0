"""Which checkpoint a run goes on from, and whether it is a checkpoint of this run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from alignkit.checkpoint.find import checkpoint_folders, newest_verified
from alignkit.checkpoint.manifest import MANIFEST, Manifest, read_manifest, verify
from alignkit.data.collate import ID_COLUMNS
from alignkit.errors import AlignkitError, CheckpointError
from alignkit.models.adapters import REFERENCE_ADAPTER
from alignkit.models.bundle import REWARD
from alignkit.rollout.classifier import ClassifierReward

logger = logging.getLogger(__name__)

AUTO = "auto"
# Methods that are the same kind of trainer's.
_KINDS = {"kto": "dpo"}
# Files of a checkpoint that `weights_only_resume` does without.
NOT_WEIGHTS = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")  # .bin: FSDP's
# What a run is made of besides its options, and what to call it.
_PARTS = {
    "train_data": "the training data",
    "further_data": "a column of the training data beside its tokens, or the texts that are mixed in",
    "base": "the base model",
    "adapter": "the adapter",
    "rewards": "what rewards completions",
    "optimizer": "the optimizer or the schedule that the caller made",
    "batching": "accelerator_config",
}
# Columns that the record hashes, or that only name rows; and those that a run computes itself.
_TOLD_COLUMNS = (*ID_COLUMNS, "completion_ids", "label", "margin", "row_id")
_COMPUTED_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_REMEDY = "Set it back, or go on with the weights alone: weights_only_resume=True."

# Options that say what is told, kept and measured, or where: they move no weight.
_HARMLESS = (
    "logging_",
    "save_",
    "eval_",
    "dataloader_",
    "hub_",
    "push_to_hub",
    "report_to",
    "run_name",
    "log_",
    "ddp_",
)
_HARMLESS_NAMES = {
    "disable_tqdm",
    "do_train",
    "do_eval",
    "do_predict",
    "enable_jit_checkpoint",
    "greater_is_better",
    "include_for_metrics",
    "include_num_input_tokens_seen",
    "load_best_model_at_end",
    "metric_for_best_model",
    "prediction_loss_only",
    "project",
    "per_device_eval_batch_size",
    "precompute_ref_batch_size",
    "trackio_space_id",
    "weights_only_resume",
    "skip_memory_metrics",
    "restore_callback_states_from_checkpoint",
    "resume_from_checkpoint",
    "batch_eval_metrics",
    "max_skipped_steps",
    "torch_empty_cache_steps",
    "num_print_samples",
    "dataset_num_proc",
}
# The same mathematics in another order of additions.
_ROUNDING = {
    "max_tokens_per_forward",
    "layout",
    "pad_to_multiple_of",
    "activation_checkpointing",
    "gradient_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
    "activation_offloading",
    "tf32",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "use_cpu",
}
# Harmless by their beginning, but they say which rows make a step.
_OF_ROWS = {"dataloader_drop_last"}
# They move weights where the learning rate follows what evaluations find.
_OF_EVALUATION = {"eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better"}
_EVALUATED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
# They matter only where the schedule of the learning rate depends on them.
_LENGTH = frozenset({"max_steps", "num_train_epochs"})
_UNSCHEDULED = ("constant", "constant_with_warmup")


def find_checkpoint(asked: str | bool, output_dir: Path, *, weights_only: bool) -> Path | None:
    """Return the checkpoint to resume from; `None` where "auto" finds nothing, or nothing was asked for.

    Args:
        asked: True for the newest one of `output_dir` that verifies; "auto" for the same where there is one; a path.
        output_dir: of the run.
        weights_only: what a checkpoint needs is its weights; it may have no manifest then.

    Raises:
        CheckpointError: none verifies, or the one at the path does not.
    """
    if isinstance(asked, str) and asked.lower() in ("true", "false"):
        asked = asked.lower() == "true"
    if asked is False:
        return None
    if isinstance(asked, str) and not asked.strip():  # of a variable that was never set
        raise CheckpointError("resume_from_checkpoint names no checkpoint: give a path, 'auto', or leave it out")
    if isinstance(asked, str) and asked != AUTO:
        return _at(Path(asked), weights_only=weights_only)
    found = newest_verified(output_dir)
    for sentence in found.skipped:
        logger.warning("Passed over: %s.", sentence)
    if found.folder is not None:
        return found.folder
    if checkpoint_folders(output_dir):
        raise CheckpointError(
            f"{output_dir} holds no checkpoint that is whole. {'. '.join(found.skipped)}. To go on from the weights of "
            "one of them, pass its path with weights_only_resume=True; to start anew, choose another output_dir."
        )
    if asked == AUTO:
        return None
    raise CheckpointError(
        f"{output_dir} holds no checkpoint to resume from: leave resume_from_checkpoint out to start anew, or set it "
        "to 'auto', which does that by itself"
    )


def _at(folder: Path, *, weights_only: bool) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint at {folder}")
    if weights_only and not (folder / MANIFEST).exists():
        logger.warning("%s has no %s, so nobody knows whether it is whole; its weights are taken", folder, MANIFEST)
        return folder
    names = {path.name for path in folder.iterdir()}
    spare = (*NOT_WEIGHTS, *_per_process(folder)) if weights_only else ()
    try:
        verify(folder, may_lack=spare)
    except CheckpointError as error:
        advice = "" if weights_only or not names else " Its weights alone: weights_only_resume=True."
        raise CheckpointError(f"{error}.{advice}") from error
    return folder


def _per_process(folder: Path) -> list[str]:
    try:
        files = read_manifest(folder).files
    except CheckpointError:
        return []
    return [name for name in files if name.startswith(("rng_state", "states_"))]


def agreed(function: Callable[[], Any], is_main: bool) -> Any:
    """Run `function` on the main process alone, and return or raise the same everywhere."""
    result: list[Any] = [None, None]
    if is_main:
        try:
            result[0] = function()
        except AlignkitError as error:
            result[1] = error
    value, error = broadcast_object_list(result, from_process=0)
    if error is not None:
        raise error
    return value


def check_kind(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """See that a checkpoint is of a run of the same kind of trainer: others train other things, in other steps.

    Args:
        folder: the checkpoint.
        saved: what its run was made of.
        now: what this one is made of.

    Raises:
        CheckpointError: it is not.
    """
    kinds = [_KINDS.get(str(run.get("method")), str(run.get("method"))) for run in (saved, now)]
    if kinds[0] != kinds[1]:
        begin = "to begin with what that run trained, give this path as the model"
        advice = "this run begins anew" if REWARD in kinds else begin
        raise CheckpointError(
            f"{folder} is of another run: its method was {kinds[0]!r}, and this one's is {kinds[1]!r}, which cannot go "
            f"on from it, not even with weights_only_resume. Leave resume_from_checkpoint out: {advice}."
        )


def compare_runs(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what a checkpoint's run was made of with this one: refuse what breaks exactness, tell of the rest.

    Raises:
        CheckpointError: method, processes, data, base or an option that moves weights differ.
    """
    check_kind(folder, saved, now)
    broken = [f"{name} was {saved.get(name)!r} and is {now[name]!r}" for name in ("method", "processes")
              if saved.get(name) != now[name]]  # fmt: skip
    for name, what in _PARTS.items():
        if saved.get(name) != now[name]:
            broken.append(f"{what} changed")
    told: list[str] = []
    old, new = saved.get("settings") or {}, now["settings"]
    scheduled = new.get("lr_scheduler_type") not in _UNSCHEDULED
    evaluated = new.get("lr_scheduler_type") in _EVALUATED_SCHEDULES
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name) or (_is_harmless(name) and not (evaluated and name in _OF_EVALUATION)):
            continue
        sentence = f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        if name == "ignore_data_skip":
            continue
        if name in _ROUNDING or (name in _LENGTH and not scheduled):
            told.append(sentence)
        else:
            broken.append(sentence)
    for name in ("evaluation_data", "versions", "device"):
        if saved.get(name) != now[name]:
            (broken if evaluated and name == "evaluation_data" else told).append(f"{name.replace('_', ' ')} changed")
    if new.get("ignore_data_skip"):
        told.append("ignore_data_skip=True begins the epoch anew, so that some rows are seen twice and others not")
    if now["train_data"] is None:
        logger.warning("The training data are a stream: nobody can tell whether they are those of %s.", folder)
    if broken:
        raise CheckpointError(f"{folder} is of another run: {'; '.join(broken)}. {_REMEDY}")
    if told:
        logger.warning("%s goes on, but not bit for bit as it would have: %s.", folder, "; ".join(told))


def _is_harmless(name: str) -> bool:
    return name in _HARMLESS_NAMES or (name.startswith(_HARMLESS) and name not in _OF_ROWS)


class Fixed(NamedTuple):
    """Hashes of what a run does not change, taken before it begins.

    Attributes:
        base: of `frozen_digest`.
        data: of `further_data_digest`.
        rewards: of the models that reward completions.
        optimizer: of `describe_optimizer`.
    """

    base: str
    data: str
    rewards: str
    optimizer: str


def describe_run(trainer: Any, fixed: Fixed) -> dict[str, Any]:
    """What a run is made of, as a manifest keeps it.

    Args:
        trainer: with a `record`.
        fixed: hashes of its parts.
    """
    record = trainer.record
    data = {entry["name"]: entry["sha256"] for entry in record.data}
    adapter = None
    if isinstance(trainer.model, PeftModel):
        configs = {name: config.to_dict() for name, config in trainer.model.peft_config.items()}
        adapter = hashlib.sha256(repr(_sorted(configs)).encode()).hexdigest()
    return {
        "method": record.method,
        "processes": trainer.args.world_size,
        "train_data": data.get("train"),
        "further_data": fixed.data,
        "evaluation_data": {name: digest for name, digest in data.items() if name != "train"},
        "base": fixed.base,
        "adapter": adapter,
        "rewards": [*record.reward, fixed.rewards],
        "optimizer": fixed.optimizer,
        "batching": str(trainer.args.accelerator_config.to_dict()),
        "settings": record.settings,
        "versions": record.versions,
        "device": trainer.args.device.type,
    }


def further_data_digest(rows: Any, texts: Any, *, is_computed: bool) -> str:
    """SHA-256 of what the record does not hash: weights, columns that rewards ask for, texts that are mixed in.

    Args:
        rows: the training data as prepared; a stream tells nothing.
        texts: another dataset, or `None`.
        is_computed: the reference's log-probabilities among the columns come from rows and base.
    """
    digest = hashlib.sha256()
    for dataset, known in ((rows, {*_TOLD_COLUMNS, *(_COMPUTED_COLUMNS if is_computed else ())}), (texts, {"row_id"})):
        if not isinstance(dataset, Dataset):
            continue
        columns = sorted(set(dataset.column_names) - known)
        digest.update(repr(columns).encode())
        for row in dataset.select_columns(columns).with_format(None) if columns else ():
            digest.update(repr(_in_order(row)).encode())
    return digest.hexdigest()


def describe_optimizer(optimizer: Any, scheduler: Any, asked: Any) -> str:
    """Classes and defaults of what the caller made; what the options say is among the settings.

    Args:
        optimizer, scheduler: `None` where the trainer makes them.
        asked: class and arguments of an optimizer, or `None`.
    """
    made = [] if optimizer is None else [type(optimizer).__name__, sorted(optimizer.defaults.items())]
    made += [] if scheduler is None else [type(scheduler).__name__]
    return str([*made, *([] if asked is None else [asked[0].__name__, sorted(asked[1].items())])])


def rewards_digest(sources: Sequence[Any]) -> str:
    """SHA-256 of the weights of classifiers that reward; functions have none, and adapters count as the base's."""
    digest = hashlib.sha256()
    for source in sources:
        if isinstance(source, ClassifierReward):
            for name, parameter in source.model.named_parameters():
                _add(digest, name, parameter)
    return digest.hexdigest()


def _in_order(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted((str(key), _in_order(item)) for key, item in value.items())
    return [_in_order(item) for item in value] if isinstance(value, list) else value


_UNTOLD_OF_ADAPTERS = ("base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping")


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {str(key): item for key, item in value.items() if key not in _UNTOLD_OF_ADAPTERS}
        return sorted((key, _sorted(item)) for key, item in kept.items())
    return sorted(map(str, value)) if isinstance(value, set | list | tuple) else str(value)


def frozen_digest(model: nn.Module, reference: nn.Module | None, *, is_moving: bool, is_source: bool = False) -> str:
    """SHA-256 of every weight that training does not move and a checkpoint does not hold.

    Args:
        model: the policy; of a model that is trained whole, nothing counts.
        reference: a separate reference.
        is_moving: the reference follows the policy, so that checkpoints hold it.
        is_source: what the policy is before training makes the reference, so that all of it counts.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        is_kept = is_moving and f".{REFERENCE_ADAPTER}." in f".{name}."
        if is_source or not (parameter.requires_grad or is_kept):
            _add(digest, name.replace(".base_layer.", "."), parameter)
    if reference is not None and not is_moving:
        for name, parameter in reference.named_parameters():
            _add(digest, name, parameter)
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def is_weights_only(manifest: Manifest) -> bool:
    """Whether a checkpoint was made with `save_only_model`."""
    return not any(name.startswith("states_") for name in manifest.files)
