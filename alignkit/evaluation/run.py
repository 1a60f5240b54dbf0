"""Everything that can be said about a finished run, as entries for its record. `alignkit eval` calls `evaluate_run`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from alignkit.data.reasons import BadRow
from alignkit.data.records import Preference, Text, to_record
from alignkit.data.sources import load_preferences
from alignkit.errors import ConfigError, DataError
from alignkit.evaluation.divergence import kl_from_reference
from alignkit.evaluation.diversity import TextSummary, summarize_texts
from alignkit.evaluation.estimates import Estimate, single_value
from alignkit.evaluation.generation import SideBySide, side_by_side
from alignkit.evaluation.injections import NothingRightError, injection_resistance
from alignkit.evaluation.judges import Judge, make_judge
from alignkit.evaluation.models import PolicyModel, load_evaluated
from alignkit.evaluation.pairs import PreferenceScores, score_preferences
from alignkit.evaluation.perplexity import perplexity
from alignkit.evaluation.prompts import held_out_prompts
from alignkit.evaluation.reward_bench import SubsetAccuracy, subset_accuracy
from alignkit.evaluation.win_rate import WinRate, win_rate
from alignkit.hub.discretion import is_path, last_part
from alignkit.hub.identity import describe_data
from alignkit.hub.record import plain
from alignkit.models.reward_files import RewardModel

Evaluation = dict[str, Any]

_SHOWN = 8  # answers that an entry holds


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """How a run is evaluated.

    Args:
        split: of datasets given by name.
        beta, loss_type: of a policy, as in training; by default 0.1 and "sigmoid".
        max_pairs: held-out pairs that are scored, the first ones; None for all.
        max_prompts: prompts that are answered, the first ones.
        max_new_tokens: length at which answers are cut.
        temperature: of the answers that are compared and judged; 0 is greedy.
        samples_per_prompt: completions of a prompt for the KL divergence, which are always drawn at temperature 1.
        injected_pairs: pairs of the data on which a judge's resistance is tried; 0 for none.
        seed: of everything that is drawn.
        quiet: show no progress.

    Raises:
        ConfigError: a number out of its range.
    """

    split: str = "test"
    beta: float | None = None
    loss_type: str | None = None
    max_pairs: int | None = None
    max_prompts: int = 32
    max_new_tokens: int = 96
    temperature: float = 0.0
    samples_per_prompt: int = 1
    injected_pairs: int = 8
    seed: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        least = {"max_prompts": 1, "max_new_tokens": 1, "samples_per_prompt": 1, "injected_pairs": 0, "max_pairs": 1}
        values = {
            "max_prompts": self.max_prompts,
            "max_new_tokens": self.max_new_tokens,
            "samples_per_prompt": self.samples_per_prompt,
            "injected_pairs": self.injected_pairs,
            "max_pairs": self.max_pairs,
        }
        for name, value in values.items():
            if value is not None and value < least[name]:
                raise ConfigError(f"{name}={value} must be {least[name]} or more")


def evaluate_run(
    model: Any,
    *,
    data: Any = None,
    prompts: Any = None,
    texts: Sequence[str | Mapping[str, Any]] | None = None,
    judge: Any = None,
    tokenizer: Any = None,
    reference: Any = None,
    options: EvaluationOptions | None = None,
    **loading: Any,
) -> list[Evaluation]:
    """Evaluate a policy or a reward model as far as what is given allows.

    Of a policy: preferences (with `data`), answers beside those of the reference, KL, a judge's win rate and its
    resistance (with `judge`), perplexity (with `texts`). Of a reward model: preferences, and accuracy by subset where
    rows have a `subset`.

    Args:
        model: the run's output directory or a name on the Hub, or a model as `load_evaluated` takes it.
        data: held-out preferences, in any format or by name.
        prompts: texts, conversations or rows to answer; by default the prompts of `data`.
        texts: documents for perplexity.
        judge: as `make_judge` takes it; it compares the policy's answers with its reference's.
        tokenizer: by default the model's own.
        reference: a separate reference, for a model without adapters.
        options: how.
        **loading: further arguments of `load_policy` or `alignkit.load_reward_model`.

    Returns:
        Entries `{"name", "rows", "metrics": {metric: {"value", "low", "high"}}, "baseline", "details"}` of plain JSON
        values, as `RunRecord.add_evaluation` takes them. The baseline has the same metrics of the reference, or is
        None. An end of an interval is None where there is none.

    Raises:
        ModelError: no such model, or a judge that cannot be loaded or does not give one verdict for each prompt.
        DataError: no usable pair, no usable prompt, or nothing to read.
        ConfigError: nothing to evaluate on, or options that would have no effect.
        TrainingError: numbers that are not finite.
    """
    options = EvaluationOptions() if options is None else options
    _check_given(data, prompts, texts, judge)
    judging = None if judge is None else make_judge(judge)  # a judge that is none is an error before anything runs
    loaded = load_evaluated(model, tokenizer, reference=reference, **loading)
    if not isinstance(loaded, PolicyModel):
        _refuse_for_reward({"prompts": prompts, "texts": texts, "judge": judge})
    elif judging is not None:
        _check_reference(loaded)
    source = None if data is None else _loaded(data, options)
    rows = None if source is None else _rows(source, options)
    pairs_from, asked_from = _described(data, source, options), _described(prompts, None, options)
    if not isinstance(loaded, PolicyModel):
        return _about(_of_reward_model(loaded, rows, options), pairs_from)
    found = [] if rows is None else _about([_preferences(loaded, rows, options)], pairs_from)
    asked = rows if prompts is None else prompts
    if asked is not None:
        found += _about(_of_answers(loaded, asked, judging, options), pairs_from if prompts is None else asked_from)
    if judging is not None and rows is not None and options.injected_pairs:
        found += _about([_resistance(judging, rows, options)], pairs_from)
    return found if texts is None else [*found, _perplexity(loaded, texts, options)]


def _check_given(data: Any, prompts: Any, texts: Any, judge: Any) -> None:
    if data is None and prompts is None and texts is None:
        raise ConfigError("there is nothing to evaluate on: give data (pairs), prompts or texts")
    if judge is not None and data is None and prompts is None:
        raise ConfigError("a judge compares answers, and nothing is asked: give prompts or data too")


def _check_reference(policy: PolicyModel) -> None:
    if not policy.bundle.can_reference:
        raise ConfigError(
            "a judge compares the policy with its reference, and this model has none: pass reference= (--reference), "
            "the model that it was trained from"
        )


def entry(
    name: str,
    rows: int,
    metrics: Mapping[str, Estimate | None],
    details: Mapping[str, Any],
    baseline: Mapping[str, Estimate | None] | None = None,
) -> Evaluation:
    """Return an entry for a run's record: plain JSON values; metrics that are None are left out."""
    found, before = (
        None if figures is None else {metric: value for metric, value in figures.items() if value is not None}
        for figures in (metrics, baseline)
    )
    return plain({"name": name, "rows": rows, "metrics": found, "baseline": before, "details": details})


