"""The runs that the benchmark compares, and the bars that the comparison is held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PAIRS_PER_STEP = 8
LORA_RANK = 16
LEARNING_RATE = 1e-4
MAX_LENGTH = 1024  # tokens of prompt + completion: the default of both sides


@dataclass(frozen=True, slots=True)
class Run:
    """One way to make the same optimizer step.

    Attributes:
        side: "trl" or "alignkit".
        summary: the row's description in tables.
        pairs_per_batch: micro-batch; gradient accumulation brings a step to `PAIRS_PER_STEP`.
        settings: further fields of the side's `DPOConfig`.
        completions_only: let TRL's head score completion tokens alone, as it does on CUDA and not on a CPU.
    """

    side: str
    summary: str
    pairs_per_batch: int = PAIRS_PER_STEP
    settings: dict[str, Any] = field(default_factory=dict)
    completions_only: bool = False

    @property
    def is_precomputed(self) -> bool:
        """Whether the reference is scored before training, which is then not part of a step."""
        return bool(self.settings.get("precompute_ref_log_probs"))


_OFF = {"gradient_checkpointing": False}
_PRECOMPUTED = {"precompute_ref_log_probs": True}

# In the order of one repeat: sides alternate as far as their numbers allow.
RUNS: dict[str, Run] = {
    "trl_default": Run("trl", "TRL, its defaults (checkpointing on, batch 8)"),
    "ours": Run("alignkit", "alignkit, reference in the loop", settings={"activation_checkpointing": False}),
    "trl_best": Run("trl", "TRL at its best (batch 1 × 8, checkpointing off)", 1, _OFF),
    "ours_precomputed": Run(
        "alignkit", "alignkit, reference precomputed", settings={"activation_checkpointing": False, **_PRECOMPUTED}
    ),
    "trl_best_precomputed": Run("trl", "TRL at its best, reference precomputed", 1, {**_OFF, **_PRECOMPUTED}),
    "ours_checkpointing": Run("alignkit", "alignkit, checkpointing on", settings={"activation_checkpointing": True}),
    "trl_no_checkpointing": Run("trl", "TRL, checkpointing off (batch 8)", settings=_OFF),
    "trl_default_completions": Run("trl", "TRL, its defaults, head as on CUDA", completions_only=True),
    "trl_best_completions": Run("trl", "TRL at its best, head as on CUDA", 1, _OFF, completions_only=True),
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A ratio that the comparison reports, with what it should reach (`None`: reported without a bar)."""

    ours: str
    theirs: str
    quantity: str  # "speed": their seconds over ours; "memory": our peak over theirs
    target: float | None = None

    @property
    def label(self) -> str:
        return f"{self.quantity}: `{self.ours}` against `{self.theirs}`"


BARS: tuple[Bar, ...] = (
    Bar("ours", "trl_default", "speed", 8.0),
    Bar("ours", "trl_best", "speed", 4.0),
    Bar("ours_precomputed", "trl_best_precomputed", "speed", 4.0),
    Bar("ours", "trl_default", "memory", 1 / 3),
    Bar("ours", "trl_default_completions", "speed"),
    Bar("ours", "trl_best_completions", "speed"),
    Bar("ours", "trl_best", "memory"),
)
# Data sets whose ratios have no bar.
WITHOUT_BARS = ("en_demo",)


@dataclass(frozen=True, slots=True)
class Job:
    """One run in one process, as it is handed over in a JSON file.

    Attributes:
        run: a name in `RUNS`.
        model: a folder.
        rows: a JSON file of rows.
        scratch: a folder for whatever the run writes.
        steps, warmup: optimizer steps that count, and those before them.
        threads: of PyTorch.
        profile: profile the last step. Its time then means nothing.
    """

    run: str
    model: str
    rows: str
    scratch: str
    steps: int
    warmup: int
    threads: int
    profile: bool = False
