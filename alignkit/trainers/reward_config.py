"""`RewardConfig`: every option of a reward model's run, under TRL's names, and how each compares with TRL's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from alignkit.trainers.config_engine import EngineConfig
from alignkit.trainers.config_rules import (
    AT_LEAST_ONE,
    ENGINE_CHECKS,
    ENGINE_NEEDS,
    ENGINE_RANGES,
    LABEL_SMOOTHING,
    NOT_NEGATIVE,
    Range,
    Refusal,
    needs,
    ranges,
    refusals,
)
from alignkit.trainers.config_table_engine import (
    ENGINE_AS_TRL,
    ENGINE_DIFFERENCES,
    ENGINE_OWN,
    ENGINE_REFUSED,
    Table,
)

REFUSED: dict[str, Refusal] = dict(ENGINE_REFUSED)

DIFFERENCES: dict[str, str] = {
    "max_length": "longer rows are dropped, as in TRL, and counted; above `max_drop_fraction` that is an error",
    "chat_template_path": "a Jinja file, or a tokenizer whose template needs no token that the model's lacks",
    "model_init_kwargs": "arguments of the causal language model that the head is put on",
    **ENGINE_DIFFERENCES,
}

TABLE = Table(
    as_trl=(ENGINE_AS_TRL - {"model_init_kwargs"}) | {"eos_token", "center_rewards_coefficient"},
    differences=DIFFERENCES,
    refused=REFUSED,
    own=(*ENGINE_OWN, "label_smoothing", "num_heads"),
)

RANGES: dict[str, Range] = {
    **ENGINE_RANGES,
    "center_rewards_coefficient": NOT_NEGATIVE._replace(optional=True),
    "label_smoothing": LABEL_SMOOTHING,
    "num_heads": AT_LEAST_ONE,
}


@dataclass(repr=False)
class RewardConfig(EngineConfig):
    """Options of `RewardTrainer`: TRL 1.16's, with their names and defaults, and a few of alignkit's own.

    Each field says in `metadata["help"]` what it does; `TABLE.describe(name)` says how it compares with TRL. Building
    one touches neither disk nor network.

    Raises:
        ConfigError: for an option that is out of range, contradicts another, or would have no effect.
    """

    CHECKS: ClassVar[tuple[Callable[[Any], None], ...]] = (
        refusals(REFUSED),
        ranges(RANGES),
        needs(ENGINE_NEEDS),
        *ENGINE_CHECKS,
    )

    learning_rate: float = field(
        default=1e-4,
        metadata={"help": "Peak learning rate. The default suits LoRA; whole models want 1e-5."},
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest prompt plus completion, in tokens; longer rows are dropped."}
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "Jinja file, or tokenizer (folder or Hub name), whose chat template is used instead."},
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "Token that ends a text, from the tokenizer's vocabulary. None: its own."}
    )
    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={"help": "Weight of (chosen + rejected reward) squared, which centres rewards at 0; 0.01 is usual."},
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Assumed probability that a label is flipped."})
    num_heads: int = field(
        default=1,
        metadata={"help": "Reward heads on the one adapter, an ensemble whose spread tells where it is unsure."},
    )