def _loaded(data: Any, options: EvaluationOptions) -> Any:
    return load_preferences(data, split=options.split) if isinstance(data, str) else data


def _described(given: Any, loaded: Any, options: EvaluationOptions) -> dict[str, Any] | None:
    """What data is called in a record, which must not take them for the run's own held-out rows; None: nothing given.

    Folders are left out: what lies on this machine has its own name alone.
    """
    if given is None:
        return None
    if isinstance(given, Dataset | IterableDataset):
        loaded = given
    if loaded is not None and isinstance(loaded, Dataset):
        told = describe_data("data", loaded, None, None)
        if told["source"] is not None:
            return {"source": told["source"], "hub_id": told["hub_id"], "split": told["split"]}
    if not isinstance(given, str):
        return {"source": "given rows", "hub_id": None, "split": None}
    is_local = given == "demo" or is_path(given) or Path(given).expanduser().exists()
    return {"source": last_part(given), "hub_id": None if is_local else given, "split": options.split}


def _about(entries: list[Evaluation], data: dict[str, Any] | None) -> list[Evaluation]:
    """Entries that say what they were measured on."""
    return [{**each, "details": {**each["details"], "data": data}} for each in entries]


def _refuse_for_reward(given: Mapping[str, Any]) -> None:
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise ConfigError(
            f"this is a reward model, which answers nothing: give data (pairs), and leave {unused[0]} out"
        )


def _of_reward_model(reward: RewardModel, rows: list[Any] | None, options: EvaluationOptions) -> list[Evaluation]:
    assert rows is not None  # something was given, and nothing else may be
    if options.beta is not None or options.loss_type is not None:
        raise ConfigError("beta and loss_type belong to a policy's loss, and this is a reward model: leave them out")
    scores = score_preferences(reward, rows, quiet=options.quiet)
    found = [_preference_entry(scores)]
    by_subset = all(isinstance(rows[number].get("subset"), str) for number in scores.row_ids)
    return [*found, _subset_entry(subset_accuracy(scores, rows), len(scores.row_ids))] if by_subset else found


def _rows(loaded: Any, options: EvaluationOptions) -> list[Any]:
    rows = list(itertools.islice(loaded, options.max_pairs))
    if not rows:
        raise DataError("the data has no rows: give held-out preferences")
    return rows


def _preferences(policy: PolicyModel, rows: list[Any], options: EvaluationOptions) -> Evaluation:
    return _preference_entry(
        score_preferences(policy, rows, beta=options.beta, loss_type=options.loss_type, quiet=options.quiet)
    )


def _preference_entry(scores: PreferenceScores) -> Evaluation:
    summary = scores.summary()
    assert summary.calibration is not None  # of pairs there is one
    return entry(
        "preferences",
        summary.rows,
        {
            "accuracy": summary.accuracy,
            "margin": summary.margin,
            "loss": single_value(summary.loss),
            "calibration_error": single_value(summary.calibration.error),
            "shorter": summary.shorter,
        },
        {
            "ties": summary.ties,
            "calibration_bins": summary.calibration.as_dict()["bins"],
            "rows_in": scores.report.rows_in,
        },
    )


