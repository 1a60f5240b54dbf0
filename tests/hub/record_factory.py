"""Records of runs that never were, for tests of what reads records."""

from __future__ import annotations

from typing import Any

from alignkit.hub.record import RunRecord


def interval(value: float, reach: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - reach, "high": value + reach}


def make_record(**changes: Any) -> RunRecord:
    """A DPO run on a Hub base, with one evaluation and one sample; `changes` replaces fields."""
    base = {
        "name": "Some-1B",
        "hub_id": "owner/Some-1B",
        "revision": "0123456789abcdef0123456789abcdef01234567",
        "note": None,
        "license": "apache-2.0",
        "language": ["en"],
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "parameters": 1_000_000_000,
        "dtype": "bfloat16",
        "quantization": "nf4",
        "is_chat": True,
    }
    fields: dict[str, Any] = {
        "method": "dpo",
        "alignkit": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T03:24:05+00:00",
        "base": base,
        "adapter": {"kind": "LORA", "r": 16, "alpha": 32, "trainable_parameters": 5_000_000},
        "data": [
            {
                "name": "train",
                "source": "owner/pairs",
                "hub_id": "owner/pairs",
                "revision": "89abcdef" * 5,
                "rows": 1592,
                "sha256": "ab" * 32,
                "preparation": {"drops": {"empty": {"count": 4, "row_ids": [1, 2, 3, 4]}}},
            },
            {"name": "eval", "source": "owner/pairs", "hub_id": "owner/pairs", "rows": 298, "sha256": "cd" * 32},
        ],
        "settings": {"learning_rate": 1e-4, "beta": 0.1, "loss_type": ["sigmoid"]},
        "changed": ["learning_rate"],
        "versions": {"python": "3.12.1", "torch": "2.13.0", "peft": "0.21.2"},
        "hardware": {"device": "cpu", "device_name": "Some CPU", "threads": 2, "processes": 1},
        "seeds": {"seed": 42, "data_seed": 42},
        "usage": {"steps": 100, "training_seconds": 1054.6, "peak_memory_bytes": 5_300_000_000},
        "samples": [{"prompt": "Why is the sky blue?", "before": "Magic.", "after": "Rayleigh scattering."}],
        "log": [{"loss": 0.69, "step": 1}, {"loss": 0.63, "step": 100}],
    }
    record = RunRecord(**{**fields, **changes})
    if "evaluations" not in changes:
        record.add_evaluation(
            "held-out preferences",
            {"accuracy": interval(0.644), "loss": 0.633, "shorter": interval(0.557)},
            rows=298,
            baseline={"accuracy": interval(0.5), "loss": 0.693, "shorter": interval(0.557)},
        )
    return record
