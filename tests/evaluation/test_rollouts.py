"""Summaries of greedy answers: means, intervals, what is left out, and the tables."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console

from alignkit.errors import DataError
from alignkit.evaluation.generation import Answers
from alignkit.evaluation.rollouts import (
    RatedAnswer,
    rated_side_by_side,
    reward_change,
    rollouts_table,
    summarize_answers,
    summarize_rollouts,
)
from alignkit.trainers.ppo import PPOTrainer
from alignkit.trainers.ppo_config import PPOConfig
from tests.model_factory import tiny_model
from tests.tiny_preferences import QUIET, character_tokenizer

PROMPTS = [{"prompt": f"ab{letter}d ef", "wanted": letter} for letter in "abcdefghijklmnopqr"]


def answer(row: int, reward: float | None, *, kl: float = 0.0, tokens: int = 4, finished: bool = True) -> RatedAnswer:
    return RatedAnswer(row, f"prompt {row}", f"answer {row}", reward, kl, tokens, finished)


BEFORE = summarize_answers([answer(0, 0.25), answer(1, -0.25), answer(2, None, tokens=7, finished=False)])
AFTER = summarize_answers([answer(0, 0.75, kl=2.0), answer(1, 0.75, kl=4.0), answer(2, 0.5, kl=3.0, tokens=5)])


def test_means_leave_out_what_was_dropped_and_nothing_else() -> None:
    assert BEFORE.reward.value == 0.0
    assert BEFORE.tokens.value == 5.0
    assert BEFORE.eos_rate.value == pytest.approx(2 / 3)
    # Wilson's interval of 2 of 3
    assert BEFORE.eos_rate[1:] == pytest.approx((0.207660, 0.938508), rel=1e-5)
    assert AFTER.kl.value == 3.0
    assert AFTER.reward.value == pytest.approx(2 / 3)
    assert AFTER.reward.low < AFTER.reward.value < AFTER.reward.high


def test_the_change_pairs_prompts_that_were_rewarded_both_times() -> None:
    assert reward_change(BEFORE, AFTER).value == pytest.approx((0.5 + 1.0) / 2)
    assert reward_change(AFTER, BEFORE).value == pytest.approx(-0.75)
    other = summarize_answers([answer(9, 1.0)])
    with pytest.raises(DataError, match="no prompt has a rewarded answer both"):
        reward_change(BEFORE, other)


def test_answers_without_any_reward_are_an_error() -> None:
    with pytest.raises(DataError, match="none of the held-out answers has a reward"):
        summarize_answers([answer(0, None)])


def test_the_table_shows_both_with_intervals() -> None:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    with console.capture() as capture:
        console.print(rollouts_table(BEFORE, AFTER))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines()]
    cells = {row[0]: row[1:] for row in rows if row}
    assert "Greedy answers to 3 held-out prompts, 95 % intervals" in capture.get()
    assert cells["reward"] == ["0.000 [-0.250, 0.250]", "0.667 [0.500, 0.750]"]
    assert cells["its change, prompt by prompt"] == ["", "0.750 [0.500, 1.000]"]
    assert cells["KL from the reference, nats per answer"][1].startswith("3.00 [2.")
    assert cells["answers that ended by themselves"][0] == "0.67 [0.21, 0.94]"


def test_answers_stand_side_by_side_with_their_rewards() -> None:
    assert rated_side_by_side(BEFORE, AFTER, 3)[1:] == [
        Answers("prompt 1", "(-0.25) answer 1", "(+0.75) answer 1"),
        Answers("prompt 2", "(no reward) answer 2", "(+0.50) answer 2"),
    ]


def test_json_holds_every_answer() -> None:
    plain = AFTER.as_dict()
    assert plain["kl"]["value"] == 3.0
    assert plain["answers"][2] == answer(2, 0.5, kl=3.0, tokens=5)._asdict()


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def test_a_trainers_answers_agree_with_its_evaluation(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 4, "max_completion_length": 6, "max_steps": 4, "learning_rate": 1e-2}
    trainer = PPOTrainer(
        tiny_model("llama"),
        vowels,
        PPOConfig(str(tmp_path), activation_checkpointing=False, **settings, **QUIET),
        Dataset.from_list(PROMPTS),
        Dataset.from_list(PROMPTS),
        processing_class=character_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    held_out: Any = trainer.eval_dataset
    before = summarize_rollouts(trainer, held_out)
    assert before.kl.value == 0.0
    trainer.train()
    after, metrics = summarize_rollouts(trainer, held_out), trainer.evaluate()
    figures = (after.reward.value, after.kl.value, after.tokens.value, after.eos_rate.value)
    names = ("reward", "kl", "mean_length", "eos_rate")
    assert figures == pytest.approx([metrics[f"eval_{name}"] for name in names], rel=1e-5)
    assert after.kl.value != 0.0
    assert [each.row for each in after.answers] == list(range(len(PROMPTS)))  # more prompts than one batch holds
    assert after.answers[17].prompt.replace(" ", "") == PROMPTS[17]["prompt"].replace(" ", "")
    assert [each.reward for each in after.answers] == vowels([each.answer for each in after.answers])
    with pytest.raises(DataError, match="are not prepared"):
        summarize_rollouts(trainer, Dataset.from_list(PROMPTS))
