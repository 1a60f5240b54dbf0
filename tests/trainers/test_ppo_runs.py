"""PPOTrainer beyond its loss: texts beside episodes, evaluation, events, metrics, a 4-bit base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from alignkit.errors import ConfigError
from alignkit.models.load import nf4
from alignkit.trainers.ppo import PPOTrainer
from alignkit.trainers.ppo_callbacks import PPOCallback
from tests.model_factory import tiny_model
from tests.ppo_factory import (
    QUIET_LOSS,
    Gradients,
    lora_gradients,
    nothing,
    plain_logps,
    ppo_trainer,
    prompts,
    restore,
    vowels,
    weights,
)
from tests.tiny_preferences import (
    assert_close_tensors,
)

# --- texts beside episodes ---

TEXTS = {
    "prompts with completions": [{"prompt": "abc", "completion": "de"}, {"prompt": "xy", "completion": "zzzz"}],
    "preferences": [
        {"prompt": "abc", "chosen": "de", "rejected": "q"},
        {"prompt": "xy", "chosen": "zzzz", "rejected": "zq"},
    ],
    "labels": [
        {"prompt": "abc", "completion": "de", "label": True},
        {"prompt": "xy", "completion": "zzzz", "label": True},
        {"prompt": "xy", "completion": "bad", "label": False},
    ],
}


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("as_dataset", [False, True])
def test_texts_add_the_gradient_of_their_mean_log_prob(tmp_path: Path, texts: list, as_dataset: bool):
    given: Any = Dataset.from_list(texts) if as_dataset else texts
    recorder, options = Gradients(), {**QUIET_LOSS, "max_grad_norm": 0.0, "ptx_coef": 0.3}
    trainer = ppo_trainer(tmp_path, nothing, callbacks=[recorder], ptx_dataset=given, **options)
    trainer.bundle.base.get_submodule("value").weight.data.zero_()  # else there would be advantages
    start = weights(trainer)
    trainer.train()
    restore(trainer, start)
    trainer.model.zero_grad()
    batch = trainer._texts.batches(0, 1)[0]
    assert batch["lengths"].shape == (4, 2)
    at, total, count, seen = 0, torch.zeros(()), 0, set()
    for prompt, answer in batch["lengths"].tolist():
        ids = batch["input_ids"][at : at + prompt + answer].tolist()
        at += prompt + answer
        seen.add("".join(trainer.processing_class.convert_ids_to_tokens(ids)))
        total, count = total + plain_logps(trainer, ids[:prompt], ids[prompt:], 1.0).sum(), count + answer
    assert seen == {"abcde</s>", "xyzzzz</s>"}
    (-0.3 * total / count).backward()
    found = {name: gradient for name, gradient in recorder.steps[0].items() if "lora_" in name}
    assert_close_tensors(found, lora_gradients(trainer), rtol=1e-4)


def test_texts_do_not_depend_on_how_a_step_is_split(tmp_path: Path):
    steps = []
    for size, accumulation, budget in ((4, 1, None), (2, 2, None), (4, 1, 12)):
        recorder = Gradients()
        ppo_trainer(
            tmp_path,
            callbacks=[recorder],
            ptx_dataset=TEXTS["preferences"],
            ptx_coef=0.3,
            max_grad_norm=0.0,
            max_tokens_per_forward=budget,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        ).train()
        steps.append(recorder.steps[0])
    assert_close_tensors(steps[1], steps[0], rtol=1e-5)
    assert_close_tensors(steps[2], steps[0], rtol=1e-5)


# --- evaluation and events ---


def test_evaluation_is_greedy_and_leaves_training_alone(tmp_path: Path):
    held_out = {"short": prompts(3, seed=3), "long": prompts(5, seed=4)}
    trainer = ppo_trainer(tmp_path, eval_dataset=held_out, eval_strategy="steps", eval_steps=1, max_steps=2)
    trainer.train()
    silent = ppo_trainer(tmp_path, max_steps=2)
    silent.train()
    assert_close_tensors(weights(trainer), weights(silent), rtol=1e-7)
    metrics = trainer.evaluate()
    assert metrics == trainer.evaluate()
    assert {f"eval_{name}_{metric}" for name in held_out for metric in ("reward", "kl", "mean_length", "eos_rate")} <= (
        set(metrics)
    )
    only = trainer.evaluate([{"prompt": text} for text in held_out["short"]["prompt"]])
    assert only["eval_reward"] == metrics["eval_short_reward"]
    greedy, logits = [], None
    row = trainer.eval_dataset["short"]
    for prompt in row["prompt_ids"]:
        ids: list[int] = []
        while len(ids) < 7 and (not ids or ids[-1] != 2):
            with torch.no_grad():
                logits = trainer.model(torch.tensor([prompt + ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
        greedy.append(trainer.processing_class.decode(ids, skip_special_tokens=True))
    assert metrics["eval_short_reward"] == pytest.approx(sum(vowels(greedy)) / 3)


def test_events_come_in_order_and_to_their_own_kind_alone(tmp_path: Path):
    heard: list[str] = []

    class Mine(PPOCallback):
        def on_rollout_begin(self, *a: Any, **k: Any) -> None:
            heard.append("begin")

        def on_rewards(self, *a: Any, **k: Any) -> None:
            heard.append("rewards")

        def on_values(self, *a: Any, **k: Any) -> None:
            heard.append("values")

        def on_rollout_end(self, *a: Any, **k: Any) -> None:
            heard.append("end")

        def on_minibatch_end(self, *a: Any, **k: Any) -> None:
            heard.append("minibatch")

    class Stock(TrainerCallback):
        def on_rollout_begin(self, *a: Any, **k: Any) -> None:
            heard.append("stock")

    ppo_trainer(
        tmp_path,
        callbacks=[Mine(), Stock()],
        num_ppo_epochs=2,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    ).train()
    assert heard == ["begin", "rewards", "values", "end", "minibatch", "minibatch"] * 2


def test_each_rollout_has_prompts_and_samples_of_its_own(tmp_path: Path):
    taken: list[tuple[list, list]] = []

    class Keep(PPOCallback):
        def on_rollout_end(self, *a: Any, rollout: Any, **k: Any) -> None:
            taken.append((rollout.prompts.sources, [c.ids for c in rollout.completions]))

    data = prompts(8)
    trainer = ppo_trainer(tmp_path, callbacks=[Keep()], train_dataset=data, max_steps=4, learning_rate=0.0)
    trainer.train()
    for epoch in (0, 2):
        assert sorted(taken[epoch][0] + taken[epoch + 1][0]) == sorted(data["prompt"])
    first, second = ({p: c for s, cs in taken[i : i + 2] for p, c in zip(s, cs, strict=True)} for i in (0, 2))
    assert all(first[prompt] != second[prompt] for prompt in first)  # another rollout draws other samples
    assert trainer.state.log_history[-2]["episode"] == 16


def test_the_metrics_of_a_run(tmp_path: Path):
    trainer = ppo_trainer(tmp_path, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert {"objective/kl", "policy/approxkl_avg", "loss/value_avg", "val/ratio", "val/explained_variance"} <= set(log)
    assert log["val/ratio"] == 1.0
    assert log["policy/approxkl_avg"] == 0.0
    assert all(math.isfinite(value) for value in log.values())


def test_a_four_bit_base(tmp_path: Path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder = tmp_path / "base"
    tiny_model("llama").save_pretrained(folder)
    trainer = ppo_trainer(
        tmp_path,
        kind=_quantized(),
        model=str(folder),
        max_steps=3,
        num_ppo_epochs=1,
        eval_dataset=prompts(2),
        eval_strategy="steps",
        eval_steps=1,
        activation_checkpointing=True,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    start = weights(trainer)
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert any(tensor.dtype == torch.uint8 for tensor in frozen.values())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    assert all(not torch.equal(now[name], tensor) for name, tensor in start.items())
    assert all(log["grad_norm"] > 0 for log in trainer.state.log_history if "grad_norm" in log)
    assert trainer.state.log_history[0]["val/ratio"] == 1.0


def test_merged_copies_are_refused_on_a_quantized_base(tmp_path: Path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="rollout_engine='merged' needs a 16- or 32-bit base"):
        ppo_trainer(tmp_path, kind=_quantized(), model=str(tmp_path / "base"), rollout_engine="merged")


def test_merged_copies_give_the_rollouts_of_the_adapter(tmp_path: Path):
    found = {}
    for engine in ("hf", "merged"):
        trainer = ppo_trainer(tmp_path / engine, rollout_engine=engine, max_steps=4, learning_rate=1e-2)
        base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
        assert trainer._engine.merge_adapters == (engine == "merged")
        trainer.train()
        now = dict(trainer.model.named_parameters())
        assert all(torch.equal(now[name], tensor) for name, tensor in base.items())
        found[engine] = [completion.ids for completion in trainer.rollout.completions]
        assert trainer.state.log_history[0]["val/ratio"] == 1.0
    assert found["merged"] == found["hf"]


def _quantized() -> Any:
    def build(**arguments: Any) -> PPOTrainer:
        return PPOTrainer(**arguments, quantization_config=nf4(torch.float32))

    return build
