"""What must be the same in PPO however it is computed: scored or trained, split or whole, shared or padded, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from alignkit.models.adapters import peft_warnings
from tests.model_factory import tiny_model
from tests.ppo_factory import WatchedTrainer, ppo_trainer, weights
from tests.tiny_preferences import RecordGradients, assert_close_tensors

SCORED: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"max_tokens_per_forward": 24},
    "three completions": {"num_generations": 3},
    "three completions in chunks": {"num_generations": 3, "max_tokens_per_forward": 30},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_mini_batches": 2},
    "checkpointing": {"activation_checkpointing": True},
    "a critic of its own": {"value_adapter": True, "activation_checkpointing": True},
    "padded": {"layout": "padded"},
    "hot": {"temperature": 1.7},
    "rloo": {"advantage_estimator": "rloo", "num_generations": 2},
}


@pytest.mark.parametrize("options", SCORED.values(), ids=SCORED)
def test_the_first_importance_ratio_is_exactly_one(tmp_path: Path, options: dict[str, Any]):
    trainer = ppo_trainer(tmp_path, kind=WatchedTrainer, num_ppo_epochs=2, max_steps=4, **options)
    trainer.train()
    first = [(scores, columns) for scores, columns, step in trainer.seen if step == 0]
    later = [(scores, columns) for scores, columns, step in trainer.seen if step > 0]
    assert first
    assert later
    if "max_tokens_per_forward" in options:
        assert len(first) > 1
    for scores, columns in first:
        assert torch.equal(scores.logps, columns["old_logps"])
        if scores.values is not None:
            assert torch.equal(scores.values, columns["old_values"])
            assert scores.values.abs().max() > 0.01
        assert not torch.equal(columns["ref_logps"], columns["old_logps"])
    assert any(not torch.equal(scores.logps, columns["old_logps"]) for scores, columns in later)


def first_gradients(folder: Path, **options: Any) -> dict[str, Tensor]:
    recorder = RecordGradients()
    trainer = ppo_trainer(folder, callbacks=[recorder], max_grad_norm=0.0, **options)
    trainer.train()
    return recorder.steps[0]


SPLIT: dict[str, dict[str, Any]] = {
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "chunks": {"max_tokens_per_forward": 24},
    "both": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_tokens_per_forward": 12},
    "padded": {"layout": "padded"},
    "packed": {"layout": "packed"},
    "checkpointing": {"activation_checkpointing": True},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ppo": {"entropy_coef": 0.03},
    "a critic of its own": {"value_adapter": True, "whiten_rewards": True},
    "k2 in the loss": {
        "kl_estimator": "k2",
        "kl_place": "loss",
        "whiten_advantages": False,
        "kl_coef": 0.5,
        "num_generations": 2,
    },
    "rloo": {"advantage_estimator": "rloo", "num_generations": 3},
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_one_batch_equals_its_parts_in_any_layout(tmp_path: Path, objective: dict[str, Any]):
    whole = first_gradients(tmp_path, **objective)
    assert all(gradient.abs().max() > 0 for gradient in whole.values())
    for options in SPLIT.values():
        assert_close_tensors(first_gradients(tmp_path, **objective, **options), whole, rtol=1e-5)
    other = first_gradients(tmp_path, **objective, kl_coef=0.7) if "kl_place" not in objective else None
    if other is not None:  # a difference would be seen
        with pytest.raises(AssertionError):
            assert_close_tensors(other, whole, rtol=1e-5)


def test_an_own_critic_is_worth_what_the_trunk_is_where_their_weights_agree(tmp_path: Path):
    trunk = ppo_trainer(tmp_path)
    own = ppo_trainer(tmp_path, value_adapter=True)
    values = dict(trunk.model.named_parameters())
    with torch.no_grad():
        for name, weight in own.model.named_parameters():
            if weight.requires_grad:
                weight.copy_(values[name.replace(".value.", ".default.") if "lora_" in name else name])
    ids, completions = [[70, 71, 72], [80, 81]], [[90, 91, 92], [93, 2]]
    one, two = trunk.score(ids, completions), own.score(ids, completions)
    torch.testing.assert_close(two.values, one.values, rtol=1e-5, atol=1e-6)
    assert torch.equal(two.logps, one.logps)
    with torch.no_grad():
        dict(own.model.named_parameters())["base_model.model.model.layers.0.mlp.up_proj.lora_B.value.weight"].add_(0.1)
    moved = own.score(ids, completions)
    assert torch.equal(moved.logps, one.logps)
    assert (moved.values - one.values).abs().max() > 1e-3


# --- the whole computation, by hand ---


class Snapshots(TrainerCallback):
    """Saves the policy, and keeps the value head, before every optimizer step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.heads = folder, []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.save_pretrained(str(self.folder / str(state.global_step)))
        self.heads.append(model.get_base_model().value.weight.detach().clone())


