"""`EngineConfig`: the options that every trainer here has, because they run on the same engine.

How models are loaded, batches laid out and passes bounded. Fields and what happens when one is built; a trainer adds
its own fields and checks.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from alignkit.errors import ConfigError
from alignkit.hub.discretion import masked
from alignkit.models.load import compute_dtype, training_device

LOWEST_USUAL_LORA_LEARNING_RATE = 1e-5


@dataclass(repr=False)
class EngineConfig(TrainingArguments):
    """Options that `DPOConfig` and `RewardConfig` share, with TRL's names and defaults where TRL has them.

    Building one touches neither disk nor network.

    Raises:
        ConfigError: for an option that is out of range, contradicts another, or would have no effect.
    """

    # What makes an instance wrong, one small function for each reason, run in order before anything is loaded.
    CHECKS: ClassVar[tuple[Callable[[Any], None], ...]] = ()
    # What to lower where one row alone takes too much memory.
    LENGTH_OPTIONS: ClassVar[str] = "max_length"
    # TrainingArguments reads these from JSON; releases before 5.23 do not know the newer spelling of the last
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "activation_checkpointing_kwargs"]

    # --- defaults that differ from TrainingArguments ---
    logging_steps: float = field(
        default=10, metadata={"help": "Optimizer steps between two log entries; below 1, a fraction of the run."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log a loss that is not finite as the average so far instead of as it is."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Compute in bfloat16. None: where the device does so natively, else fp16 on CUDA."},
    )
    gradient_checkpointing: bool | None = field(
        default=True, metadata={"help": "Older spelling of activation_checkpointing, read where that one is not set."}
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in the backward pass: less memory, more time. On unless set False."},
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of torch's checkpoint function (JSON)."}
    )

    # --- model ---
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained (JSON), used if the model is given by name."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with a model or tokenizer from the Hub."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout to 0."})

    # --- data and layout ---
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the data."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest prompt plus completion, in tokens; the rest is cut. None: no limit."}
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "With layout 'padded', round the batch's length up to a multiple of this."}
    )
    layout: str = field(
        default="auto",
        metadata={
            "help": "How a batch is laid out: each prompt once for both completions (prefix_shared), sequences end to "
            "end (packed), or a rectangle (padded). auto takes the first of these that the model supports.",
            "choices": ["auto", "prefix_shared", "packed", "padded"],
        },
    )
    max_tokens_per_forward: int | str | None = field(
        default="auto",
        metadata={
            "help": "Most tokens in one forward pass: a micro-batch runs in pieces of this size, with the gradient of "
            "the whole. auto fits the device's memory; None runs the micro-batch at once."
        },
    )
    max_drop_fraction: float = field(
        default=0.2, metadata={"help": "Fraction of rows that may be unusable before that is an error."}
    )

    # --- resuming ---
    weights_only_resume: bool = field(
        default=False,
        metadata={
            "help": "Resume with a checkpoint's weights and step alone: optimizer, random numbers and logging begin "
            "anew. For checkpoints that lack them, or of a run that was set up differently."
        },
    )

    # --- steps that fail ---
    max_skipped_steps: int = field(
        default=3,
        metadata={
            "help": "Optimizer steps of a run that may be left out because a loss, a gradient, a reward or a "
            "log-probability is not a finite number; one more stops the run. 0 stops at the first."
        },
    )

    # --- memory ---
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep the activations that backward needs in CPU memory."}
    )

    # --- refused, kept for a clear message ---
    pad_token: str | None = field(
        default=None, metadata={"help": "Not accepted: set tokenizer.pad_token and pass the tokenizer."}
    )

    def __post_init__(self) -> None:
        _normalise_spellings(self)
        _merge_checkpointing_aliases(self)
        for check in self.CHECKS:
            check(self)
        self.use_cpu = self.use_cpu or training_device().type == "cpu"
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu  # torch warns of it on a CPU
        _choose_precision(self)
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values, with a name in place of each secret: trackers write this to disk.

        `TrainingArguments` masks `hub_token`, and lets the token in `model_init_kwargs` through.
        """
        return masked(super().to_dict())

    def __str__(self) -> str:
        options = "".join(f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{options})"

    __repr__ = __str__  # a dataclass's own would print every field as it is


def warn_low_lora_learning_rate(args: TrainingArguments) -> None:
    """Warn that LoRA will hardly move at `args.learning_rate`; call it once the model is known to hold adapters."""
    if 0 < args.learning_rate < LOWEST_USUAL_LORA_LEARNING_RATE:
        warnings.warn(
            f"learning_rate={args.learning_rate:g} is meant for full fine-tuning; LoRA adapters hardly move below "
            f"{LOWEST_USUAL_LORA_LEARNING_RATE:g}. Try 5e-5 to 1e-4.",
            UserWarning,
            stacklevel=3,
        )


def _normalise_spellings(args: EngineConfig) -> None:
    """Bring options that may be written in several ways to one: numbers and mappings that came as text."""
    args.pad_to_multiple_of = _number_in_text(args.pad_to_multiple_of)
    if args.pad_to_multiple_of == "auto":
        args.pad_to_multiple_of = None
    args.max_tokens_per_forward = _number_in_text(args.max_tokens_per_forward)
    if isinstance(args.model_init_kwargs, str):
        try:
            args.model_init_kwargs = json.loads(args.model_init_kwargs)
        except json.JSONDecodeError as error:
            raise ConfigError(f"model_init_kwargs={args.model_init_kwargs!r} is not a JSON mapping: {error}") from None


def _number_in_text(value: int | str | None) -> int | str | None:
    """`"512"` as 512 and `"none"` as None, because a command line knows only text; anything else unchanged."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("none", "null"):
        return None
    return int(value) if value.lstrip("-").isdigit() else value


def _merge_checkpointing_aliases(args: EngineConfig) -> None:
    """Give both spellings the value of the newer one, or of the older where that is not set, without a warning."""
    new, old = args.activation_checkpointing, args.gradient_checkpointing
    args.activation_checkpointing = args.gradient_checkpointing = bool(old if new is None else new)
    new_kwargs, old_kwargs = args.activation_checkpointing_kwargs, args.gradient_checkpointing_kwargs
    kwargs = old_kwargs if new_kwargs is None else new_kwargs
    args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs = kwargs


def _choose_precision(args: EngineConfig) -> None:
    """Resolve `bf16=None`: what was asked for (`fp16`, `accelerate launch --mixed_precision`), else by the device."""
    if args.bf16 is not None:
        return
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.fp16 or launched_with == "fp16":
        args.bf16, args.fp16 = False, True
    elif launched_with == "bf16":
        args.bf16 = True
    else:
        dtype = compute_dtype(torch.device("cpu") if args.use_cpu else None)
        args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16
