"""Memory that ends where nothing is trained: in evaluation, the reference cache, rollouts, rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import TrainingError
from alignkit.rollout.engine import Sampling
from alignkit.rollout.hf import HFEngine
from alignkit.rollout.reward import RewardInputs
from tests.guards.guarded_runs import CLOCKS, CPU_ERROR, FakeMemory, make_trainer, messages, rows, training_log
from tests.model_factory import tiny_model
from tests.rollout.engine_cases import letter_tokenizer


@pytest.mark.parametrize("kind", ["dpo", "kto", "reward"])
def test_evaluation_goes_on_in_smaller_passes(kind: str, tmp_path: Path, caplog: Any) -> None:
    def evaluate(folder: Path, limit: int | None) -> tuple[Any, dict[str, float]]:
        options: dict[str, Any] = {"max_tokens_per_forward": 80, "per_device_eval_batch_size": 8}
        trainer = make_trainer(kind, folder, eval_dataset=rows(12, labelled=kind == "kto"), **options)
        fake = FakeMemory(
            trainer.bundle.base,
            limit or 10_000,
            lambda kwargs: not trainer.model.training and trainer._passes.layout is not None,
        )
        metrics = trainer.evaluate()
        assert bool(fake.failures) == (limit is not None)
        return trainer, {name: value for name, value in metrics.items() if not any(clock in name for clock in CLOCKS)}

    _, expected = evaluate(tmp_path / "expected", None)
    trainer, found = evaluate(tmp_path / "found", 45)
    assert len(expected) > 4
    assert {n: v for n, v in found.items() if "second" not in n} == pytest.approx(
        {n: v for n, v in expected.items() if "second" not in n}, rel=1e-5
    )
    assert trainer._passes.max_tokens <= 45
    assert len(messages(caplog)) == 1


def test_the_reference_cache_is_filled_in_smaller_passes(tmp_path: Path, caplog: Any) -> None:
    def cache(name: str, limit: int) -> Any:
        model = tiny_model("llama")
        fake = FakeMemory(model, limit, lambda kwargs: not torch.is_grad_enabled())
        options: dict[str, Any] = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 16}
        trainer = make_trainer("dpo", tmp_path, model=model, reference_cache_dir=str(tmp_path / name), **options)
        return trainer, fake

    expected, fake = cache("expected", 10_000)
    assert not fake.failures
    assert not messages(caplog)
    trainer, fake = cache("found", 110)
    assert fake.failures
    assert trainer._passes.max_tokens < min(fake.failures)
    assert len(messages(caplog)) == 1
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        assert trainer.train_dataset[column][:] == pytest.approx(expected.train_dataset[column][:], rel=1e-6)


def test_scoring_of_rollouts_begins_anew_in_smaller_passes(tmp_path: Path, caplog: Any) -> None:
    """Every chunk is scored as it will be trained on: the first importance ratio stays exactly 1."""
    options: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    expected = make_trainer("ppo", tmp_path / "expected", **options)
    expected.train()
    trainer = make_trainer("ppo", tmp_path / "found", **options)
    passes = 0

    def is_late_scoring(kwargs: dict[str, Any]) -> bool:
        """Not the first micro-batch, so that an earlier one has been scored in a larger pass."""
        nonlocal passes
        is_probe = trainer._passes.layout is None
        scoring = not torch.is_grad_enabled() and not is_probe and kwargs.get("past_key_values") is None
        passes += scoring
        return scoring and passes > 2

    fake = FakeMemory(trainer.bundle.base, 40, is_late_scoring)
    trainer.train()
    assert fake.failures
    assert trainer._passes.max_tokens <= 40
    assert len(messages(caplog)) == 1
    for found, wanted in zip(training_log(trainer), training_log(expected), strict=True):
        assert found["policy/approxkl_avg"] == wanted["policy/approxkl_avg"] == 0.0
        assert found["objective/kl"] == pytest.approx(wanted["objective/kl"], rel=1e-4)


def test_a_reward_adapter_scores_in_smaller_passes(tmp_path: Path, caplog: Any) -> None:
    judge = make_trainer("reward", tmp_path / "judge", max_steps=1)
    judge.train()
    judge.save_model()
    inputs = RewardInputs(
        prompts=["a"] * 4,
        completions=["b"] * 4,
        prompt_ids=[[40 + n] * (3 + n) for n in range(4)],
        completion_ids=[[50, 60 + n] for n in range(4)],
    )
    trainer = make_trainer("ppo", tmp_path / "ppo", reward=str(tmp_path / "judge"))
    (source,) = trainer.rewards.sources
    expected = source(inputs).values
    assert expected.std() > 1e-3
    fake = FakeMemory(trainer.bundle.base, 15, lambda kwargs: True)
    found = source(inputs).values
    assert fake.failures
    assert len(messages(caplog)) == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("error", [None, CPU_ERROR], ids=["device", "cpu"])
def test_generation_goes_on_in_smaller_batches_with_the_same_samples(error: Exception | None, caplog: Any) -> None:
    tokenizer = letter_tokenizer(eos_token="</s>", pad_token="<pad>")
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 11, 12], [20], [30, 31, 32, 33], [40, 41], [50, 51, 52]]
    seeds = [[10 * number + each for each in range(3)] for number in range(len(prompts))]
    sampling = Sampling(max_new_tokens=6, temperature=1.0)
    expected = HFEngine(tiny_model("llama"), tokenizer).generate(prompts, seeds, sampling)
    model = tiny_model("llama")
    fake = FakeMemory(model, 4, lambda kwargs: True, rows=True, error=error)
    engine = HFEngine(model, tokenizer)
    assert engine.generate(prompts, seeds, sampling) == expected
    assert max(fake.failures) > 8
    assert engine.max_batch_tokens < 4 * (7 + 6) + (7 + 6)
    (message,) = messages(caplog)
    assert message == (
        f"out of memory: completions are written in batches of at most {engine.max_batch_tokens} tokens from now on, "
        f"not 16384; they stay the same. Set rollout_batch_tokens={engine.max_batch_tokens} to begin with that."
    )
    fake.failures.clear()
    assert engine.generate(prompts, seeds, sampling) == expected
    assert not fake.failures  # what was found is kept
    other = HFEngine(tiny_model("llama"), tokenizer)
    other.load_state_dict(engine.state_dict())
    assert other.max_batch_tokens == engine.max_batch_tokens


def test_one_completion_that_does_not_fit(tmp_path: Path) -> None:
    model = tiny_model("llama")
    FakeMemory(model, 0, lambda kwargs: True)
    engine = HFEngine(model, letter_tokenizer(eos_token="</s>", pad_token="<pad>"))
    with pytest.raises(TrainingError, match="one completion alone, of 9 tokens with its prompt, cannot be written"):
        engine.generate([[5, 6, 7]], [[1, 2]], Sampling(max_new_tokens=6))


def test_generation_within_a_rollout(tmp_path: Path, caplog: Any) -> None:
    expected = make_trainer("ppo", tmp_path / "expected", max_steps=2)
    expected.train()
    trainer = make_trainer("ppo", tmp_path / "found", max_steps=2)
    fake = FakeMemory(trainer.bundle.base, 2, lambda kwargs: kwargs.get("past_key_values") is not None, rows=True)
    trainer.train()
    assert fake.failures
    assert len(messages(caplog)) == 1
    assert [each.ids for each in trainer.rollout.completions] == [each.ids for each in expected.rollout.completions]
    assert [each["objective/kl"] for each in training_log(trainer)] == pytest.approx(
        [each["objective/kl"] for each in training_log(expected)], rel=1e-5
    )
