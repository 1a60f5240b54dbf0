"""`DPOConfig`: every option of a DPO run, under TRL's names.

The fields; what makes a combination wrong is in `config_checks.py`, and how each shared option compares with TRL's in
`config_table.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from alignkit.trainers.config_checks import CHECKS
from alignkit.trainers.config_engine import EngineConfig

DEFAULT_REFERENCE_CACHE = Path("~/.cache/alignkit/reference")


@dataclass(repr=False)
class DPOConfig(EngineConfig):
    """Options of `DPOTrainer`: TRL 1.16's, with their names and defaults, and a few of alignkit's own.

    Each field says in `metadata["help"]` what it does; `config_table.describe(name)` says how it compares with TRL.
    Building one touches neither disk nor network.

    Raises:
        ConfigError: for an option that is out of range, contradicts another, or would have no effect.
    """

    CHECKS: ClassVar[tuple[Callable[[Any], None], ...]] = CHECKS

    # --- a default that differs from TrainingArguments ---
    learning_rate: float = field(
        default=1e-6, metadata={"help": "Peak learning rate. The default suits full fine-tuning; LoRA needs 1e-5 up."}
    )

    # --- model ---
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of a mixture-of-experts load-balancing loss. Only None or 0 is accepted."},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of policy and reference to 0."})

    # --- data ---
    truncation_mode: str = field(
        default="keep_start", metadata={"help": "Which end of a sequence survives a cut. Only keep_start is accepted."}
    )
    padding_free: bool = field(
        default=False, metadata={"help": "Compute no padding. Already so in every layout but 'padded'."}
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

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super().__post_init__()

    @property
    def reference_cache_path(self) -> Path:
        """Where precomputed reference log-probabilities are kept. The folder may not exist yet."""
        return Path(self.reference_cache_dir or DEFAULT_REFERENCE_CACHE).expanduser()