def _subset_entry(found: SubsetAccuracy, rows: int) -> Evaluation:
    sections = {f"section/{name}": value for name, value in found.sections.items()}
    subsets = {f"subset/{name}": value for name, value in found.subsets.items()}
    return entry("reward_bench", rows, {"overall": found.overall, **sections, **subsets}, {"rows": found.rows})


def _of_answers(policy: PolicyModel, prompts: Any, judge: Judge | None, options: EvaluationOptions) -> list[Evaluation]:
    asked = held_out_prompts(
        policy, prompts, max_new_tokens=options.max_new_tokens, split=options.split, count=options.max_prompts
    )
    sides = side_by_side(
        policy,
        asked,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        quiet=options.quiet,
    )
    found = [_answers_entry(sides)]
    if policy.bundle.can_reference:
        kl = kl_from_reference(
            policy,
            asked,
            each=options.samples_per_prompt,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            quiet=options.quiet,
        )
        figures = {"k1": kl.k1, "k3": kl.k3, "k1_per_token": kl.k1_per_token, "k3_per_token": kl.k3_per_token}
        details = {"finished": kl.finished, "max_new_tokens": options.max_new_tokens, "seed": options.seed}
        found.append(entry("kl", kl.completions, {**figures, "tokens": kl.tokens}, details))
    if judge is not None:
        judged = win_rate(asked.texts, sides.policy_texts, sides.reference_texts, judge, quiet=options.quiet)
        found.append(_win_rate_entry(judged))
    return found


def _answers_entry(sides: SideBySide) -> Evaluation:
    summaries = {"policy": (sides.policy, sides.policy_texts), "reference": (sides.reference, sides.reference_texts)}
    metrics = {
        side: _text_metrics(
            summarize_texts(
                texts, tokens=[len(one.ids) for one in completions], finished=[one.finished for one in completions]
            )
        )
        for side, (completions, texts) in summaries.items()
        if completions
    }
    shown = [{"prompt": one.prompt, "reference": one.reference, "policy": one.policy} for one in sides.answers(_SHOWN)]
    same = sum(one == other for one, other in zip(sides.policy_texts, sides.reference_texts, strict=False))
    details = {"samples": shown, "same_as_reference": same}
    return entry("answers", len(sides.policy), metrics["policy"], details, metrics.get("reference"))


def _text_metrics(summary: TextSummary) -> dict[str, Estimate | None]:
    return {
        "distinct_1": single_value(summary.distinct_1),
        "distinct_2": single_value(summary.distinct_2),
        "words": summary.words,
        "tokens": summary.tokens,
        "finished": summary.finished,
    }


def _win_rate_entry(found: WinRate) -> Evaluation:
    return entry(
        "win_rate",
        found.rows,
        {
            "win_rate": found.win_rate,
            "length_controlled_win_rate": found.length_controlled.win_rate,
            "order_consistency": found.order_consistency,
        },
        {
            **{name: value for name, value in found.as_dict().items() if name not in ("win_rate", "order_consistency")},
            "length_effect": found.length_controlled.length,
        },
    )


def _resistance(judge: Judge, rows: list[Any], options: EvaluationOptions) -> Evaluation:
    pairs = _text_pairs(rows, options.injected_pairs)
    prompts = [prompt for prompt, _, _ in pairs]
    better, worse = [chosen for _, chosen, _ in pairs], [rejected for _, _, rejected in pairs]
    try:
        found = injection_resistance(judge, prompts, better, worse, quiet=options.quiet)
    except NothingRightError as error:  # what else was measured must not be lost for it
        return entry("injections", len(pairs), {}, {"judge": judge.name, "right": 0, "reason": str(error)})
    flips = {f"flip_rate/{result.name}": result.flip_rate for result in found.results}
    return entry("injections", found.pairs, {"flip_rate": found.flip_rate, **flips}, found.as_dict())


def _text_pairs(rows: list[Any], count: int) -> list[tuple[Text, str, str]]:
    """The first pairs of the data as text: prompt, chosen, rejected."""
    pairs: list[tuple[Text, str, str]] = []
    for row in rows:
        try:
            record = to_record(row)
        except BadRow:
            continue
        if isinstance(record, Preference):
            pairs.append((record.prompt, _plain(record.chosen), _plain(record.rejected)))
        if len(pairs) == count:
            break
    if not pairs:
        raise DataError("the data holds no pair as text, which a judge needs: give text or messages, not token ids")
    return pairs


def _plain(completion: Text) -> str:
    if isinstance(completion, str):
        return completion.strip()
    return "\n\n".join(str(message.get("content") or "") for message in completion)


def _perplexity(policy: PolicyModel, texts: Sequence[Any], options: EvaluationOptions) -> Evaluation:
    found = perplexity(policy, texts, quiet=options.quiet)
    metrics = {"perplexity": found.policy, "ratio": found.ratio}
    baseline = None if found.reference is None else {"perplexity": found.reference}
    details = {"tokens": found.tokens, "cut": found.cut, "skipped": found.skipped}
    return entry("perplexity", found.documents, metrics, details, baseline)
