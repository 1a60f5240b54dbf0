"""Judges of two answers to one prompt.

A judge is a callable. It is told prompts and two answers to each and says how likely the first is the better one; order
matters to some judges, so `alignkit.evaluation.win_rate` asks both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Protocol, runtime_checkable

from alignkit.data.records import Text
from alignkit.errors import ConfigError, DataError, ModelError, TrainingError
from alignkit.evaluation.models import in_parts, progress
from alignkit.models.reward_files import load_reward_model
from alignkit.models.source import locate
from alignkit.rollout.classifier import ClassifierReward
from alignkit.rollout.reward import ComponentScores, RewardInputs, RewardSource
from alignkit.rollout.sources import make_reward_sources

_ASKED_AT_ONCE = 64

# How likely the first answer is the better one, from 0 to 1; 0.5 is a tie, None is no verdict.
Verdicts = Sequence[float | None]


@runtime_checkable
class Judge(Protocol):
    """Compares two answers to each of some prompts. `name` is what results call it."""

    name: str

    def __call__(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """Return, for each prompt, the chance that the answer in `first` is better than the one in `second`."""
        ...


class CallableJudge:
    """A function of the user as a judge.

    Args:
        function: `f(prompts, first, second)`, which returns a verdict for each prompt: a number from 0 (the second
            answer is better) to 1 (the first is), a bool, or None where it has nothing to say.
        name: for results; by default the function's.
    """

    def __init__(self, function: Callable[..., Verdicts], name: str | None = None) -> None:
        self.function = function
        self.name = name or _name_of(function)

    def __call__(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """Ask the function."""
        return self.function(prompts, first, second)


class RewardJudge:
    """A reward source as a judge: the answer with the higher reward is better, equal ones tie.

    Args:
        source: its components count by their sum.
        name: for results; by default the source's.
    """

    def __init__(self, source: RewardSource, name: str | None = None) -> None:
        self.source = source
        self.name = name or "+".join(source.names)

    def __call__(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """Reward both answers; None where a component does not apply to either.

        Raises:
            TrainingError: an answer that the source cannot score, or a reward that is not finite.
        """
        above, below = (source_rewards(self.source, prompts, answers) for answers in (first, second))
        return [
            None if one is None or other is None else 0.5 * ((one > other) + (one >= other))
            for one, other in zip(above, below, strict=True)
        ]


def source_rewards(source: RewardSource, prompts: Sequence[Text], answers: Sequence[str]) -> list[float | None]:
    """Reward answers: a source's components added up, None where none applies.

    Raises:
        RewardError: samples that the source cannot score.
        TrainingError: a reward that is not finite.
    """
    completions = [
        answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    nothing: list[list[int]] = [[] for _ in prompts]
    scores = source(
        RewardInputs(prompts=list(prompts), completions=completions, prompt_ids=nothing, completion_ids=nothing)
    )
    values, applies = scores.values.double().view(len(prompts), -1), scores.applies.view(len(prompts), -1)
    totals = (values * applies).sum(1).tolist()
    if not all(map(math.isfinite, totals)):
        raise TrainingError(f"reward '{'+'.join(source.names)}' is not finite for some answers: its model has diverged")
    return [total if some else None for total, some in zip(totals, applies.any(1).tolist(), strict=True)]


def make_reward_source(reward: Any, tokenizer: Any = None) -> RewardSource:
    """Make a reward source of a reward adapter's folder, a sequence classifier or a function.

    Raises:
        ModelError: nothing there, or no reward model.
        ConfigError: several things.
    """
    if isinstance(reward, str | Path) and locate(reward, {}).adapter is not None:
        model, own = load_reward_model(reward)
        return _EndedReward(ClassifierReward(model, own if tokenizer is None else tokenizer, name=Path(reward).name))
    return make_reward_sources(reward, tokenizer)[0]


class _EndedReward:
    """A reward model of `RewardTrainer`, which has seen plain text end in EOS; conversations end as templates say.

    Generated text comes without it, since special tokens are left out of what is shown.
    """

    def __init__(self, classifier: ClassifierReward) -> None:
        self.classifier = classifier
        self.names = classifier.names

    def __call__(self, inputs: RewardInputs) -> ComponentScores:
        end = str(self.classifier.tokenizer.eos_token or "")
        ended = [text + end if isinstance(text, str) else text for text in inputs.completions]
        return self.classifier(replace(inputs, completions=ended))


def make_judge(judge: Any) -> Judge:
    """Make a judge of what a user names.

    Args:
        judge: a `Judge`, a function, a `RewardSource`, or text for the command line: `reward:PATH_OR_ID` (a reward
            model), `model:PATH_OR_ID` (an instruct model that is asked), or `MODEL@https://host/v1` (an endpoint that
            speaks OpenAI's protocol; its key is read from the environment variable OPENAI_API_KEY, if it is set).

    Raises:
        ConfigError: text of another form, or nothing that can judge.
        ModelError: a model that cannot be loaded.
    """
    from alignkit.evaluation.judge_endpoint import EndpointJudge
    from alignkit.evaluation.judge_model import ModelJudge

    if isinstance(judge, Judge):
        return judge
    if isinstance(judge, RewardSource) and not isinstance(judge, type):
        return RewardJudge(judge)
    if callable(judge):
        function: Any = judge
        return CallableJudge(function)
    kind, _, name = str(judge).partition(":")
    if kind == "reward" and name:
        return RewardJudge(make_reward_source(name), name=f"reward model {Path(name).name}")
    if kind == "model" and name:
        return ModelJudge(name)
    model, _, address = str(judge).partition("@")
    if model and address.startswith(("http://", "https://")):
        return EndpointJudge(address, model)
    raise ConfigError(
        f"judge={judge!r} is none: give a function, 'reward:PATH', 'model:PATH' or 'MODEL@https://host/v1'"
    )


def ask(
    judge: Judge, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str], *, quiet: bool = False
) -> list[float | None]:
    """Ask a judge, part by part behind a progress bar, and see that its verdicts are verdicts.

    Raises:
        DataError: lists of different lengths, or nothing to judge.
        ModelError: not one verdict for each prompt, or one that is no number from 0 to 1.
    """
    if not len(prompts) == len(first) == len(second):
        raise DataError(
            f"{len(prompts)} prompts came with {len(first)} and {len(second)} answers: give two answers to each"
        )
    if not prompts:
        raise DataError("there is nothing to judge: no prompt was given")
    verdicts: list[float | None] = []
    parts = [in_parts(texts, _ASKED_AT_ONCE) for texts in (prompts, first, second)]
    for part in progress(list(zip(*parts, strict=True)), f"Judging, {judge.name}", quiet=quiet):
        found = list(judge(*part))
        if len(found) != len(part[0]):
            raise ModelError(
                f"judge '{judge.name}' gave {len(found)} verdicts on {len(part[0])} prompts: it must give one each, "
                "None where it has none"
            )
        verdicts += [_checked(verdict, judge.name) for verdict in found]
    return verdicts


def _checked(verdict: Any, name: str) -> float | None:
    if verdict is None:
        return None
    try:
        number = float(verdict)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:  # NaN neither
        raise ModelError(
            f"judge '{name}' gave the verdict {verdict!r}: it must be a number from 0 (the second answer is better) to "
            "1 (the first is), or None"
        )
    return number


def _name_of(function: Any) -> str:
    is_plain = isinstance(function, FunctionType | MethodType | BuiltinFunctionType | type)
    return function.__name__ if is_plain else type(function).__name__
