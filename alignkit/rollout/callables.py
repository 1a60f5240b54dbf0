"""Reward functions of the user, called in GRPO's form: `f(prompts, completions, completion_ids=…, **columns)`."""

from __future__ import annotations

import copy
import functools
import inspect
import numbers
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from alignkit.errors import ConfigError, nearest
from alignkit.rollout.background import BackgroundLoop, is_done, run_in_daemon
from alignkit.rollout.reward import (
    STANDARD_ARGUMENTS,
    ComponentScores,
    RewardError,
    RewardFault,
    RewardInputs,
    single_component,
)

_ASK = "Return one number per sample, or None where the reward does not apply."


class CallableReward:
    """A function, sync or async, as a reward source.

    It is called with keywords: `prompts`, `completions`, `prompt_ids`, `completion_ids`, `trainer_state` and one for
    each dataset column. If its signature has no `**kwargs`, it gets those that it names. What `functools.partial` bound
    stays bound. Texts and messages are copies: what a function does to them reaches nobody else.

    It returns B rewards: a list or tuple of numbers (bool counts as 0 and 1; 0-d tensors and NumPy scalars are numbers
    too) and `None` where it does not apply, or a tensor or array `(B,)`.

    Args:
        function: called once for a batch of samples.
        name: for metrics and errors; by default the function's own.

    Raises:
        ConfigError: not callable, or a parameter that cannot be given by keyword.
    """

    def __init__(self, function: Callable[..., Any], *, name: str | None = None) -> None:
        if isinstance(function, type) or not callable(function):
            kind = f"the class {function.__name__}" if isinstance(function, type) else f"a {type(function).__name__}"
            raise ConfigError(f"a reward must be a function or an object that can be called, not {kind}")
        self.function = function
        self.names = (name or function_name(function),)
        self.is_async = is_async(function)
        self._wants = _read_signature(function, self.names[0])

    def __call__(self, inputs: RewardInputs) -> ComponentScores:
        """Return scores `(B, 1)`; an async function runs to its end.

        Raises:
            RewardError: the function raised, or returned something that is no reward.
        """
        return self.begin(inputs, BackgroundLoop(), None)()

    def check_columns(self, columns: Collection[str], dataset: str = "the dataset") -> None:
        """Check that a dataset with these columns has what the function asks for; `dataset` is what to call it.

        Raises:
            ConfigError: it asks for something else.
        """
        known = [*STANDARD_ARGUMENTS, *columns]
        missing = [name for name in self._wants.required if name not in known]
        if missing:
            raise ConfigError(
                f"reward '{self.names[0]}' asks for {_quoted(missing)}, which {dataset} does not have."
                f"{nearest(missing[0], known)} Its columns: {_quoted(sorted(columns)) or 'none'}; always given: "
                f"{_quoted(STANDARD_ARGUMENTS)}. Add the column, or give the parameter a default."
            )

    def begin(
        self, inputs: RewardInputs, loop: BackgroundLoop, timeout_s: float | None
    ) -> Callable[[], ComponentScores]:
        """Start an async function, prepare a sync one, and return what waits for the scores `(B, 1)`.

        A sync function without a time limit runs in the calling thread, else in a daemon thread.

        Args:
            inputs: the samples.
            loop: where async functions run.
            timeout_s: seconds that the function may take.
        """
        self.check_columns(inputs.columns)
        call = partial(self.function, **self._arguments(inputs))
        if self.is_async:
            finish = partial(self._wait, loop.submit(call()), _deadline(timeout_s), timeout_s, loop)
        elif timeout_s is None:
            finish = call
        else:
            finish = partial(self._wait_in_daemon, call, timeout_s)
        return lambda: self._parse(finish, len(inputs))

    def _arguments(self, inputs: RewardInputs) -> dict[str, Any]:
        given = {
            **{name: list(values) for name, values in inputs.columns.items()},
            "prompts": copy.deepcopy(inputs.prompts),
            "completions": copy.deepcopy(inputs.completions),
            "prompt_ids": [list(ids) for ids in inputs.prompt_ids],
            "completion_ids": [list(ids) for ids in inputs.completion_ids],
            "trainer_state": inputs.trainer_state,
        }
        return {name: value for name, value in given.items() if self._wants.takes(name)}

    def _wait_in_daemon(self, call: Callable[[], Any], timeout_s: float) -> Any:
        future = run_in_daemon(call, f"alignkit-reward-{self.names[0]}")
        return self._wait(future, _deadline(timeout_s), timeout_s, None)

    def _wait(
        self, future: Future[Any], deadline: float | None, timeout_s: float | None, loop: BackgroundLoop | None
    ) -> Any:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        if is_done(future, remaining):
            return future.result()
        future.cancel()
        if loop is not None:
            loop.abandon_if_stuck()
        raise self._failed(
            "timeout",
            f"did not answer within {timeout_s:g} s. Make the function faster or give it a time limit of its own, or "
            "raise the reward timeout.",
        )

    def _parse(self, finish: Callable[[], Any], count: int) -> ComponentScores:
        try:
            result = finish()
        except RewardError:
            raise
        except Exception as error:
            raise self._failed(
                "raised",
                f"the function raised {type(error).__name__}: {error}. Correct it, or let it return None for samples "
                "that it cannot judge.",
            ) from error
        items = self._items(result, count)
        values, faults = [], []
        for index, item in enumerate(items):
            try:
                values.append(as_number(item))
            except (TypeError, OverflowError) as error:
                values.append(None)
                faults.append(RewardFault(index, "wrong type", f"the function returned {error}. {_ASK}"))
        scores = single_component(values)
        if faults:
            raise RewardError(self.names[0], faults, scores)
        return scores

    def _items(self, result: Any, count: int) -> list[Any]:
        if inspect.iscoroutine(result):
            result.close()
            raise self._failed("wrong type", "the function returned a coroutine; declare it with `async def`.")
        if isinstance(result, torch.Tensor | np.ndarray):
            if result.ndim != 1:
                raise self._failed(
                    "wrong type", f"the function returned shape {tuple(result.shape)}; return shape ({count},)."
                )
            result = result.tolist()
        if not isinstance(result, list | tuple):
            raise self._failed("wrong type", f"the function returned {_kind(result)}, not a list. {_ASK}")
        if len(result) != count:
            raise self._failed(
                "wrong length", f"the function returned {len(result)} rewards for {count} completions. {_ASK}"
            )
        return list(result)

    def _failed(self, reason: str, message: str) -> RewardError:
        return RewardError(self.names[0], [RewardFault(None, reason, message)])


