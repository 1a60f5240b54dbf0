"""A model trained whole runs under autocast; a probe under dropout; what a save leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig

from alignkit.models.bundle import ModelBundle
from alignkit.models.probe import choose_layout
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from tests.model_factory import tiny_model
from tests.pair_factory import PAD, random_pairs
from tests.tiny_preferences import QUIET, character_tokenizer, token_rows


def trainer(folder: Path, peft_config: LoraConfig | None = None, **options) -> DPOTrainer:
    settings = {**QUIET, "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, **options}
    return DPOTrainer(
        tiny_model("llama"),
        args=DPOConfig(str(folder), **settings),
        train_dataset=Dataset.from_list(token_rows(4)),
        processing_class=character_tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("precompute", [False, True])
def test_a_whole_model_trains_in_bf16_from_log_ratios_of_zero(tmp_path, precompute):
    cache = {"reference_cache_dir": str(tmp_path / "cache")} if precompute else {}
    run = trainer(tmp_path, bf16=True, precompute_ref_log_probs=precompute, **cache)
    run.train()
    assert run._passes.layout == "prefix_shared"
    assert run.bundle.kernels == {"products"}
    assert run.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=5e-3)


def test_the_layout_is_probed_without_dropout():
    bundle = ModelBundle(tiny_model("gpt2", attn_pdrop=0.0).train())
    assert choose_layout(bundle, random_pairs(), "auto", PAD) == "prefix_shared"
    assert bundle.model.training
    assert bundle.model.transformer.drop.training


def test_a_users_folder_called_reference_survives_a_save(tmp_path):
    mine = tmp_path / "reference" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("kept")
    trainer(
        tmp_path, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"), learning_rate=1e-4
    ).save_model()
    assert mine.read_text() == "kept"
