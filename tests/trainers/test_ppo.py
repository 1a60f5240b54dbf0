"""PPOTrainer: what trains and what must not, rewards of every kind, early stop, texts beside episodes, evaluation."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from alignkit.models.load import nf4
from alignkit.models.reward_files import load_reward_model
from alignkit.trainers.ppo import PPOTrainer
from alignkit.trainers.ppo_callbacks import PPOCallback
from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig
from tests.model_factory import tiny_model
from tests.ppo_factory import Gradients, ppo_trainer, prompts, vowels, weights
from tests.tiny_preferences import (
    QUIET,
    assert_close_tensors,
    character_tokenizer,
    lora,
    randomise_adapter,
    text_rows,
    token_rows,
)

QUIET_LOSS = {"vf_coef": 0.0, "kl_coef": 0.0, "whiten_advantages": False}


def nothing(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def restore(trainer: PPOTrainer, start: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name in start:
                parameter.copy_(start[name])


def plain_logps(trainer: PPOTrainer, prompt: list[int], answer: list[int], temperature: float) -> torch.Tensor:
    logits = trainer.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


def lora_gradients(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_" in name}


# --- what trains ---


@pytest.mark.parametrize("own", [False, True])
def test_critic_warm_up_leaves_the_policy_as_it_was(tmp_path: Path, own: bool):
    trainer = ppo_trainer(tmp_path, value_adapter=own, critic_warmup_rollouts=2, max_steps=2, weight_decay=0.1)
    start = weights(trainer)
    trainer.train()
    found = weights(trainer)
    critic = {name for name in start if ".value." in name}
    assert len(critic) == (29 if own else 1)
    assert all(torch.equal(found[name], start[name]) == (name not in critic) for name in start)
    later = ppo_trainer(tmp_path, value_adapter=own, critic_warmup_rollouts=2, max_steps=3)
    later.train()
    found = weights(later)
    assert not any(torch.equal(found[name], start[name]) for name in start)


def test_base_and_reference_stay_bit_identical(tmp_path: Path):
    trainer = ppo_trainer(tmp_path, max_steps=20, num_ppo_epochs=2, value_adapter=True)
    ids, answers = [[70, 71, 72], [80, 81]], [[90, 91, 92], [93, 2]]
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    before = trainer.score(ids, answers)
    trainer.train()
    after = trainer.score(ids, answers)
    assert torch.equal(after.ref_logps, before.ref_logps)
    assert not torch.equal(after.logps, before.logps)
    now = dict(trainer.model.named_parameters())
    assert frozen
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())


def test_a_learning_rate_of_its_own_for_the_critic(tmp_path: Path):
    still = ppo_trainer(tmp_path, value_learning_rate=0.0, value_adapter=True, max_steps=2)
    start = weights(still)
    still.train()
    found = weights(still)
    assert all(torch.equal(found[name], start[name]) == (".value." in name) for name in start)
    assert sorted({group["initial_lr"] for group in still.optimizer.param_groups}) == [0.0, 1e-2]


def test_k2_in_the_loss_has_the_gradient_of_the_divergence(tmp_path: Path):
    """`kl_coef · Σ_i d_i ∇ log π(y_i) / tokens`, with d the log-ratio of whole completions."""
    recorder = Gradients()
    options = {**QUIET_LOSS, "kl_estimator": "k2", "kl_place": "loss", "kl_coef": 0.4, "max_grad_norm": 0.0}
    trainer = ppo_trainer(tmp_path, nothing, callbacks=[recorder], random=False, **options)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight))
    start = weights(trainer)
    trainer.train()
    rollout = trainer.rollout
    restore(trainer, start)
    trainer.model.zero_grad()
    ratios = (rollout.tokens.logps - rollout.tokens.ref_logps).sum(1)
    total = sum(
        ratio * plain_logps(trainer, prompt, completion.ids, 0.7).sum()
        for ratio, prompt, completion in zip(ratios, rollout.prompts.ids, rollout.completions, strict=True)
    )
    (0.4 * total / rollout.mask.sum()).backward()
    assert ratios.abs().max() > 0.1
    found = {name: gradient for name, gradient in recorder.steps[0].items() if "lora_" in name}
    assert_close_tensors(found, lora_gradients(trainer), rtol=1e-4)


def test_rloo_compares_the_completions_of_a_prompt(tmp_path: Path):
    trainer = ppo_trainer(tmp_path, advantage_estimator="rloo", num_generations=3, kl_coef=0.2, whiten_advantages=False)
    trainer.train()
    rollout = trainer.rollout
    kl = (rollout.tokens.logps - rollout.tokens.ref_logps).sum(1)
    totals = (torch.tensor(vowels(rollout.texts)) - 0.2 * kl).view(-1, 3)
    assert not torch.equal(totals, torch.tensor(vowels(rollout.texts)).view(-1, 3))
    for prompt in range(4):
        for number in range(3):
            others = [totals[prompt, other].item() for other in range(3) if other != number]
            row = 3 * prompt + number
            expected = totals[prompt, number].item() - sum(others) / 2
            length = len(rollout.completions[row].ids)
            assert rollout.advantages[row, :length].tolist() == pytest.approx([expected] * length, rel=1e-4)
            assert rollout.advantages[row, length:].tolist() == [0.0] * (7 - length)
    assert not any("value" in name for name in weights(trainer))


def test_the_kl_coefficient_follows_its_target(tmp_path: Path):
    trainer = ppo_trainer(tmp_path, kl_target=1e-3, kl_horizon=40, kl_coef=0.1, max_steps=2)
    trainer.train()
    logs = trainer.state.log_history
    assert [logs[0]["objective/kl_coef"], logs[1]["objective/kl_coef"]] == pytest.approx(
        [0.1, 0.1 * (1 + 0.2 * 4 / 40)]
    )
    assert logs[0]["objective/kl"] > 1.2e-3


def test_early_stop_leaves_weights_and_optimizer_until_the_next_rollout(tmp_path: Path):
    states: list[tuple[dict, dict]] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            moments = {
                k: {n: t.clone() for n, t in s.items()} for k, s in trainer.optimizer.state_dict()["state"].items()
            }
            states.append((weights(trainer), moments))

    trainer = ppo_trainer(
        tmp_path, callbacks=[Keep()], num_ppo_epochs=4, max_steps=8, target_approx_kl=1e-5, weight_decay=0.1
    )
    trainer.train()

    def same(first: int, second: int) -> bool:
        (w1, m1), (w2, m2) = states[first], states[second]
        return all(torch.equal(w1[n], w2[n]) for n in w1) and all(
            torch.equal(m1[k][n], m2[k][n]) for k in m1 for n in m1[k]
        )

    # Steps of a rollout: the first is made at an approximate KL of 0, the second measures it, the rest is skipped.
    assert [same(i, i + 1) for i in range(7)] == [False, True, True, False, False, True, True]
    assert trainer.lr_scheduler.last_epoch == 8
    logs = trainer.state.log_history
    assert "policy/approxkl_avg" in logs[1]
    assert "policy/approxkl_avg" not in logs[2]
    free = ppo_trainer(tmp_path, num_ppo_epochs=4, max_steps=8, target_approx_kl=1e5)
    free.train()
    assert all("policy/approxkl_avg" in log for log in free.state.log_history[:8])


# --- rewards ---


class Watched(PPOTrainer):
    """Keeps the gradients of every chunk's log-probs and values."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, scores = super().compute_loss(model, inputs, True, num_items_in_batch)
        layout = self._passes.lay_out(inputs)
        for tensor in (scores.logps, scores.values):
            tensor.retain_grad()
        mask = inputs["mask"].flatten(0, 1)[layout.sequence_index, layout.completion_position]
        self.__dict__.setdefault("seen", []).append((mask, scores))
        return (loss, scores) if return_outputs else loss