def as_number(item: Any) -> float | None:
    """Return one reward as a float, `None` as it is.

    Raises:
        TypeError: no single real number.
        OverflowError: an integer that no float holds.
    """
    if isinstance(item, torch.Tensor | np.ndarray | np.generic) and item.ndim == 0:
        item = item.item()
    if item is None:
        return None
    if not isinstance(item, numbers.Real):
        raise TypeError(_kind(item))
    try:
        return float(item)
    except OverflowError:
        raise OverflowError("an integer too large for a float") from None


def function_name(function: Callable[..., Any]) -> str:
    """The name of a function, of what a `partial` wraps, or of a callable object's class; `lambda` for a lambda."""
    while isinstance(function, functools.partial):
        function = function.func
    name = function.__name__ if inspect.isroutine(function) else type(function).__name__
    return name.strip("<>")


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling `function` gives a coroutine; also for a `partial` and an object with `async def __call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class _Wants(NamedTuple):
    """Which keywords a function takes; `named` is `None` for all of them."""

    named: frozenset[str] | None
    required: tuple[str, ...]
    bound: frozenset[str]

    def takes(self, name: str) -> bool:
        return name not in self.bound and (self.named is None or name in self.named)


def _read_signature(function: Callable[..., Any], name: str) -> _Wants:
    bound: set[str] = set()
    inner = function
    while isinstance(inner, functools.partial):
        bound |= inner.keywords.keys()
        inner = inner.func
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # builtins do not always have one
        return _Wants(None, (), frozenset(bound))
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    unnamed = [p.name for p in needed if p.kind is p.POSITIONAL_ONLY]
    if unnamed:
        raise ConfigError(
            f"reward '{name}' takes {_quoted(unnamed)} by position only, but rewards are called with keywords: remove "
            "the '/' from its signature"
        )
    named = frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return _Wants(None if takes_all else named, tuple(p.name for p in needed), frozenset(bound))


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


def _quoted(names: Collection[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _kind(value: Any) -> str:
    return "None" if value is None else f"{str(value)[:40]!r}, a {type(value).__name__}"
