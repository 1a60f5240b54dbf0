"""The weighted sum, and what becomes of samples that no source can score."""

from __future__ import annotations

import asyncio
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from alignkit.errors import ConfigError, DataError, TrainingError
from alignkit.rollout.callables import CallableReward
from alignkit.rollout.mix import RewardMix, RewardResult, numbered, why_all_dropped
from alignkit.rollout.reward import ComponentScores, RewardError, RewardInputs
from tests.invariants.source_tree import ROOT
from tests.rollout.reward_samples import samples


def reward(returned: Any, name: str = "judge") -> CallableReward:
    """A source that returns `returned`, or raises it."""

    def judge(**kwargs: Any) -> Any:
        if isinstance(returned, Exception):
            raise returned
        return returned

    return CallableReward(judge, name=name)


class TwoHeads:
    """A source of two components, given as columns."""

    names = ("helpful", "harmless")

    def __init__(self, *columns: list[float]) -> None:
        self.values = torch.tensor(columns).T

    def __call__(self, inputs: RewardInputs) -> ComponentScores:
        return ComponentScores(self.values, torch.ones_like(self.values, dtype=torch.bool))


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """What hanging functions wait for; it is set when the test ends, so that no thread stays."""
    event = threading.Event()
    yield event
    event.set()


def assert_result(result: RewardResult, totals: list[float], kept: list[bool], dropped: dict[str, int]) -> None:
    torch.testing.assert_close(result.totals, torch.tensor(totals, dtype=torch.float32), rtol=1e-5, atol=0)
    assert result.kept.tolist() == kept
    assert result.dropped == dropped


def test_weighted_sum_over_what_applies() -> None:
    mix = RewardMix(
        [reward([1.0, 2.0, None]), TwoHeads([0.5, 1.0, 2.0], [1.0, 0.0, 3.0]), reward([None, 4.0, None], "extra")],
        weights=[2.0, 1.0, -0.5, 0.25],
    )
    result = mix(samples("a", "b", "c"))
    # 2·1 + .5 − .5·1;  2·2 + 1 − .5·0 + .25·4;  2 − .5·3
    assert_result(result, [2.0, 6.0, 0.5], [True] * 3, {})
    assert tuple(result.components) == mix.names == ("judge", "helpful", "harmless", "extra")
    assert result.components["judge"].values.tolist() == [1.0, 2.0, 0.0]
    assert result.components["judge"].applies.tolist() == [True, True, False]
    assert result.components["harmless"].values.tolist() == [1.0, 0.0, 3.0]


def test_weights_are_one_by_default() -> None:
    assert_result(RewardMix([reward([1.0]), reward([0.5], "b")])(samples("a")), [1.5], [True], {})


def test_equal_names_are_numbered() -> None:
    assert numbered(["a", "a", "b", "a", "a_2"]) == ["a", "a_2", "b", "a_3", "a_2_2"]
    mix = RewardMix([reward([1.0]), reward([math.nan])])
    assert mix.names == ("judge", "judge_2")
    with pytest.raises(RewardError, match="reward 'judge_2', sample 0"):
        mix(samples("a"))