def plain(folder: Path | None, head: Tensor, episodes: list[tuple[list[int], list[int]]], temperature: float):
    """Log-probs, values and entropies `(B, T)` out of transformers' logits on a batch that is padded by hand."""
    model: Any = tiny_model("llama")
    model.set_attn_implementation("eager")
    if folder is not None:
        with peft_warnings():
            model = PeftModel.from_pretrained(model, str(folder)).eval()
    width = max(len(prompt) + len(answer) for prompt, answer in episodes)
    ids = torch.tensor([[*prompt, *answer, *[0] * (width - len(prompt) - len(answer))] for prompt, answer in episodes])
    lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in episodes])
    with torch.no_grad():
        out = model(ids, attention_mask=(torch.arange(width) < lengths[:, None]).long(), output_hidden_states=True)
    every = torch.log_softmax(out.logits / temperature, -1)
    values = out.hidden_states[-1] @ head[0]
    steps = max(len(answer) for _, answer in episodes)
    table = torch.zeros(3, len(episodes), steps)
    for row, (prompt, answer) in enumerate(episodes):
        for t, token in enumerate(answer):
            before = every[row, len(prompt) + t - 1]
            table[:, row, t] = torch.stack(
                [before[token], values[row, len(prompt) + t - 1], -(before.exp() * before).sum()]
            )
    return table


