"""The adapters of a checkpoint, loaded into those that a model has."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from alignkit.errors import CheckpointError

DEFAULT = "default"  # PEFT saves this one into the folder itself, and others into folders of their names


def load_adapters(model: PeftModel, folder: Path) -> None:
    """Load what a checkpoint holds of a model's adapters.

    Adapters that the model lacks are let be. Trainer would add them, and leave the one in training as it was.

    Args:
        model: whose active adapter stays the active one. A single adapter that lies in `folder` itself is taken for it.
        folder: the checkpoint.

    Raises:
        CheckpointError: the active adapter is not among those that the checkpoint holds, or weights of one are missing
            or too many, as those of an adapter on other layers.
    """
    active = model.active_adapters[0]
    found_in = _adapter_folders(folder)
    places = {place.name: place for place in found_in if place != folder}
    if folder in found_in:
        places[DEFAULT if places else active] = folder
    if not places:
        raise CheckpointError(
            f"'{folder}' holds a model that was trained whole, and this run trains an adapter: resume without "
            "peft_config, or leave resume_from_checkpoint out and give this path as the model."
        )
    if active not in places:
        raise CheckpointError(
            f"'{folder}' holds the adapters {sorted(places)}, and this run trains '{active}'. Load the model with an "
            "adapter of that name (adapter_name), or resume from another checkpoint."
        )
    for name in sorted(places.keys() & model.peft_config.keys()):
        try:
            found = model.load_adapter(str(places[name]), name, is_trainable=name == active)
            odd = [*found.missing_keys, *found.unexpected_keys]
        except KeyError as missing:  # of a layer that is trained and saved with the adapter, such as a head
            odd = [missing.args[0]]
        if odd:  # PEFT would go on with what the adapter held before
            raise CheckpointError(
                f"'{places[name]}' holds other weights than the adapter '{name}' of this run, which is on other "
                f"layers or has other options: {len(odd)} do not match, such as {odd[0]!r}."
            )
    model.set_adapter(active)


def check_whole(folder: Path) -> None:
    """Check that a checkpoint holds no adapter where a model is wanted.

    Raises:
        CheckpointError: it does.
    """
    if _adapter_folders(folder):
        raise CheckpointError(
            f"'{folder}' holds an adapter, and this run trains the model whole: resume with the peft_config of that "
            "run, or leave resume_from_checkpoint out and give this path as the model."
        )


def _adapter_folders(folder: Path) -> list[Path]:
    """Where a checkpoint holds adapters: in itself, and in folders that bear their names."""
    return [place for place in (folder, *folder.iterdir()) if (place / SAFETENSORS_WEIGHTS_NAME).is_file()]
