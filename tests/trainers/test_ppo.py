"""PPOTrainer: what trains and what must not, rewards of every kind, early stop, texts beside episodes, evaluation."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from alignkit.models.reward_files import load_reward_model
from alignkit.trainers.ppo import PPOTrainer
from alignkit.trainers.ppo_callbacks import PPOCallback
from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig
from tests.model_factory import tiny_model
from tests.ppo_factory import (
    QUIET_LOSS,
    Gradients,
    lora_gradients,
    nothing,
    plain_logps,
    ppo_trainer,
    restore,
    scaling_on_a_cpu,
    vowels,
    weights,
)
from tests.tiny_preferences import (
    QUIET,
    assert_close_tensors,
    character_tokenizer,
    lora,
    randomise_adapter,
    text_rows,
    token_rows,
)

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


@pytest.mark.parametrize("target", [1e-5, None])
def test_a_gradient_scaler_changes_nothing_and_lets_skipped_steps_pass(tmp_path: Path, target: float | None):
    """As in fp16 on CUDA. Powers of two scale fp32 exactly, so every weight is that of a run without a scaler."""
    options = {"num_ppo_epochs": 4, "max_steps": 8, "target_approx_kl": target, "weight_decay": 0.1}
    plain = ppo_trainer(tmp_path, **options)
    plain.train()
    with scaling_on_a_cpu():
        scaled = ppo_trainer(tmp_path, **options)
        scaled.train()
    found = weights(scaled)
    assert all(torch.equal(found[name], weight) for name, weight in weights(plain).items())
    assert scaled.lr_scheduler.last_epoch == 8
    made = 8 if target is None else 4  # of each rollout's four steps the last two are skipped
    assert scaled.accelerator.scaler.state_dict()["_growth_tracker"] == made
    assert scaled.accelerator.scaler is scaled.optimizer.scaler


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


class CopiesOfTheBase(PPOCallback):
    """Counts, whenever something has happened, the tensors in memory that hold a copy of a weight of the base."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.counts = weight, set[int]()

    def _count(self, *_: Any, **__: Any) -> None:
        # By type(): isinstance would ask objects that warn about their class.
        tensors: list[Any] = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
        same = [each for each in tensors if each.shape == self.weight.shape and torch.equal(each, self.weight)]
        self.counts.add(len({each.data_ptr() for each in same}))

    on_rewards = on_values = on_minibatch_end = on_evaluate = on_train_end = _count


@pytest.mark.parametrize("control", [False, True])
def test_four_roles_keep_one_copy_of_the_base(tmp_path: Path, control: bool):
    reward_run(tmp_path / "reward")
    model = tiny_model("llama", seed=77 + control)  # weights that no other test leaves in memory
    trainer = ppo_trainer(tmp_path / "ppo", [str(tmp_path / "reward")], model=model, max_steps=2, value_adapter=True)
    weight = trainer.bundle.base.get_submodule("model.layers.0.mlp.gate_proj.base_layer").weight
    census = CopiesOfTheBase(weight)
    trainer.add_callback(census)
    copy = weight.detach().clone() if control else None  # what a second base would look like
    trainer.train()
    assert census.counts == {1 if copy is None else 2}


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
