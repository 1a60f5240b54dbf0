"""Functions of the user: how they are called, what they may return, what they are called."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerState

from alignkit.errors import ConfigError, DataError
from alignkit.rollout.callables import CallableReward, function_name
from alignkit.rollout.reward import RewardError, RewardInputs
from tests.rollout.reward_samples import conversations, samples


def values_of(function: Any, inputs: RewardInputs) -> list[float | None]:
    values, applies = CallableReward(function)(inputs)
    assert values.shape == applies.shape == (len(inputs), 1)
    assert values.dtype == torch.float32
    assert applies.dtype == torch.bool
    return [value if counts else None for value, counts in zip(values[:, 0].tolist(), applies[:, 0], strict=True)]


def length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text)) for text in completions]


async def async_length(completions: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return length(completions)


class Judge:
    def __call__(self, completions: list[str]) -> list[float]:
        return length(completions)


class AsyncJudge:
    async def __call__(self, completions: list[str]) -> list[float]:
        return await async_length(completions)


def test_everything_is_given_by_keyword() -> None:
    seen: dict[str, Any] = {}

    def keep(prompts: list, completions: list, **kwargs: Any) -> list[float]:
        seen.update(kwargs, prompts=prompts, completions=completions)
        return [0.0, 1.0]

    state = TrainerState()
    inputs = RewardInputs(
        prompts=["a", "b"],
        completions=["x", "yy"],
        prompt_ids=[[1], [2]],
        completion_ids=[[3], [4, 4]],
        columns={"answer": [7, 8]},
        trainer_state=state,
    )
    assert values_of(keep, inputs) == [0.0, 1.0]
    assert seen.pop("trainer_state") is state
    assert seen == {
        "prompts": ["a", "b"],
        "completions": ["x", "yy"],
        "prompt_ids": [[1], [2]],
        "completion_ids": [[3], [4, 4]],
        "answer": [7, 8],
    }


@pytest.mark.parametrize(
    "function",
    [
        lambda completions: [len(text) for text in completions],
        lambda completions, *, answer: [len(text) + 0 * a for text, a in zip(completions, answer, strict=True)],
        lambda completions, scale=1: [scale * len(text) for text in completions],
        partial(lambda completions, unit: [unit * len(text) for text in completions], unit=1),
        length,
        async_length,
        partial(async_length),
        Judge(),
        AsyncJudge(),
    ],
    ids=["one name", "a column", "a default", "bound", "all", "async", "async partial", "object", "async object"],
)
def test_a_function_gets_what_its_signature_names(function: Any) -> None:
    inputs = samples("x", "yyy", answer=[5, 6], unit=[100, 100], other=[0, 0])
    assert values_of(function, inputs) == [1.0, 3.0]


def test_a_column_reaches_a_parameter_with_a_default() -> None:
    assert values_of(lambda completions, scale=None: scale, samples("x", "y", scale=[3, 4])) == [3.0, 4.0]


@pytest.mark.parametrize("function", [lambda completions, **kw: kw.pop("rows").clear() or [1], "messages"])
def test_a_function_cannot_change_the_samples(function: Any) -> None:
    def edit(completions: list, **kwargs: Any) -> list[float]:
        completions[0][0]["content"] = "changed"
        kwargs["prompt_ids"][0].clear()
        return [1.0]

    inputs = conversations("text") if function == "messages" else samples("x", rows=[1])
    values_of(edit if function == "messages" else function, inputs)
    assert inputs.columns in ({}, {"rows": [1]})
    assert inputs.completions[0] in ("x", [{"role": "assistant", "content": "text"}])
    assert inputs.prompt_ids == [[1, 0]]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1, 2.5, None], [1.0, 2.5, None]),
        ((1, 2, 3), [1.0, 2.0, 3.0]),
        ([True, False, None], [1.0, 0.0, None]),
        ([np.float32(0.5), np.int64(2), np.bool_(True)], [0.5, 2.0, 1.0]),
        ([torch.tensor(0.5), torch.tensor(2), np.array(1.0)], [0.5, 2.0, 1.0]),
        ([Fraction(1, 4), 0, -1], [0.25, 0.0, -1.0]),
        (torch.tensor([1.0, 2.0, 3.0], requires_grad=True), [1.0, 2.0, 3.0]),
        (torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16), [1.0, 2.0, 3.0]),
        (torch.tensor([True, False, True]), [1.0, 0.0, 1.0]),
        (np.array([1, 2, 3]), [1.0, 2.0, 3.0]),
        (np.array([1.0, None, 3.0], dtype=object), [1.0, None, 3.0]),
        ([None, None, None], [None, None, None]),
    ],
)
def test_what_counts_as_rewards(returned: Any, expected: list) -> None:
    assert values_of(lambda prompts: returned, samples("a", "b", "c")) == expected


async def _coroutine() -> list[float]:
    return [1.0, 1.0]


# returned by a function for two samples -> (sample, reason, part of the message)
BAD_RETURNS: dict[str, tuple[Any, int | None, str, str]] = {
    "nothing": (None, None, "wrong type", "returned None, not a list. Return one number per sample"),
    "one number": (0.5, None, "wrong type", "returned '0.5', a float, not a list"),
    "a text": ("good", None, "wrong type", "returned 'good', a str, not a list"),
    "a dict": ({"a": 1}, None, "wrong type", "a dict, not a list"),
    "a generator": ((x for x in (1, 2)), None, "wrong type", "a generator, not a list"),
    "a column vector": (torch.zeros(2, 1), None, "wrong type", r"returned shape \(2, 1\); return shape \(2,\)"),
    "a scalar array": (np.array(1.0), None, "wrong type", r"returned shape \(\); return shape \(2,\)"),
    "too few": ([1.0], None, "wrong length", "returned 1 rewards for 2 completions"),
    "too many": (torch.zeros(3), None, "wrong length", "returned 3 rewards for 2 completions"),
    "none at all": ([], None, "wrong length", "returned 0 rewards for 2 completions"),
    "a text inside": ([1.0, "good"], 1, "wrong type", "returned 'good', a str. Return one number"),
    "a nested list": ([[1.0], 2.0], 0, "wrong type", r"returned '\[1.0\]', a list"),
    "a vector inside": ([torch.ones(1), 2.0], 0, "wrong type", "a Tensor"),
    "a complex number": ([1.0, 1j], 1, "wrong type", "a complex"),
    "a huge integer": ([1.0, 10**400], 1, "wrong type", "an integer too large for a float"),
    "texts in an array": (np.array(["a", "b"]), 0, "wrong type", "'a', a str"),
}


@pytest.mark.parametrize("case", BAD_RETURNS)
def test_what_does_not_count_is_named(case: str) -> None:
    returned, index, reason, message = BAD_RETURNS[case]

    def judge(**kwargs: Any) -> Any:
        return returned

    with pytest.raises(RewardError, match=message) as caught:
        CallableReward(judge)(samples("a", "b"))
    assert (caught.value.faults[0].index, caught.value.faults[0].reason) == (index, reason)
    where = "all samples of the call" if index is None else f"sample {index}"
    assert str(caught.value).startswith(f"reward 'judge', {where}: the function returned")


def test_other_samples_keep_their_scores() -> None:
    with pytest.raises(RewardError, match=r"sample 0: .*\(1 more of these samples") as caught:
        CallableReward(lambda **kwargs: ["x", 2.0, None, []])(samples("a", "b", "c", "d"))
    scores = caught.value.scores
    assert scores is not None
    assert scores.values[:, 0].tolist() == [0.0, 2.0, 0.0, 0.0]
    assert scores.applies[:, 0].tolist() == [False, True, False, False]


def test_a_hidden_coroutine_is_an_error_and_is_closed() -> None:
    with pytest.raises(RewardError, match="returned a coroutine; declare it with `async def`"):
        CallableReward(lambda **kwargs: _coroutine())(samples("a", "b"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_a_function_raises_is_shown_and_kept(asynchronous: bool) -> None:
    def broken(**kwargs: Any) -> list[float]:
        raise KeyError("score")

    async def async_broken(**kwargs: Any) -> list[float]:
        raise KeyError("score")

    with pytest.raises(RewardError, match="all samples of the call: the function raised KeyError: 'score'") as caught:
        CallableReward(async_broken if asynchronous else broken)(samples("a"))
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda completions, anwser: [0.0],
            r"asks for 'anwser', which .* Did you mean 'answer'\? Its columns: 'answer'",
        ),
        (lambda completions, *, a, b: [0.0], r"asks for 'a', 'b'"),
        (lambda prompt: [0.0], r"always given: 'prompts', 'completions', 'prompt_ids', 'completion_ids', 'trainer_s"),
        (partial(lambda key, completions, gold: [0.0], 3), "asks for 'gold'"),
    ],
)
def test_a_parameter_that_nothing_fills_is_named(function: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CallableReward(function)(samples("a", answer=[1]))
    with pytest.raises(ConfigError, match=message):
        CallableReward(function).check_columns(["answer"])


def test_columns_are_checked_without_a_sample() -> None:
    CallableReward(lambda completions, answer: [0.0]).check_columns({"answer": 0})
    with pytest.raises(ConfigError, match="Its columns: none;"):
        CallableReward(lambda completions, answer: [0.0]).check_columns([])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts, completions, /: [0.0], "'prompts', 'completions' by position only.* remove the '/'"),
        (Judge, "not the class Judge"),
        (3, "not a int"),
        (None, "not a NoneType"),
    ],
)
def test_what_cannot_be_called_is_refused(function: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CallableReward(function)


def test_names() -> None:
    assert function_name(length) == "length"
    assert function_name(partial(partial(length), x=1)) == "length"
    assert function_name(lambda **kwargs: [0]) == "lambda"
    assert function_name(Judge()) == "Judge"
    assert CallableReward(length, name="size").names == ("size",)


def test_an_async_function_works_under_a_running_loop() -> None:
    async def cell() -> list[float | None]:
        return values_of(async_length, samples("a", "bb"))

    assert asyncio.run(cell()) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": ["a"]}, "'completions' has 1 entries for 2 prompts"),
        ({"completion_ids": [[1]]}, "'completion_ids' has 1 entries for 2 prompts"),
        ({"columns": {"answer": [1, 2, 3]}}, "'answer' has 3 entries for 2 prompts"),
        ({"columns": {"prompts": [1, 2]}}, "column 'prompts' has the name of an argument"),
    ],
)
def test_samples_that_do_not_fit_together_are_refused(change: dict, message: str) -> None:
    fitting = {"prompts": ["p", "q"], "completions": ["a", "b"], "prompt_ids": [[1], [1]], "completion_ids": [[1], [1]]}
    with pytest.raises(DataError, match=message):
        RewardInputs(**{**fitting, **change})
