"""`DPOConfig`: every option of a DPO run, under TRL's names.

The fields and what happens when one is built; what makes a combination wrong is in `config_checks.py`, and how each
shared option compares with TRL's in `config_table.py`.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from alignkit.errors import ConfigError
from alignkit.models.load import compute_dtype, training_device
from alignkit.trainers.config_checks import CHECKS

LOWEST_USUAL_LORA_LEARNING_RATE = 1e-5
DEFAULT_REFERENCE_CACHE = Path("~/.cache/alignkit/reference")


@dataclass
class DPOConfig(TrainingArguments):
    """Options of `DPOTrainer`: TRL 1.16's, with their names and defaults, and a few of alignkit's own.

    Each field says in `metadata["help"]` what it does; `config_table.describe(name)` says how it compares with TRL.
    Building one touches neither disk nor network.

    Raises:
        ConfigError: for an option that is out of range, contradicts another, or would have no effect.
    """

    # TrainingArguments reads these from JSON; releases before 5.23 do not know the newer spelling of the last
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "activation_checkpointing_kwargs"]

    # --- defaults that differ from TrainingArguments ---
    learning_rate: float = field(
        default=1e-6, metadata={"help": "Peak learning rate. The default suits full fine-tuning; LoRA needs 1e-5 up."}
    )
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
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of a mixture-of-experts load-balancing loss. Only None or 0 is accepted."},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of policy and reference to 0."})

    # --- data and layout ---
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the data."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest prompt plus completion, in tokens; the rest is cut. None: no limit."}
    )
    truncation_mode: str = field(
        default="keep_start", metadata={"help": "Which end of a sequence survives a cut. Only keep_start is accepted."}
    )
    padding_free: bool = field(
        default=False, metadata={"help": "Compute no padding. Already so in every layout but 'padded'."}
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

    # --- reference ---
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute the reference's log-probabilities once, before training, and cache them."},
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per device while precomputing. None: as in training or evaluation."}
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of precomputed log-probabilities. None: ~/.cache/alignkit/reference."},
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Move the reference towards the policy now and then (TR-DPO, 2404.09656)."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "TR-DPO: share of the policy in the new reference, between 0 and 1."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "TR-DPO: optimizer steps between two updates."})

    # --- loss ---
    loss_type: list[str] | str = field(
        default_factory=lambda: ["sigmoid"], metadata={"help": "One loss, or several that are added up."}
    )
    loss_weights: list[float] | None = field(default=None, metadata={"help": "A weight for each loss. None: 1 each."})
    beta: float = field(
        default=0.1, metadata={"help": "How strongly the policy is held to the reference (for IPO, its tau)."}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Assumed probability that a label is flipped (sigmoid, robust, exo_pair, aot, aot_unpaired)."
        },
    )
    f_divergence_type: str = field(
        default="reverse_kl", metadata={"help": "Divergence from the reference that the rewards come from (f-DPO)."}
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "The alpha of alpha_divergence."})
    use_weighting: bool = field(
        default=False, metadata={"help": "Weight pairs by how likely the policy is to write them (WPO, 2406.11827)."}
    )
    ld_alpha: float | None = field(
        default=None,
        metadata={"help": "LD-DPO: weight of the tokens beyond the shorter completion's length, from 0 to 1."},
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of the discopop loss."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Target reward margin of the simpo loss."})
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of the likelihood term of the cpo loss."})
    dpop_lambda: float = field(default=50.0, metadata={"help": "Weight of the penalty of the dpop loss."})
    desirable_weight: float = field(default=1.0, metadata={"help": "kto: weight of desirable completions."})
    undesirable_weight: float = field(default=1.0, metadata={"help": "kto: weight of undesirable completions."})

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
        for check in CHECKS:
            check(self)
        self.use_cpu = self.use_cpu or training_device().type == "cpu"
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu  # torch warns of it on a CPU
        _choose_precision(self)
        super().__post_init__()

    @property
    def reference_cache_path(self) -> Path:
        """Where precomputed reference log-probabilities are kept. The folder may not exist yet."""
        return Path(self.reference_cache_dir or DEFAULT_REFERENCE_CACHE).expanduser()


def warn_low_lora_learning_rate(args: TrainingArguments) -> None:
    """Warn that LoRA will hardly move at `args.learning_rate`; call it once the model is known to hold adapters."""
    if 0 < args.learning_rate < LOWEST_USUAL_LORA_LEARNING_RATE:
        warnings.warn(
            f"learning_rate={args.learning_rate:g} is meant for full fine-tuning; LoRA adapters hardly move below "
            f"{LOWEST_USUAL_LORA_LEARNING_RATE:g}. Try 5e-5 to 1e-4.",
            UserWarning,
            stacklevel=3,
        )


def _normalise_spellings(args: DPOConfig) -> None:
    """Bring options that may be written in several ways to one: lists, numbers and mappings that came as text."""
    if isinstance(args.loss_type, str):
        args.loss_type = [args.loss_type]
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


def _merge_checkpointing_aliases(args: DPOConfig) -> None:
    """Give both spellings the value of the newer one, or of the older where that is not set, without a warning."""
    new, old = args.activation_checkpointing, args.gradient_checkpointing
    args.activation_checkpointing = args.gradient_checkpointing = bool(old if new is None else new)
    new_kwargs, old_kwargs = args.activation_checkpointing_kwargs, args.gradient_checkpointing_kwargs
    kwargs = old_kwargs if new_kwargs is None else new_kwargs
    args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs = kwargs


def _choose_precision(args: DPOConfig) -> None:
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