def test_the_loss_is_that_of_a_plain_computation(tmp_path: Path):
    snapshots = Snapshots(tmp_path / "steps")
    options = {"temperature": 0.8, "kl_coef": 0.3, "gamma": 0.97, "lam": 0.9, "entropy_coef": 0.02, "vf_coef": 0.4}
    trainer = ppo_trainer(
        tmp_path, callbacks=[snapshots], num_ppo_epochs=2, max_steps=2, cliprange=0.1, cliprange_value=0.05, **options
    )
    trainer.train()
    rollout = trainer.rollout
    episodes = [(p, c.ids) for p, c in zip(rollout.prompts.ids, rollout.completions, strict=True)]
    scores = [sum(letter in "aeiouAEIOU" for letter in text) + 0.1 * len(text) for text in rollout.texts]
    old_logps, old_values, _ = plain(tmp_path / "steps" / "0", snapshots.heads[0], episodes, 0.8)
    ref_logps, _, _ = plain(None, snapshots.heads[0], episodes, 0.8)
    advantages, returns = torch.zeros_like(old_logps), torch.zeros_like(old_logps)
    for row, (_, answer) in enumerate(episodes):
        later = next_value = 0.0
        for t in reversed(range(len(answer))):
            reward = -0.3 * (old_logps[row, t] - ref_logps[row, t]) + (scores[row] if t == len(answer) - 1 else 0.0)
            later = reward + 0.97 * next_value - old_values[row, t] + 0.97 * 0.9 * later
            next_value = old_values[row, t]
            advantages[row, t], returns[row, t] = later, later + old_values[row, t]
    tokens = [(row, t) for row, (_, answer) in enumerate(episodes) for t in range(len(answer))]
    flat = torch.stack([advantages[at] for at in tokens])
    white = (advantages - flat.mean()) / math.sqrt(flat.var(correction=0) + 1e-8)
    for step, log in enumerate(trainer.state.log_history[:2]):
        logps, values, entropies = plain(tmp_path / "steps" / str(step), snapshots.heads[step], episodes, 0.8)
        policy = value = entropy = 0.0
        for at in tokens:
            ratio = (logps[at] - old_logps[at]).exp()
            policy += max(-white[at] * ratio, -white[at] * min(max(ratio, 0.9), 1.1)) / len(tokens)
            near = min(max(values[at], old_values[at] - 0.05), old_values[at] + 0.05)
            value += max((values[at] - returns[at]) ** 2, (near - returns[at]) ** 2) / 2 / len(tokens)
            entropy += entropies[at] / len(tokens)
        assert log["loss/policy_avg"] == pytest.approx(policy.item(), rel=1e-4, abs=1e-5)
        assert log["loss/value_avg"] == pytest.approx(value.item(), rel=1e-5, abs=1e-5)
        assert log["loss"] == pytest.approx((policy + 0.4 * value - 0.02 * entropy).item(), rel=1e-5, abs=1e-5)
        assert log["policy/entropy_avg"] == pytest.approx(entropy.item(), rel=1e-5)
    second = trainer.state.log_history[1]
    assert 0 < second["policy/clipfrac_avg"] < 1
    assert second["val/ratio"] != 1
    kl = torch.stack([old_logps[at] - ref_logps[at] for at in tokens]).sum().item() / len(episodes)
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(kl, rel=1e-4)


def test_the_entropy_bonus_is_the_gradient_of_the_entropy(tmp_path: Path):
    """With advantages, KL and value loss out of the way, the gradient is `−entropy_coef · ∇ mean entropy`."""
    quiet = {"vf_coef": 0.0, "kl_coef": 0.0, "whiten_advantages": False, "lam": 1.0}

    def nothing(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    recorder = RecordGradients()
    trainer = ppo_trainer(
        tmp_path, nothing, callbacks=[recorder], max_grad_norm=0.0, entropy_coef=0.5, random=False, **quiet
    )
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight))
    start = weights(trainer)
    trainer.train()
    rollout = trainer.rollout
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if name in start:
                weight.copy_(start[name])
    total, count = torch.zeros(()), 0
    for prompt, completion in zip(rollout.prompts.ids, rollout.completions, strict=True):
        logits = trainer.model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
        every = torch.log_softmax(logits / trainer.args.temperature, -1)
        total, count = total - (every.exp() * every).sum(), count + len(completion.ids)
    trainer.model.zero_grad()
    (-0.5 * total / count).backward()
    expected = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_" in name}
    found = {name: gradient for name, gradient in recorder.steps[0].items() if "lora_" in name}
    assert_close_tensors(found, expected, rtol=1e-4)


@pytest.mark.parametrize("engine", ["hf", "continuous"])
def test_sampled_and_scored_distributions_are_of_one_temperature(tmp_path: Path, engine: str):
    """A cold policy draws what it finds likely: its mean log-prob is high only if the scores are cold too."""
    options = {"num_generations": 8, "max_completion_length": 2, "rollout_engine": engine}
    entropies = {}
    for temperature in (0.3, 1.5):
        trainer = ppo_trainer(tmp_path, temperature=temperature, **options)
        trainer.train()
        tokens, mask = trainer.rollout.tokens, trainer.rollout.mask
        drawn, expected = -tokens.logps[mask].mean().item(), tokens.entropies[mask].mean().item()
        assert drawn == pytest.approx(expected, rel=0.25)
        entropies[temperature] = expected
    assert entropies[0.3] < 0.7 * entropies[1.5]
