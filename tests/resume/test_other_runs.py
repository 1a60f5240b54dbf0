"""What another run would be: refused, each by its name, before anything is trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from alignkit.checkpoint.manifest import MANIFEST
from alignkit.errors import CheckpointError
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig
from tests.hostile.runs import reseal
from tests.model_factory import tiny_model
from tests.ppo_factory import ppo_trainer, vowels
from tests.resume.cases import EVALUATED, OPTIONS, TEXTS
from tests.tiny_preferences import character_tokenizer, lora, text_rows


def dpo(folder: Path, *, seed: int = 0, is_whole: bool = False, weight: float = 1.0, **options: Any) -> DPOTrainer:
    """Two steps on four rows that carry weights."""
    rows = [{**row, "weight": weight * (i + 1)} for i, row in enumerate(text_rows(4))]
    return DPOTrainer(
        tiny_model("llama", seed=seed),
        args=DPOConfig(str(folder), **{**OPTIONS, "max_steps": 2, "per_device_train_batch_size": 2, **options}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(text_rows(2, seed=5)),
        processing_class=character_tokenizer(),
        peft_config=None if is_whole else lora(),
    )


def refused(make: Any, before: dict[str, Any], now: dict[str, Any], folder: Path) -> str:
    """Train a run, begin another in its folder, and return what is said; the run itself goes on."""
    make(folder, **before).train()
    with pytest.raises(CheckpointError, match="of another run") as caught:
        make(folder, **now).train(resume_from_checkpoint=True)
    make(folder, **before).train(resume_from_checkpoint=True)
    return str(caught.value)


def test_other_weights_of_rows(tmp_path: Path) -> None:
    assert "a column of the training data" in refused(dpo, {}, {"weight": 2.0}, tmp_path)


def test_rows_of_the_last_batch_that_are_left_out(tmp_path: Path) -> None:
    assert "dataloader_drop_last" in refused(dpo, {}, {"dataloader_drop_last": True}, tmp_path)


def test_another_way_to_batch(tmp_path: Path) -> None:
    now = {"accelerator_config": {"split_batches": True}}
    assert "accelerator_config changed" in refused(dpo, {}, now, tmp_path)


def test_another_base_whose_log_probabilities_were_computed_before(tmp_path: Path) -> None:
    """A model that is trained whole is its own reference, which checkpoints do not hold."""
    whole = {
        "is_whole": True,
        "precompute_ref_log_probs": True,
        "reference_cache_dir": str(tmp_path / "cache"),
        "learning_rate": 1e-4,
    }
    assert "the base model changed" in refused(dpo, whole, {**whole, "seed": 3}, tmp_path / "run")


def test_other_evaluations_where_they_set_the_learning_rate(tmp_path: Path) -> None:
    plateau = {**EVALUATED, "lr_scheduler_type": "reduce_lr_on_plateau"}
    assert "eval_steps" in refused(dpo, plateau, {**plateau, "eval_steps": 2}, tmp_path)


def ppo(folder: Path, *, answer: str = "a", text: str = "de", reward: Any = vowels, **options: Any) -> Any:
    """Two steps over prompts with an answer that rewards may ask for."""
    rows = [{"prompt": row["prompt"], "answer": answer} for row in text_rows(8)]
    return ppo_trainer(
        folder,
        reward,
        train_dataset=Dataset.from_list(rows),
        ptx_dataset=[*TEXTS, {"prompt": "qq", "completion": text}],
        **{**OPTIONS, "max_steps": 2, "ptx_coef": 0.1, **options},
    )


def length(completions: list[str], **columns: Any) -> list[float]:
    """Another reward."""
    return [float(len(text)) for text in completions]


def test_other_answers_texts_and_rewards(tmp_path: Path) -> None:
    said = refused(ppo, {}, {"answer": "b"}, tmp_path / "answers")
    assert "a column of the training data" in said
    assert "texts that are mixed in" in refused(ppo, {}, {"text": "zz"}, tmp_path / "texts")
    assert "what rewards completions changed" in refused(ppo, {}, {"reward": length}, tmp_path / "rewards")


def with_optimizer(folder: Path, *, kind: Any = torch.optim.Adam, rate: float = 1e-3) -> DPOTrainer:
    """A whole model, and an optimizer of the caller's."""
    model = tiny_model("llama")
    return DPOTrainer(
        model,
        args=DPOConfig(str(folder), **{**OPTIONS, "max_steps": 2, "per_device_train_batch_size": 2}),
        train_dataset=Dataset.from_list(text_rows(4)),
        processing_class=character_tokenizer(),
        optimizers=(kind(model.parameters(), lr=rate), None),
    )