@pytest.mark.parametrize("whitened", [False, True])
def test_dropped_samples_have_no_gradient_and_no_say(tmp_path: Path, whitened: bool):
    def picky(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if i == 2 else float(len(text)) for i, text in enumerate(completions)]

    trainer = ppo_trainer(
        tmp_path, picky, kind=Watched, on_reward_error="drop", normalize_rewards=True, whiten_advantages=whitened
    )
    trainer.train()
    ((mask, scores),) = trainer.seen
    assert 0 < mask.sum() < len(mask)
    for tensor in (scores.logps, scores.values):
        assert tensor.grad[~mask].abs().max() == 0
        assert (tensor.grad[mask] != 0).float().mean() > 0.7
    log = trainer.state.log_history[0]
    assert log["rewards/dropped"] == 1
    assert trainer.ppo_state.moments.count == 3
    assert trainer.rollout.rewards.kept.tolist() == [True, True, False, True]


def test_functions_see_columns_conversations_and_the_state(tmp_path: Path):
    seen: list[dict[str, Any]] = []

    async def slow(completions: Any, answer: list[str], **rest: Any) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(text) + len(wanted)) for text, wanted in zip(completions, answer, strict=True)]

    def watch(prompts: Any, completions: Any, prompt_ids: Any, completion_ids: Any, trainer_state: Any, **rest: Any):
        seen.append(
            {"prompts": prompts, "ids": completion_ids, "step": trainer_state.global_step, **rest, "texts": completions}
        )
        return [1.0] * len(prompts)

    rows = [{"prompt": row["prompt"], "answer": "x" * i, "more": {"a": i}} for i, row in enumerate(text_rows(8))]
    trainer = ppo_trainer(
        tmp_path, [slow, watch], train_dataset=rows, reward_weights=[0.5, 2.0], max_steps=2, num_generations=2
    )
    trainer.train()
    assert [call["step"] for call in seen] == [0, 1]
    call = seen[1]
    assert call["prompts"] == [p for p in trainer.rollout.prompts.sources for _ in range(2)]
    assert [len(a) for a in call["answer"]] == [m["a"] for m in call["more"]]
    expected = [0.5 * (len(t) + len(a)) + 2.0 for t, a in zip(call["texts"], call["answer"], strict=True)]
    assert trainer.rollout.rewards.totals.tolist() == pytest.approx(expected)
    log = trainer.state.log_history[1]
    assert log["rewards/watch"] == 1.0
    assert log["rewards/slow"] == pytest.approx(sum((e - 2) / 0.5 for e in expected) / 8)
    assert log["objective/scores"] == pytest.approx(sum(expected) / 8)


