"""What a recipe needs to know besides the training options: which data, which model, which adapter.

Fields that TRL's ScriptArguments and ModelConfig also have bear their names and meanings. `DIFFERENCES` lists where a
default differs or a field is left out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from alignkit.errors import ConfigError
from alignkit.models.load import int8, nf4

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STORAGE_DTYPES = {"uint8": torch.uint8, **DTYPES}

DIFFERENCES: dict[str, str] = {
    "dataset_name": "'demo', the preference pairs that ship with alignkit (TRL: none)",
    "ignore_bias_buffers": "left out: it works around models with boolean buffers under DDP",
    "model_name_or_path": "'demo', a small chat model from the package index (TRL: none)",
    "dtype": "None, the dtype that the device computes in (TRL: float32)",
    "use_peft": "True (TRL: False)",
    "lora_dropout": "0.0, because DPOConfig.disable_dropout is on (TRL: 0.05)",
    "lora_target_modules": "'all-linear' (TRL: PEFT's choice for the architecture)",
    "use_bnb_nested_quant": "True (TRL: False)",
}


@dataclass
class ScriptArguments:
    """Which data a recipe trains and evaluates on.

    Raises:
        ConfigError: if a number of rows is not positive.
    """

    dataset_name: str = field(
        default="demo",
        metadata={"help": "Dataset on the Hub, a file or folder, or 'demo' for the pairs that come with alignkit."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read the dataset row by row as training goes."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Use at most this many rows for training."})
    holdout_rows: int | None = field(
        default=None,
        metadata={"help": "Evaluate on this many last rows of the training split, and train without them."},
    )

    def __post_init__(self) -> None:
        for name in ("max_train_rows", "holdout_rows"):
            rows = vars(self)[name]
            if rows is not None and rows < 1:
                raise ConfigError(f"{name}={rows}: must be 1 or more, or None.")


@dataclass
class RewardArguments:
    """What a recipe for PPO rewards answers with, in place of its own function."""

    reward_model: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward models: folders that recipes/reward_lora.py saved, or sequence classifiers by folder or "
            "name on the Hub. Give several after one --reward_model, or the option several times; their scores are "
            "added with --reward_weights."
        },
    )


@dataclass
class ModelArguments:
    """Which model a recipe loads, in which precision, and which adapter it trains.

    `trust_remote_code` is a training option (`DPOConfig`), as in TRL.

    Raises:
        ConfigError: for options that contradict each other or would have no effect.
    """

    model_name_or_path: str = field(
        default="demo",
        metadata={"help": "Model on the Hub, a folder, an adapter to continue from, or 'demo' for SmolLM2-135M."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the frozen weights; auto takes the checkpoint's, none what the device computes in.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation of transformers, such as sdpa or eager."}
    )
    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter; otherwise every weight."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's output is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter, in [0, 1)."})
    lora_target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "Names of the layers to adapt, or all-linear."}
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of parameters to adapt that are no layers, such as fused experts."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of layers to train and save whole."}
    )
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "Task that PEFT records; SEQ_CLS for rewards."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) instead."})
    use_dora: bool = field(default=False, metadata={"help": "Train magnitude and direction apart (DoRA)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Store the frozen base in 8 bits."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Store the frozen base in 4 bits (QLoRA)."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Format of 4-bit weights.", "choices": ["nf4", "fp4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=True, metadata={"help": "Quantize the scales of 4-bit weights too: 0.4 bits per weight less."}
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None,
        metadata={
            "help": "Dtype that 4-bit weights are packed into; FSDP needs that of the other weights.",
            "choices": list(STORAGE_DTYPES),
        },
    )

    def __post_init__(self) -> None:
        self._check_quantization()
        self._check_adapter()

    def _check_quantization(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit are both set: choose one.")
        for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"):
            if self._changed(name) and not self.load_in_4bit:
                raise ConfigError(f"{name}={vars(self)[name]!r}: has no effect without load_in_4bit=True.")
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise ConfigError("use_peft=False: a quantized base cannot be trained itself; use LoRA or do not quantize.")
        for name, known in (
            ("dtype", ("auto", *DTYPES)),
            ("bnb_4bit_quant_type", ("nf4", "fp4")),
            ("bnb_4bit_quant_storage", tuple(STORAGE_DTYPES)),
        ):
            value = vars(self)[name]
            if value is not None and value not in known:
                raise ConfigError(f"{name}={value!r}: must be one of {', '.join(known)}.")

    def _check_adapter(self) -> None:
        adapter = [f.name for f in dataclasses.fields(self) if f.name.startswith("lora_")] + ["use_rslora", "use_dora"]
        for name in adapter:
            if self._changed(name) and not self.use_peft:
                raise ConfigError(f"{name}={vars(self)[name]!r}: has no effect with use_peft=False.")
        for name in ("lora_r", "lora_alpha"):
            if vars(self)[name] < 1:
                raise ConfigError(f"{name}={vars(self)[name]}: must be 1 or more.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout}: must be in [0, 1).")

    def _changed(self, name: str) -> bool:
        return vars(self)[name] != type(self).__dataclass_fields__[name].default

    def to_peft_config(self) -> LoraConfig | None:
        """Return the adapter to train, or None for full fine-tuning."""
        if not self.use_peft:
            return None
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            target_parameters=self.lora_target_parameters,
            modules_to_save=self.lora_modules_to_save,
            task_type=self.lora_task_type,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )

    def to_quantization_config(self) -> BitsAndBytesConfig | None:
        """Return how the frozen base is quantized, or None for 16 or 32 bits.

        Raises:
            ModelError: if bitsandbytes is needed and not installed.
        """
        if self.load_in_8bit:
            return int8()
        if not self.load_in_4bit:
            return None
        config = nf4(None if self.dtype is None else DTYPES.get(self.dtype))
        config.bnb_4bit_quant_type = self.bnb_4bit_quant_type
        config.bnb_4bit_use_double_quant = self.use_bnb_nested_quant
        if self.bnb_4bit_quant_storage is not None:
            config.bnb_4bit_quant_storage = STORAGE_DTYPES[self.bnb_4bit_quant_storage]
        return config

    def to_model_init_kwargs(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` that differ from its defaults."""
        kwargs: dict[str, Any] = {}
        if self.model_revision != "main":
            kwargs["revision"] = self.model_revision
        if self.dtype is not None:
            kwargs["dtype"] = self.dtype
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        return kwargs
