"""One gradient, however it is computed: by which reference, in how many pieces, in which layout.

Every run is a real `train()`; what is compared is the gradient that each optimizer step was given.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from alignkit.models.adapters import add_adapter
from alignkit.models.lora import FUSED_LORA
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from tests.model_factory import is_checkpointing, tiny_model
from tests.tiny_preferences import (
    QUIET,
    RecordGradients,
    assert_close_tensors,
    character_tokenizer,
    lora,
    randomise_adapter,
    token_rows,
)

RTOL = 1e-5
PAIRS = 8
MIX = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.3, 1.1]}

# A row's gradient does not depend on the other rows of these, which may therefore be split into micro-batches.
SEPARABLE = {
    "sigmoid": {},
    "length-desensitised": {"loss_type": "sigmoid_norm", "ld_alpha": 0.5},
    "weighted": {"loss_type": ["ipo", "apo_zero"], "loss_weights": [0.1, 1.0], "use_weighting": True},
    "no reference": {"loss_type": "simpo"},
}
# These couple the rows of a micro-batch: in pieces, yes; in several micro-batches they are another loss, as in TRL.
COUPLED = {
    "aot": {"loss_type": "aot", "label_smoothing": 0.1},
    "aot_unpaired": {"loss_type": ["aot_unpaired", "sigmoid"], "loss_weights": [1.0, 0.5]},
    "sft mix": MIX,
    "sft mix, desensitised and weighted": {**MIX, "ld_alpha": 0.5, "use_weighting": True},
    "kto": {"loss_type": "kto", "desirable_weight": 1.5},
}
# Tokens per forward pass; a tiny pair has 10 to 32. The first gives every pair its own pass.
BUDGETS = (1, 60)


def rows_for(options: dict[str, Any], count: int = PAIRS) -> list[dict[str, Any]]:
    """Token rows with the columns that the loss reads, and a `weight` column."""
    source = random.Random(5)
    rows = token_rows(count)
    for i, row in enumerate(rows):
        weight = source.uniform(0.2, 2.0)
        if "aot" not in str(options.get("loss_type")):  # those re-order the rows, so weights are refused
            row["weight"] = weight
        if options.get("loss_type") == "kto":
            row["label"] = i % 3 == 0
    return rows


def steps(
    folder: Path, options: dict[str, Any], *, rows: list[dict[str, Any]] | None = None, **trainer_options: Any
) -> tuple[list[dict[str, Tensor]], DPOTrainer]:
    """The gradients of each step of a run over the rows in order; a step takes all of them unless told otherwise."""
    rows = rows or rows_for(options)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": len(rows),
        "max_steps": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "activation_checkpointing": False,
        "max_tokens_per_forward": None,
        "logging_steps": 1,
    }
    recorder = RecordGradients()
    model = trainer_options.pop("model", None)
    trainer = DPOTrainer(
        tiny_model("llama") if model is None else model,
        args=DPOConfig(str(folder / "run"), **{**settings, **QUIET, **options}),
        train_dataset=Dataset.from_list(rows),
        processing_class=character_tokenizer(),
        callbacks=[recorder],
        **{"peft_config": lora() if model is None else None, **trainer_options},
    )
    if model is None:
        randomise_adapter(trainer.model)
    trainer.train()
    assert len(recorder.steps) == 2
    assert all(gradient.abs().max() > 0 for step in recorder.steps for gradient in step.values())
    return recorder.steps, trainer


def assert_same_run(found: tuple[list, DPOTrainer], expected: tuple[list, DPOTrainer]) -> None:
    """Gradients of both steps and the logged means agree."""
    for gradients, wanted in zip(found[0], expected[0], strict=True):
        assert_close_tensors(gradients, wanted, rtol=RTOL)
    for entry, wanted in zip(*(logged(run[1]) for run in (found, expected)), strict=True):
        assert entry == pytest.approx(wanted, rel=RTOL, abs=1e-6)


def logged(trainer: DPOTrainer) -> list[dict[str, float]]:
    """The metrics of each step that do not depend on the clock or on which tokens were sampled."""
    prefixes = ("rewards/", "logps/", "loss", "grad_norm")
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: value for name, value in entry.items() if name.startswith(prefixes)} for entry in entries]


# --- the reference ---


def test_reference_adapter_off_separate_model_or_precomputed(tmp_path: Path) -> None:
    inside = steps(tmp_path, {})
    separate = steps(tmp_path, {}, ref_model=tiny_model("llama"))
    assert separate[1].bundle.reference is not None
    assert_same_run(separate, inside)
    precomputed = steps(tmp_path, {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache")})
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(precomputed[1].train_dataset.column_names)
    assert_same_run(precomputed, inside)


def test_reference_of_a_continued_adapter(tmp_path: Path) -> None:
    """Continuing from an adapter, the reference is that adapter as it was: the same as a separate model wearing it."""

    def adapted() -> PeftModel:
        model = add_adapter(tiny_model("llama"), lora(), custom_modules=FUSED_LORA)
        randomise_adapter(model)
        return model

    inside = steps(tmp_path, {"loss_type": "hinge"}, model=adapted())
    separate = steps(tmp_path, {"loss_type": "hinge"}, model=adapted(), ref_model=adapted())
    assert_same_run(separate, inside)
    assert logged(inside[1])[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert abs(logged(inside[1])[1]["rewards/margins"]) > 1e-3


# --- the pieces ---


@pytest.mark.parametrize("name", SEPARABLE)
def test_one_batch_accumulation_and_pieces(name: str, tmp_path: Path) -> None:
    options = SEPARABLE[name]
    whole = steps(tmp_path, options)
    for per_device, accumulation in ((4, 2), (1, 8)):
        pieces = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        assert_same_run(steps(tmp_path, {**options, **pieces}), whole)
    for budget in BUDGETS:
        assert_same_run(steps(tmp_path, {**options, "max_tokens_per_forward": budget}), whole)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_losses_in_pieces(name: str, budget: int, tmp_path: Path) -> None:
    options = COUPLED[name]
    whole = steps(tmp_path, options)
    found = steps(tmp_path, {**options, "max_tokens_per_forward": budget})
    assert found[1].objective.couples_rows
    assert len(found[1]._passes.split(found[1].data_collator(list(found[1].train_dataset)))) > 2
    assert_same_run(found, whole)


@pytest.mark.parametrize("name", COUPLED | SEPARABLE)
def test_evaluation_in_pieces(name: str, tmp_path: Path) -> None:
    """Loss, rewards and every exact metric of an evaluation do not depend on the token budget."""
    options = {**(COUPLED | SEPARABLE)[name], "per_device_eval_batch_size": PAIRS}
    rows = rows_for(options)
    outputs = []
    for budget in (None, *BUDGETS):
        _, trainer = steps(tmp_path, {**options, "max_tokens_per_forward": budget}, rows=rows)
        outputs.append(trainer.predict(Dataset.from_list(rows)))
    whole, *pieces = outputs
    for output in pieces:
        for found, expected in zip(output.predictions, whole.predictions, strict=True):
            np.testing.assert_allclose(found, expected, rtol=RTOL, atol=1e-6)
        assert exact_metrics(output.metrics) == pytest.approx(exact_metrics(whole.metrics), rel=1e-4, abs=1e-6)
        assert exact_metrics(output.metrics).keys() == exact_metrics(whole.metrics).keys()


def exact_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Without clocks, and without the metrics that are estimated on some tokens of each forward pass."""
    estimated = ("test_runtime", "test_samples_per", "test_steps_per", "test_model", "test_entropy", "test_logits")
    return {k: v for k, v in metrics.items() if not k.startswith((*estimated, "test_mean_token"))}


