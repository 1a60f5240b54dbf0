"""RewardTrainer: one gradient however it is computed, files that load, runs that resume, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from alignkit.errors import ConfigError, DataError
from alignkit.functional.reward import bradley_terry
from alignkit.models.bundle import REWARD
from alignkit.models.reward_files import load_reward_model
from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig
from tests.model_factory import tiny_model
from tests.tiny_preferences import (
    QUIET,
    RecordGradients,
    adapter_weights,
    assert_close_tensors,
    character_tokenizer,
    lora,
    randomise_adapter,
    text_rows,
    token_rows,
)

PAIRS = 8
CPU = torch.device("cpu")


def rows(count: int = PAIRS, seed: int = 0) -> list[dict[str, Any]]:
    made = token_rows(count, seed=seed)
    for i, row in enumerate(made):
        row |= {"weight": 0.5 + i % 3, "margin": 0.1 * (i % 4)}
    return made


def build(folder: Path, data: list[dict[str, Any]] | None = None, **options: Any) -> RewardTrainer:
    """A trainer on a tiny Llama; `peft_config`, `model` and the like go to the trainer, the rest to its options."""
    names = ("model", "peft_config", "eval_dataset", "processing_class", "callbacks", "train_dataset")
    ours = {name: options.pop(name) for name in names if name in options}
    settings = {
        "per_device_train_batch_size": PAIRS,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "activation_checkpointing": False,
        "max_tokens_per_forward": None,
        "logging_steps": 1,
        "adam_epsilon": 1e-4,
    }
    arguments = {
        "model": tiny_model("llama"),
        "train_dataset": Dataset.from_list(data or rows()),
        "processing_class": character_tokenizer(),
        "peft_config": lora(),
        **ours,
    }
    return RewardTrainer(args=RewardConfig(str(folder / "run"), **{**settings, **QUIET, **options}), **arguments)


def steps(folder: Path, data: list[dict[str, Any]] | None = None, **options: Any) -> tuple[list, RewardTrainer]:
    """Train two steps; return the gradients that the optimizer was given."""
    recorder = RecordGradients()
    trainer = build(folder, data, callbacks=[recorder], **options)
    randomise_adapter(trainer.model)
    trainer.train()
    assert len(recorder.steps) == 2
    assert all(gradient.abs().max() > 0 for step in recorder.steps for gradient in step.values())
    return recorder.steps, trainer


def logged(trainer: RewardTrainer) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "ensemble/std")
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: entry[name] for name in names if name in entry} for entry in entries]


OBJECTIVES = {
    "plain": {},
    "everything": {"label_smoothing": 0.1, "center_rewards_coefficient": 0.05, "num_heads": 3},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "way",
    [
        {"max_tokens_per_forward": 1},
        {"max_tokens_per_forward": 60},
        {"layout": "packed"},
        {"layout": "padded", "pad_to_multiple_of": 16},
        {"activation_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
        {"activation_offloading": True},
    ],
    ids=str,
)
def test_one_gradient_however_it_is_computed(way, objective, tmp_path):
    expected, plain = steps(tmp_path, **OBJECTIVES[objective])
    found, trainer = steps(tmp_path, **OBJECTIVES[objective], **way)
    for gradients, wanted in zip(found, expected, strict=True):
        assert_close_tensors(gradients, wanted, rtol=1e-5)
    for entry, wanted in zip(logged(trainer), logged(plain), strict=True):
        assert entry == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert trainer._passes.layout == way.get("layout", "prefix_shared")


def test_the_gradient_is_that_of_the_written_loss(tmp_path):
    """Against the whole-batch loss of the rewards, weighted row by row, by autograd."""
    options = OBJECTIVES["everything"]
    found, _ = steps(tmp_path, **options)
    trainer = build(tmp_path, **options)
    randomise_adapter(trainer.model)
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    layout = trainer._lay_out(batch)
    rewards = trainer.bundle.values(layout, layout.last_index, role=REWARD)
    losses = bradley_terry(
        rewards[0::2], rewards[1::2], margin=batch["margin"], label_smoothing=0.1, center_coef=0.05
    ).losses
    weights = adapter_weights(trainer.model)
    gradients = torch.autograd.grad((batch["weight"] * losses).mean(), list(weights.values()))
    assert_close_tensors(found[0], dict(zip(weights, gradients, strict=True)), rtol=1e-5)


@pytest.mark.parametrize("column", ["weight", "margin"])
def test_columns_reach_the_loss(column, tmp_path):
    plain = [{name: value for name, value in row.items() if name != column} for row in rows()]
    with_column, without = (steps(tmp_path / name, data)[0] for name, data in (("a", rows()), ("b", plain)))
    name = next(iter(with_column[0]))
    assert not torch.allclose(with_column[0][name], without[0][name], rtol=1e-2, atol=0)


def test_training_learns_a_rule(tmp_path):
    """Completions with an "a" are better: held-out pairs are ranked right after a few steps."""

    def pairs(count: int, seed: int) -> list[dict[str, str]]:
        return [
            {"prompt": row["prompt"], "chosen": "aaaa" + row["chosen"], "rejected": "zzzz" + row["rejected"]}
            for row in text_rows(count, seed=seed)
        ]

    trainer = build(
        tmp_path,
        pairs(32, 0),
        max_steps=30,
        eval_dataset=Dataset.from_list(pairs(16, 1)),
        adam_epsilon=1e-8,
        num_heads=2,
    )
    before, _ = trainer.evaluate(), trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] == 1.0
    assert after["eval_accuracy_low"] == pytest.approx(0.806, abs=1e-3)
    assert after["eval_accuracy_high"] == 1.0
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert {"eval_calibration_error", "eval_ensemble/std", "eval_mean_reward"} <= after.keys()


def test_evaluation_in_chunks_and_predictions(tmp_path):
    held_out = Dataset.from_list(rows(6, seed=3))
    whole = build(tmp_path, num_heads=2)
    pieces = build(tmp_path, num_heads=2, max_tokens_per_forward=30)
    for trainer in (whole, pieces):
        randomise_adapter(trainer.model)
    expected, found = whole.predict(held_out), pieces.predict(held_out)
    chosen, rejected = expected.predictions
    assert chosen.shape == rejected.shape == (6, 2)
    for one, other in zip(expected.predictions, found.predictions, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-6)
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)
    assert expected.metrics["test_margin"] == pytest.approx((chosen - rejected).mean(), rel=1e-5)
    batch = whole.data_collator(list(held_out))
    losses = bradley_terry(torch.tensor(chosen), torch.tensor(rejected), margin=batch["margin"]).losses
    assert expected.metrics["test_loss"] == pytest.approx((losses * batch["weight"]).mean().item(), rel=1e-5)


# --- files ---


def classifier_rewards(folder: Path, data: Dataset) -> Tensor:
    model = load_reward_model(folder, dtype=torch.float32, device=CPU).model
    found = []
    for row in data:
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            with torch.no_grad():
                found.append(model(input_ids=ids).logits[0])
    return torch.stack(found)


@pytest.mark.parametrize("trained", ["adapter", "whole"])
def test_what_is_saved_gives_the_trainers_rewards(trained, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    options = {"peft_config": lora()} if trained == "adapter" else {"peft_config": None}
    trainer = build(tmp_path, model=tmp_path / "base", num_heads=2, layout="padded", **options)
    trainer.train()
    trainer.save_model()
    chosen, rejected = trainer.predict(trainer.train_dataset).predictions
    found = classifier_rewards(tmp_path / "run", trainer.train_dataset)
    torch.testing.assert_close(found[0::2], torch.tensor(chosen), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1::2], torch.tensor(rejected), rtol=1e-5, atol=1e-5)
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "load_reward_model" in card
    assert ("PeftModel" in card) == (trained == "adapter")


@pytest.mark.parametrize("trained", ["adapter", "whole"])
def test_a_run_resumes_where_it_was(trained, tmp_path):
    """Head, adapter and optimizer: four steps equal two and two."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {
        "peft_config": lora() if trained == "adapter" else None,
        "model": tmp_path / "base",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "train_sampling_strategy": "random",
    }
    straight = build(tmp_path / "straight", **options)
    straight.train()
    again = build(tmp_path / "straight", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "straight" / "run" / "checkpoint-2"))
    expected, found = (dict(adapter_weights(trainer.model)) for trainer in (straight, again))
    assert any("score" in name for name in expected)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    wanted, got = ([entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (straight, again))
    assert got == wanted


def test_training_goes_on_from_an_adapter(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    first = build(tmp_path, model=tmp_path / "base", num_heads=2)
    first.train()
    first.save_model()
    second = build(tmp_path / "second", model=tmp_path / "run", peft_config=None, num_heads=2)
    assert isinstance(second.model, PeftModel)
    expected, found = (trainer.predict(first.train_dataset).predictions[0] for trainer in (first, second))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    second.train()
    second.save_model()
    assert (second.predict(first.train_dataset).predictions[0] != expected).all()
    load_reward_model(tmp_path / "second" / "run", dtype=torch.float32, device=CPU)


def test_the_callers_things_stay_as_they_were(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    config, args = lora(), RewardConfig(str(tmp_path / "run"), **QUIET)
    trainer = RewardTrainer(
        tiny_model("llama"), args, None, Dataset.from_list(rows()), processing_class=tokenizer, peft_config=config
    )
    assert tokenizer.pad_token == tokenizer.eos_token
    assert trainer.processing_class.pad_token == "<s>"
    assert config.task_type == "CAUSAL_LM"
    assert trainer.args is not args


# --- options and bad input ---


def test_long_rows_are_dropped_and_counted(tmp_path):
    data = [*text_rows(9), {"prompt": "long", "chosen": "b" * 40, "rejected": "c"}]
    trainer = build(tmp_path, data, max_length=30)
    assert len(trainer.train_dataset) == 9
    (reason,) = trainer.reports["train"].drops
    assert reason.value == "longer than max_length"
    with pytest.raises(DataError, match="longer than max_length"):
        build(tmp_path, [data[-1], data[0], {**data[-1], "rejected": "d"}], max_length=30)


def test_eos_token_and_template(tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '!' }}{% endfor %}")
    chat = [
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
    ]
    trainer = build(tmp_path, chat, chat_template_path=str(template))
    assert trainer.processing_class.decode(trainer.train_dataset[0]["chosen_ids"]).replace(" ", "") == "a:yes!"
    trainer = build(tmp_path, text_rows(4), eos_token="~")
    assert trainer.train_dataset[0]["chosen_ids"][-1] == ord("~")
    with pytest.raises(ConfigError, match=r"eos_token='</t>' is not in the tokenizer's vocabulary"):
        build(tmp_path, eos_token="</t>")
    with pytest.raises(ConfigError, match=r"chat_template_path='.*missing\.jinja' cannot be read"):
        build(tmp_path, chat_template_path=str(tmp_path / "missing.jinja"))


def test_a_template_of_another_tokenizer(tmp_path):
    other = character_tokenizer()
    other.save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="has no chat template"):
        build(tmp_path, chat_template_path=str(tmp_path / "bare"))
    other.add_tokens(["<turn>"])
    other.chat_template = "{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}"
    other.save_pretrained(tmp_path / "more")
    with pytest.raises(ConfigError, match=r"its template writes \['<turn>'\]"):
        build(tmp_path, chat_template_path=str(tmp_path / "more"))