def test_another_optimizer_of_the_callers(tmp_path: Path) -> None:
    said = refused(with_optimizer, {}, {"kind": torch.optim.AdamW}, tmp_path / "kind")
    assert "the optimizer or the schedule that the caller made changed" in said
    refused(with_optimizer, {}, {"rate": 1e-2}, tmp_path / "rate")


def reward(folder: Path, **options: Any) -> RewardTrainer:
    """Two steps of a reward model."""
    return RewardTrainer(
        tiny_model("llama"),
        args=RewardConfig(str(folder), **{**OPTIONS, "max_steps": 2, "per_device_train_batch_size": 2, **options}),
        train_dataset=Dataset.from_list(text_rows(4)),
        processing_class=character_tokenizer(),
        peft_config=lora(),
    )


KINDS: dict[str, Callable[..., Any]] = {
    "dpo": dpo,
    "reward": reward,
    "ppo": partial(ppo, num_ppo_epochs=1),
    "whole": partial(dpo, is_whole=True),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One of each kind of run."""
    found = {}
    for name, make in KINDS.items():
        folder = tmp_path_factory.mktemp(name)
        make(folder).train()
        found[name] = str(folder / "checkpoint-2")
    return found


@pytest.mark.parametrize("options", [{}, {"weights_only_resume": True}])
@pytest.mark.parametrize(
    ("was", "now"), [("dpo", "ppo"), ("ppo", "dpo"), ("dpo", "reward"), ("reward", "dpo"), ("reward", "ppo")]
)
def test_another_kind_of_trainer(
    was: str, now: str, options: dict[str, Any], checkpoints: dict[str, str], tmp_path: Path
) -> None:
    """The weights alone would not do either, so that nothing says they would."""
    with pytest.raises(CheckpointError) as caught:
        KINDS[now](tmp_path, **options).train(resume_from_checkpoint=checkpoints[was])
    said = str(caught.value)
    assert f"its method was '{was}', and this one's is '{now}'" in said
    assert "Leave resume_from_checkpoint out" in said
    assert ("give this path as the model" in said) == ("reward" not in (was, now))
    assert "weights_only_resume=True" not in said


def test_weights_of_kto_begin_dpo(checkpoints: dict[str, str], tmp_path: Path) -> None:
    """Both are of one trainer."""
    trainer = dpo(tmp_path, weights_only_resume=True, loss_type="kto", max_steps=3)
    trainer.train(resume_from_checkpoint=checkpoints["dpo"])
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer.bin"])
def test_weights_alone_do_without_the_optimizer(name: str, checkpoints: dict[str, str], tmp_path: Path) -> None:
    """By either name: the second is FSDP's."""
    folder = Path(shutil.copytree(checkpoints["dpo"], tmp_path / "checkpoint-2"))
    (folder / "optimizer.pt").rename(folder / name)
    reseal(folder)
    (folder / name).unlink()
    trainer = dpo(tmp_path / "run", weights_only_resume=True, max_steps=3)
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 3


UNSEALED = {
    ("dpo", "whole"): "holds an adapter, and this run trains the model whole",
    ("whole", "dpo"): "holds a model that was trained whole, and this run trains an adapter",
    ("dpo", "reward"): "holds other weights than the adapter 'default' of this run.*score",
    ("reward", "dpo"): "holds other weights than the adapter 'default' of this run.*score",
    ("dpo", "ppo"): "holds no critic.*give this path as the model",
}


@pytest.mark.parametrize(("was", "now"), UNSEALED)
def test_weights_of_another_kind_that_nobody_sealed(
    was: str, now: str, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints[was], tmp_path / "checkpoint-2"))
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=UNSEALED[was, now]):
        KINDS[now](tmp_path / "run", weights_only_resume=True).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("had", [True, False])
def test_a_critic_of_another_kind(had: bool, tmp_path: Path) -> None:
    """A head that reads one adapter's hidden states knows nothing of another's."""
    make = KINDS["ppo"]
    make(tmp_path / "other", value_adapter=had).train()
    with pytest.raises(CheckpointError, match=f"set value_adapter={had}"):
        make(tmp_path / "run", value_adapter=not had, weights_only_resume=True).train(
            resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2")
        )


@pytest.mark.parametrize("is_moving", [True, False])
def test_weights_alone_tell_that_a_moving_reference_is_lost(
    is_moving: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"is_whole": True, "sync_ref_model": is_moving, **({"ref_model_sync_steps": 1} if is_moving else {})}
    dpo(tmp_path / "other", **options).train()
    dpo(tmp_path / "run", weights_only_resume=True, **options).train(str(tmp_path / "other" / "checkpoint-2"))
    assert ("the moving reference, optimizer, random numbers" in caplog.text) == is_moving
