"""Three optimizer steps and an evaluation log what the installed TRL logs, and leave the same adapter, in fp32.

Evaluation sets are whole batches here: TRL averages a metric over batches, whatever their size, and we over pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from alignkit.data.collate import DPOCollator
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from tests.golden.trl_twin import (
    RENAMED_OPTION_WARNINGS,
    assert_twins,
    build_ours,
    build_theirs,
    gradients,
    trl_module,
)
from tests.model_factory import tiny_model
from tests.tiny_preferences import (
    QUIET,
    adapter_weights,
    assert_close_tensors,
    character_tokenizer,
    lora,
    randomise_adapter,
    text_rows,
)

pytestmark = [pytest.mark.filterwarnings(pattern) for pattern in RENAMED_OPTION_WARNINGS]

STEPS = 3
RUN: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "logging_steps": 1,
    "seed": 11,
    # Adam divides a gradient by its own size. With the usual 1e-8 the rounding noise of a gradient that happens to be
    # nearly zero becomes a visible step; both trainers have it, each its own.
    "adam_epsilon": 1e-4,
}
# What TRL logs that is a sum or a mean over pairs. Those over tokens (entropy, logits) it averages over micro-batches.
COMPARED = ("loss", "grad_norm", "learning_rate", "epoch")
COMPARED_PREFIXES = ("rewards/", "logps/")


class Recording:
    """A collator that remembers which prompts it was given, in order."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]) -> None:
        self.collate = collate
        self.prompts: list[list[list[int]]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate as the wrapped collator does."""
        self.prompts.append([list(row["prompt_ids"]) for row in rows])
        return self.collate(rows)


def compared(logs: dict[str, float]) -> dict[str, float]:
    """The entries that must agree."""
    plain = {name: name.removeprefix("eval_") for name in logs}
    return {
        name: value
        for name, value in logs.items()
        if plain[name] in COMPARED or plain[name].startswith(COMPARED_PREFIXES)
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.3, 1.1], "ld_alpha": 0.5},
        {"loss_type": ["aot"], "beta": 0.5, "weight_decay": 0.1, "warmup_steps": 2},
    ],
    ids=["sigmoid", "mix", "aot"],
)
def test_three_steps_and_an_evaluation(options: dict[str, Any], tmp_path: Path) -> None:
    rows, held_out = text_rows(20), text_rows(8, seed=1)
    collate = trl_module("trl.trainer.dpo_trainer").DataCollatorForPreference(pad_token_id=0, max_length=1024)
    theirs = build_theirs(
        tmp_path, rows, trainer_options={"data_collator": (seen_by_them := Recording(collate))}, **RUN, **options
    )
    theirs.train()
    evaluated = theirs.evaluate(Dataset.from_list(held_out))

    ours = build_ours(
        tmp_path, rows, trainer_options={"data_collator": (seen_by_us := Recording(DPOCollator()))}, **RUN, **options
    )
    ours.train()
    found = ours.evaluate(Dataset.from_list(held_out))

    assert seen_by_us.prompts == seen_by_them.prompts
    assert len(seen_by_us.prompts) >= 2 * STEPS + 2
    expected_logs = [compared(entry) for entry in theirs.state.log_history if "loss" in entry]
    logs = [compared(entry) for entry in ours.state.log_history if "loss" in entry]
    assert len(logs) == len(expected_logs) == STEPS
    for entry, expected in zip(logs, expected_logs, strict=True):
        assert set(COMPARED) <= entry.keys()
        assert len(entry) == len(COMPARED) + 6
        assert entry == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(compared(found)) == 8  # the loss, the epoch and six means
    assert compared(found) == pytest.approx(compared(evaluated), rel=1e-4, abs=1e-5)
    assert logs[0]["rewards/margins"] != pytest.approx(logs[-1]["rewards/margins"], rel=1e-3)
    assert_moved_alike(ours, theirs)


def assert_moved_alike(ours: DPOTrainer, theirs: Any) -> None:
    """The adapters ended at the same place, which is not where they started."""
    found, expected = adapter_weights(ours.model), adapter_weights(theirs.model)
    assert_close_tensors(dict(found), dict(expected), rtol=1e-4)
    randomise_adapter(theirs.model)  # back to the start
    assert all((found[name] - start).abs().max() > 1e-4 for name, start in expected.items())


@pytest.mark.parametrize(
    ("options", "adapter_seed", "kl_is_positive"),
    [
        pytest.param({"desirable_weight": 1.2}, 7, False, id="kl clamped at 0"),
        pytest.param({"desirable_weight": 1.3, "undesirable_weight": 1.9, "beta": 0.5}, 8, True, id="kl above 0"),
    ],
)
def test_kto_batch(options: dict[str, Any], adapter_seed: int, kl_is_positive: bool, tmp_path: Path) -> None:
    """KTO's numbers on TRL's own rows, whose mismatched completions ours takes as `rejected_ids`."""
    labels = [True, False, False, True, True, False, True]
    unpaired = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": label}
        for row, label in zip(text_rows(len(labels)), labels, strict=True)
    ]
    trl = trl_module("trl")
    settings = {"per_device_train_batch_size": len(labels), "learning_rate": 1e-3, **QUIET, **options}
    theirs = trl_module("trl.trainer.kto_trainer").KTOTrainer(
        tiny_model("llama"),
        args=trl.KTOConfig(str(tmp_path / "theirs"), gradient_checkpointing=False, **settings),
        train_dataset=Dataset.from_list(unpaired),
        processing_class=character_tokenizer(),
        peft_config=lora(),
    )
    their_rows = list(theirs.train_dataset)
    assert [row["KL_completion_ids"] for row in their_rows] != [row["completion_ids"] for row in their_rows]
    rows = [
        {
            "prompt_ids": row["prompt_ids"],
            "chosen_ids": row["completion_ids"],
            "rejected_ids": row["KL_completion_ids"],
            "label": row["label"],
        }
        for row in their_rows
    ]
    ours = DPOTrainer(
        tiny_model("llama"),
        args=DPOConfig(str(tmp_path / "ours"), loss_type="kto", activation_checkpointing=False, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=character_tokenizer(),
        peft_config=lora(),
    )
    for trainer in (theirs, ours):
        randomise_adapter(trainer.model, seed=adapter_seed)
        trainer.model.train()
    assert_twins(theirs, ours)
    expected = theirs.compute_loss(theirs.model, theirs.data_collator(their_rows))
    found = ours.compute_loss(ours.model, ours.data_collator(list(ours.train_dataset)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert_close_tensors(gradients(ours.model, found), gradients(theirs.model, expected), rtol=1e-4)
    their_metrics = {name: value for name, (value,) in theirs._metrics["train"].items()}
    assert (their_metrics["kl"] > 0) == kl_is_positive
    metrics = ours._windows["train"].means(ours.accelerator)
    compared_metrics = {**compared(metrics), "kl": metrics["kl"]}
    assert len(compared_metrics) == 6  # of each label's rows, rewards and log-probs; their margin; the KL estimate
    assert compared_metrics == pytest.approx(
        {name: their_metrics[name] for name in compared_metrics}, rel=1e-4, abs=1e-5
    )