# what the source returns (or raises) for three samples -> (message when raising, totals, kept, dropped when dropping)
FAILURES: dict[str, tuple[Any, str, list[float], list[bool], dict[str, int]]] = {
    "NaN": ([1.0, math.nan, 3.0], r"sample 1: the reward is \[nan\] in float32", [11, 0, 33], [True, False, True],
            {"judge: not finite": 1}),
    "infinity": ([math.inf, 2.0, -math.inf], r"sample 0: the reward is \[inf\].*\(1 more of these", [0, 22, 0],
                 [False, True, False], {"judge: not finite": 2}),
    "too large for float32": ([1e39, 2.0, 3.0], r"sample 0: the reward is \[inf\]", [0, 22, 33],
                              [False, True, True], {"judge: not finite": 1}),
    "a text": ([1.0, 2.0, "3"], r"sample 2: the function returned '3', a str", [11, 22, 0], [True, True, False],
               {"judge: wrong type": 1}),
    "a text and NaN": (["1", math.nan, 3.0], r"sample 0: the function returned '1', a str", [0, 0, 33],
                       [False, False, True], {"judge: wrong type": 1, "judge: not finite": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_a_sample_that_fails_is_an_error_or_dropped(case: str) -> None:
    returned, message, totals, kept, dropped = FAILURES[case]
    other = reward([10.0, 20.0, 30.0], "other")
    with pytest.raises(RewardError, match=f"^reward 'judge', {message}.*choose \"drop\""):
        RewardMix([other, reward(returned)])(samples("a", "b", "c"))
    result = RewardMix([other, reward(returned)], on_error="drop")(samples("a", "b", "c"))
    assert_result(result, totals, kept, dropped)
    assert result.components["judge"].applies.tolist() == kept
    assert result.components["judge"].values.isfinite().all()
    assert result.components["other"].applies.all()


@pytest.mark.parametrize(
    ("returned", "message", "reason"),
    [
        (ValueError("bad json"), "the function raised ValueError: bad json", "raised"),
        (TimeoutError("http"), "the function raised TimeoutError: http", "raised"),
        ([1.0, 2.0], "the function returned 2 rewards for 3 completions", "wrong length"),
        (None, "the function returned None, not a list", "wrong type"),
        (torch.zeros(3, 1), r"the function returned shape \(3, 1\)", "wrong type"),
    ],
)
@pytest.mark.parametrize("timeout_s", [None, 30.0])
def test_a_call_that_fails_is_an_error_either_way(
    returned: Any, message: str, reason: str, timeout_s: float | None
) -> None:
    with pytest.raises(RewardError, match=f"^reward 'judge', all samples of the call: {message}"):
        RewardMix([reward(returned)], timeout_s=timeout_s)(samples("a", "b", "c"))
    result = RewardMix([reward(returned)], on_error="drop", timeout_s=timeout_s)(samples("a", "b", "c"))
    assert not result.kept.any()
    lost = rf"^all 3 samples were dropped: judge: {reason} \(3\)\. {message}"
    assert re.search(lost, why_all_dropped(result))


def test_a_call_that_fails_loses_only_its_samples() -> None:
    def judge(completions: list[str], **kwargs: Any) -> list[float]:
        assert len(completions) <= 2
        return [1.0 / (len(text) - 1) for text in completions]

    mix = RewardMix([CallableReward(judge)], on_error="drop", samples_per_call=2)
    result = mix(samples("aa", "aaa", "a", "aa", "aaaaa"))
    assert_result(result, [1.0, 0.5, 0.0, 0.0, 0.25], [True, True, False, False, True], {"judge: raised": 2})
    with pytest.raises(RewardError, match="all samples of the call: the function raised ZeroDivisionError"):
        RewardMix([CallableReward(judge)], samples_per_call=2)(samples("aa", "aaa", "a", "aa", "aaaaa"))


def test_faults_carry_the_number_in_the_whole_batch() -> None:
    source = CallableReward(lambda completions: [math.nan if text == "x" else 1.0 for text in completions])
    with pytest.raises(RewardError, match="reward 'lambda', sample 3"):
        RewardMix([source], samples_per_call=2)(samples("a", "b", "c", "x", "e"))
    result = RewardMix([source], samples_per_call=2, on_error="drop")(samples("a", "b", "c", "x", "e"))
    assert result.kept.tolist() == [True, True, True, False, True]


def test_a_sample_that_nothing_applies_to() -> None:
    sources = [reward([1.0, None]), reward([None, None], "b")]
    with pytest.raises(TrainingError, match=r"^sample 1: no reward applies; 'judge', 'b' returned None or weigh 0"):
        RewardMix(sources)(samples("a", "b"))
    result = RewardMix(sources, on_error="drop")(samples("a", "b"))
    assert_result(result, [1.0, 0.0], [True, False], {"no source applies": 1})
    result = RewardMix([reward([None, None])], on_error="drop")(samples("a", "b"))
    assert why_all_dropped(result) == "all 2 samples were dropped: no source applies (2)."


def test_a_watched_component_does_not_make_a_reward() -> None:
    sources = [reward([5.0, 5.0]), reward([1.0, None], "b")]
    with pytest.raises(TrainingError, match="sample 1: no reward applies"):
        RewardMix(sources, weights=[0.0, 1.0])(samples("a", "b"))
    result = RewardMix(sources, weights=[0.0, 1.0], on_error="drop")(samples("a", "b"))
    assert_result(result, [1.0, 0.0], [True, False], {"no source applies": 1})


def test_a_sample_counts_once() -> None:
    sources = [reward([math.nan, 1.0]), reward(["x", 1.0], "b"), reward([None, 1.0], "c")]
    result = RewardMix(sources, on_error="drop")(samples("a", "b"))
    assert_result(result, [0.0, 3.0], [False, True], {"judge: not finite": 1})


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_function_that_hangs_is_given_up(release: threading.Event, asynchronous: bool) -> None:
    threads: list[threading.Thread] = []

    def hang(**kwargs: Any) -> list[float]:
        threads.append(threading.current_thread())
        release.wait()
        return [1.0]

    async def wait_forever(**kwargs: Any) -> list[float]:
        threads.append(threading.current_thread())
        await asyncio.Event().wait()
        return [1.0]

    mix = RewardMix([CallableReward(wait_forever if asynchronous else hang, name="slow")], timeout_s=0.2)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"reward 'slow', all samples of the call: did not answer within 0\.2 s"):
        mix(samples("a"))
    assert time.monotonic() - start < 5
    assert threads[0].daemon
    assert threads[0] is not threading.current_thread()


def test_a_coroutine_that_blocks_the_loop_does_not_block_the_next_call(release: threading.Event) -> None:
    calls: list[int] = []

    async def sometimes(**kwargs: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            release.wait()
        return [2.0]

    mix = RewardMix([CallableReward(sometimes)], timeout_s=0.2, on_error="drop")
    assert mix(samples("a")).dropped == {"sometimes: timeout": 1}
    assert_result(mix(samples("a")), [2.0], [True], {})


def test_a_healthy_loop_is_kept() -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def sometimes(**kwargs: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        if len(loops) == 2:
            await asyncio.Event().wait()
        return [2.0]

    mix = RewardMix([CallableReward(sometimes)], timeout_s=0.2)
    mix(samples("a"))
    with pytest.raises(RewardError, match="did not answer"):
        mix(samples("a"))
    mix(samples("a"))
    assert len(set(loops)) == 1


def test_async_functions_run_at_the_same_time() -> None:
    """Each waits for the other, and a sync function in between for both: one after the other, none would end."""
    first, second, sync = threading.Event(), threading.Event(), threading.Event()

    async def until(mine: threading.Event, theirs: threading.Event) -> list[float]:
        mine.set()
        while not (theirs.is_set() and sync.is_set()):
            await asyncio.sleep(0.001)
        return [1.0]

    async def one(**kwargs: Any) -> list[float]:
        return await until(first, second)

    async def two(**kwargs: Any) -> list[float]:
        return await until(second, first)

    def between(**kwargs: Any) -> list[float]:
        sync.set()
        assert first.wait(10)
        assert second.wait(10)
        return [1.0]

    mix = RewardMix([CallableReward(one), CallableReward(between), CallableReward(two)], timeout_s=20)
    assert_result(mix(samples("a")), [3.0], [True], {})


def test_a_mix_works_under_a_running_loop() -> None:
    async def judge(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    async def cell() -> RewardResult:
        return RewardMix([CallableReward(judge)], timeout_s=20)(samples("a", "bb"))

    assert_result(asyncio.run(cell()), [1.0, 2.0], [True, True], {})


def test_a_sync_function_without_a_limit_runs_in_the_calling_thread() -> None:
    threads: list[threading.Thread] = []

    def judge(**kwargs: Any) -> list[float]:
        threads.append(threading.current_thread())
        return [1.0]

    RewardMix([CallableReward(judge)])(samples("a"))
    assert threads == [threading.current_thread()]


HANGING_PROGRAM = """
import asyncio, threading
from alignkit.errors import TrainingError
from alignkit.rollout.callables import CallableReward
from alignkit.rollout.mix import RewardMix
from alignkit.rollout.reward import RewardInputs

def hang(**kwargs):
    threading.Event().wait()

async def hang_without_await(**kwargs):
    threading.Event().wait()

async def hang_with_await(**kwargs):
    await asyncio.Event().wait()

inputs = RewardInputs(prompts=["p"], completions=["c"], prompt_ids=[[1]], completion_ids=[[1]])
for function in (hang_with_await, hang_without_await, hang):
    try:
        RewardMix([CallableReward(function)], timeout_s=0.1)(inputs)
    except TrainingError as error:
        print(error.source)
"""


def test_a_process_with_hanging_rewards_can_exit() -> None:
    command = [sys.executable, "-W", "error", "-c", HANGING_PROGRAM]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.stderr == ""
    assert result.stdout.split() == ["hang_with_await", "hang_without_await", "hang"]
    assert result.returncode == 0


class WrongShape(TwoHeads):
    names = ("helpful",)


def test_a_source_of_another_kind_is_checked_too() -> None:
    wrong = WrongShape([1.0], [2.0])
    with pytest.raises(RewardError, match=r"reward 'helpful'.*values \(1, 2\).*both must be \(1, 1\)"):
        RewardMix([wrong])(samples("a"))
    with pytest.raises(RewardError, match=r"reward 'helpful', sample 0: the reward is \[1.0, inf\]"):
        RewardMix([TwoHeads([1.0], [math.inf])])(samples("a"))


def test_columns_are_checked_for_all_functions() -> None:
    mix = RewardMix([TwoHeads([1.0], [2.0]), CallableReward(lambda completions, gold: [0.0])], on_error="drop")
    mix.check_columns(["gold"])
    for check in (lambda: mix.check_columns(["text"]), lambda: mix(samples("a", text=["x"]))):
        with pytest.raises(ConfigError, match="asks for 'gold', which the dataset does not have"):
            check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "there is no reward"),
        ({"weights": [1.0]}, r"1 reward weights for 2 rewards \('judge', 'b'\): give one for each"),
        ({"weights": [1.0, 1.0, 1.0]}, "3 reward weights for 2 rewards"),
        ({"weights": [1.0, math.nan]}, "the weight nan of reward 'b' must be a finite number"),
        ({"weights": [math.inf, 1.0]}, "the weight inf of reward 'judge' must be"),
        ({"weights": [1.0, "2"]}, "the weight '2' of reward 'b' must be"),
        ({"weights": [0.0, 0.0]}, "all reward weights .* are 0"),
        ({"on_error": "dorp"}, r"on_error='dorp': .* Did you mean 'drop'\?"),
        ({"timeout_s": 0.0}, r"timeout_s=0\.0: must be a positive, finite number"),
        ({"timeout_s": math.inf}, "timeout_s=inf: must be"),
        ({"samples_per_call": 0}, "samples_per_call=0: must be 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardMix(**{"sources": [reward([1.0]), reward([1.0], "b")], **options})


def test_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="there are no samples"):
        RewardMix([reward([])])(samples())