def reward_run(folder: Path, **options: Any) -> RewardTrainer:
    settings = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, **options}
    trainer = RewardTrainer(
        tiny_model("llama"),
        RewardConfig(str(folder), activation_checkpointing=False, **{**QUIET, **settings}),
        train_dataset=Dataset.from_list(token_rows(8)),
        processing_class=character_tokenizer(),
        peft_config=lora(task_type="SEQ_CLS"),
    )
    randomise_adapter(trainer.model)
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.parametrize("heads", [1, 3])
def test_a_reward_adapter_on_the_same_base(tmp_path: Path, heads: int):
    reward_run(tmp_path / "reward", num_heads=heads)
    trainer = ppo_trainer(
        tmp_path / "ppo",
        [str(tmp_path / "reward"), vowels],
        max_steps=3,
        value_adapter=True,
        activation_checkpointing=True,
    )
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert any("reward_0" in name for name in frozen)
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    rollout = trainer.rollout
    found = rollout.rewards.components["reward"].values
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    config = (tmp_path / "reward" / "adapter_config.json").read_text()
    (tmp_path / "reward" / "adapter_config.json").write_text(
        config.replace('"base_model_name_or_path": ""', f'"base_model_name_or_path": "{base}"').replace(
            '"base_model_name_or_path": null', f'"base_model_name_or_path": "{base}"'
        )
    )
    model = load_reward_model(tmp_path / "reward", dtype=torch.float32, device=torch.device("cpu")).model
    for row, (prompt, completion) in enumerate(zip(rollout.prompts.ids, rollout.completions, strict=True)):
        with torch.no_grad():
            expected = model(torch.tensor([prompt + completion.ids])).logits.mean()
        assert found[row].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert found.std() > 1e-3
    trainer.save_model(str(tmp_path / "saved"))
    assert not [path for path in (tmp_path / "saved").iterdir() if path.is_dir()]


def test_penalties_and_clipping_reach_the_scores(tmp_path: Path):
    options = {"missing_eos_penalty": 2.0, "overlong_buffer_tokens": 3, "overlong_penalty": 1.5, "reward_clip": 1.0}
    trainer = ppo_trainer(tmp_path, lambda completions, **k: [5.0] * len(completions), num_generations=6, **options)
    trainer.train()
    rollout = trainer.rollout
    ended = [completion.finished for completion in rollout.completions]
    assert any(ended)
    assert not all(ended)
    for completion, score in zip(rollout.completions, rollout.scores.tolist(), strict=True):
        overlong = min(max((len(completion.ids) - 4) / 3, 0), 1) * 1.5
        assert score == pytest.approx(1.0 - overlong - (0 if completion.finished else 2.0))
    assert trainer.state.log_history[0]["rewards/clip_fraction"] == 1.0


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


def _quantized() -> Any:
    def build(**arguments: Any) -> PPOTrainer:
        return PPOTrainer(**arguments, quantization_config=nf4(torch.float32))

    return build
