"""What each option that `DPOConfig` shares with TRL's means here: as in TRL, different, or refused."""

from __future__ import annotations

from alignkit.trainers.config_rules import Refusal
from alignkit.trainers.config_table_engine import (
    ENGINE_AS_TRL,
    ENGINE_DIFFERENCES,
    ENGINE_OWN,
    ENGINE_REFUSED,
    Table,
)

REFUSED: dict[str, Refusal] = {
    "truncation_mode": Refusal(
        ("keep_start",),
        "cutting the front of a sequence removes the prompt that the answer is judged by; use 'keep_start', raise "
        "`max_length`, or shorten the prompts in the data",
    ),
    "router_aux_loss_coef": Refusal(
        (None, 0.0), "the load-balancing loss of mixture-of-experts models is not computed; leave it None or set 0.0"
    ),
    **ENGINE_REFUSED,
}

DIFFERENCES: dict[str, str] = {
    "padding_free": "accepted, and needs no attention kernel: the default layouts hold no padding (TRL: ignored)",
    "label_smoothing": "works for 'sigmoid' too (cDPO); must be in [0, 0.5); an error with losses that do not read it",
    "loss_type": "a string or a list; TRL's names and ipo_sum, simpo, orpo, cpo, kto, dpop",
    "f_alpha_divergence_coef": "an error unless `f_divergence_type='alpha_divergence'`",
    "discopop_tau": "an error unless 'discopop' is among the losses",
    "use_weighting": "an error for 'kto' too, which has no pairs to weight",
    "sync_ref_model": "works with LoRA; an error if no loss reads a reference, and with DeepSpeed",
    "ref_model_mixup_alpha": "an error without `sync_ref_model`",
    "ref_model_sync_steps": "an error without `sync_ref_model`",
    "precompute_ref_log_probs": "cached on disk under what it depends on; an error if no loss reads a reference",
    "precompute_ref_batch_size": "an error without `precompute_ref_log_probs`",
    **ENGINE_DIFFERENCES,
}

OWN_FIELDS: tuple[str, ...] = (
    *ENGINE_OWN,
    "simpo_gamma",
    "cpo_alpha",
    "dpop_lambda",
    "desirable_weight",
    "undesirable_weight",
    "reference_cache_dir",
)

AS_TRL: frozenset[str] = ENGINE_AS_TRL | {"max_length", "loss_weights", "ld_alpha", "f_divergence_type", "beta"}

TABLE = Table(AS_TRL, DIFFERENCES, REFUSED, OWN_FIELDS)
describe = TABLE.describe