def test_the_reference_is_precomputed_in_pieces(tmp_path: Path) -> None:
    whole, pieces = (
        steps(
            tmp_path,
            {
                "precompute_ref_log_probs": True,
                "reference_cache_dir": str(tmp_path / str(budget)),
                "max_tokens_per_forward": budget,
            },
        )[1].train_dataset
        for budget in (None, 1)
    )
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        np.testing.assert_allclose(pieces[name], whole[name], rtol=RTOL)


def test_a_ragged_step_weighs_every_pair_alike(tmp_path: Path) -> None:
    """Micro-batches of 3, 3 and 1 pairs: the last pair counts as much as any other."""
    rows = rows_for({}, count=7)
    whole = steps(tmp_path, {}, rows=rows)
    ragged = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    assert_same_run(steps(tmp_path, ragged, rows=rows), whole)
    assert_same_run(steps(tmp_path, {**ragged, "max_tokens_per_forward": 60}, rows=rows), whole)


# --- the layouts and the memory savers ---


@pytest.mark.parametrize(
    "options", [{}, {**MIX, "ld_alpha": 0.5, "max_tokens_per_forward": 60}], ids=["sigmoid", "mix"]
)
def test_layouts(options: dict[str, Any], tmp_path: Path) -> None:
    padded = steps(tmp_path, {**options, "layout": "padded"})
    assert padded[1].bundle.kernels == set()
    for layout in ("packed", "prefix_shared"):
        found = steps(tmp_path, {**options, "layout": layout})
        assert found[1]._passes.layout == layout
        assert found[1].bundle.kernels == {"products"}
        assert_same_run(found, padded)


def test_checkpointing_and_offloading(tmp_path: Path) -> None:
    plain = steps(tmp_path, {})
    checkpointed = steps(tmp_path, {"activation_checkpointing": True})
    assert is_checkpointing(checkpointed[1].bundle.base)
    assert_same_run(checkpointed, plain)
    assert_same_run(steps(tmp_path, {"activation_offloading": True}), plain)
