"""What to try next: rules that look at a run record and name the option to change.

`advise` is a pure function of the record. Every rule is one row of `RULES` and one function that returns a sentence
where the record shows its signs, and `None` where it does not or where the record lacks what it looks at.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from alignkit.data.reasons import DropReason
from alignkit.evaluation.figures import Figure, both_sides, figure, mapping, number
from alignkit.hub.record import RunRecord
from alignkit.hub.wording import HELD_OUT_PREFERENCES
from alignkit.trainers.ppo_diagnosis import diagnose

DISPLACEMENT_NATS = 5.0  # the threshold of the trainer's warning, which this module does not import: it loads torch
FEW_ROWS = 100  # the interval of a rate is then about 20 points wide
DROPPED = 0.05  # share of the rows read
TRUNCATED = 0.05  # share of the rows kept
OVERFIT = 0.15  # of accuracy, between training and held-out rows; and above the held-out interval
SPIKE = 10.0  # times the median gradient norm
SPIKES = 3  # logged values; one alone is chance
LORA_RATE = 1e-5  # below, adapters hardly move
HIGH_KL = 20.0  # nats per completion
LOW_EOS_RATE = 0.5  # share of completions
LOW_EXPLAINED = 0.1  # share of the returns' variance
CRITIC_ROLLOUTS = 10  # a critic that begins with random values needs some
TREND = 0.02  # change of accuracy, and of the loss, that is more than noise between two thirds of a log
TREND_POINTS = 9  # logged values, three in each third
LONGER = 1.5  # times the tokens per answer before
CONSISTENCY = 0.7  # share of pairs; one half would be chance between two answers
CALIBRATION = 0.1  # mean distance of stated chance and outcome
_PROMPT_TOO_LONG = DropReason.PROMPT_TOO_LONG.value
# What `diagnose` finds too, in other words; the rules here also read evaluations.
_TOLD_HERE = ("KL blow-up", "completions do not end", "dead critic")


class Advice(NamedTuple):
    """What a rule found: its name, and a sentence with the option to change."""

    name: str
    text: str


class Rule(NamedTuple):
    """A name in words, and the function that looks."""

    name: str
    look: Callable[[RunRecord], str | None]


def advise(record: RunRecord) -> list[Advice]:
    """Return what to try next, the gravest first; empty where no rule applies."""
    found = [Advice(rule.name, text) for rule in RULES if (text := rule.look(record)) is not None]
    return [*found, *_diagnoses(record)]


def _unfinished(record: RunRecord) -> str | None:
    if record.finished is not None:
        return None
    return "Training has not ended: go on from the last checkpoint with resume_from_checkpoint."


def _not_numbers(record: RunRecord) -> str | None:
    for entry in record.log:
        for name in ("loss", "grad_norm"):
            if name in entry and number(entry[name]) is None:
                where = f" at step {entry['step']}" if "step" in entry else ""
                return (
                    f"{name} was no number{where}: lower learning_rate, keep max_grad_norm at 1 or below, and use bf16 "
                    "where the compute dtype is fp16."
                )
    return None


def _no_evaluation(record: RunRecord) -> str | None:
    if record.evaluations or any(name.startswith("eval_") for entry in record.log for name in entry):
        return None
    return (
        "Nothing was measured on held-out rows, so nothing can be claimed: set holdout_rows, or pass an eval_dataset."
    )


def _few_rows(record: RunRecord) -> str | None:
    few = [each for each in record.evaluations if 0 < (number(each["rows"]) or 0) < FEW_ROWS]
    if not few:
        return None
    names = ", ".join(f"{each['name']} ({each['rows']})" for each in few)
    return f"Few rows were held out: {names}. Raise holdout_rows to {FEW_ROWS} or more for intervals that can decide."


def _length_alone(record: RunRecord) -> str | None:
    for evaluation in _held_out(record):
        accuracy, shorter = _metric(evaluation, "accuracy"), _metric(evaluation, "shorter")
        if accuracy is None or shorter is None or accuracy.low is None:
            continue
        best, rule = max((shorter.value, "shorter"), (1 - shorter.value, "longer"))
        if accuracy.low <= best:
            return (
                f"{_percent(accuracy.value)} of held-out pairs are ranked right, and the interval begins at "
                f"{_percent(accuracy.low)}: preferring the {rule} answer alone scores {_percent(best)}. Train on "
                "more pairs (max_train_rows) or longer (num_train_epochs) before believing that more than length was "
                "learned."
            )
    return None


def _falling_accuracy(record: RunRecord) -> str | None:
    for prefix in ("eval_", ""):
        accuracy = _either(record, f"{prefix}rewards/accuracies", f"{prefix}accuracy")
        loss = _thirds(record, f"{prefix}loss")
        if accuracy and loss and accuracy[1] < accuracy[0] - TREND and loss[1] < loss[0] - TREND:
            rows = "held-out rows" if prefix else "training rows"
            return (
                f"On {rows} accuracy fell from {_percent(accuracy[0])} to {_percent(accuracy[1])} while the loss fell: "
                "a few pairs are pushed ever further. Lower learning_rate, raise label_smoothing to 0.1, or use "
                "loss_type='ipo', whose loss stops paying for margin."
            )
    return None


def _displacement(record: RunRecord) -> str | None:
    chosen, margin = _thirds(record, "rewards/chosen"), _thirds(record, "rewards/margins")
    beta = number(record.settings.get("beta"))
    if not (chosen and margin and beta) or beta <= 0:
        return None
    nats = chosen[1] / beta
    if margin[1] > margin[0] and nats < -DISPLACEMENT_NATS and chosen[1] < chosen[0]:
        return (
            f"The margin grows while chosen answers lose probability, {-nats:.1f} nats against the reference "
            "(likelihood displacement): use loss_type=['sigmoid', 'sft'] or 'dpop', a larger beta, or a lower "
            "learning_rate."
        )
    return None


def _overfit(record: RunRecord) -> str | None:
    training = _either(record, "rewards/accuracies", "accuracy")
    for evaluation in _held_out(record):
        held_out = _metric(evaluation, "accuracy")
        if training is None or held_out is None:
            continue
        if training[1] - held_out.value > OVERFIT and training[1] > (held_out.high or held_out.value):
            return (
                f"Training accuracy reached {_percent(training[1])}, and held-out accuracy is "
                f"{_percent(held_out.value)}: use fewer num_train_epochs, a lower learning_rate or a smaller lora_r, "
                "or more pairs."
            )
    return None


def _spikes(record: RunRecord) -> str | None:
    norms = _values(record, "grad_norm")
    if len(norms) < TREND_POINTS:
        return None
    middle = statistics.median(norms)
    spikes = [norm for norm in norms if norm > SPIKE * middle > 0]
    if len(spikes) < SPIKES:
        return None
    return (
        f"The gradient norm spiked {len(spikes)} times, up to {max(spikes):.3g} at a median of {middle:.3g}: raise "
        "warmup_steps, lower learning_rate or max_grad_norm, or take larger batches (gradient_accumulation_steps)."
    )


def _small_rate(record: RunRecord) -> str | None:
    rate = number(record.settings.get("learning_rate"))
    if record.adapter is None or rate is None or not 0 < rate < LORA_RATE:
        return None
    return f"A learning_rate of {rate:g} hardly moves an adapter: try 1e-4 (1e-5 to 1e-4 is usual with LoRA)."


def _far_away(record: RunRecord) -> str | None:
    measured = [kl.value for each in record.evaluations if (kl := _metric(each, "kl", "k1")) is not None]
    kl = max([*measured, *_values(record, "objective/kl")[-1:]], default=0.0)
    if kl <= HIGH_KL:
        return None
    return (
        f"The policy is {kl:.1f} nats per completion away from its reference, where rewards are seldom to be trusted: "
        "raise kl_coef (or beta), set kl_target=6, or lower learning_rate."
    )


def _cut_off(record: RunRecord) -> str | None:
    if record.method != "ppo":  # elsewhere the length at which answers are cut teaches nothing
        return None
    measured = [
        rate.value for each in record.evaluations if (rate := _metric(each, "eos_rate", "finished")) is not None
    ]
    logged = _values(record, "completions/eos_rate")[-3:]
    rates = measured or ([statistics.fmean(logged)] if logged else [])
    if not rates or min(rates) >= LOW_EOS_RATE:
        return None
    return (
        f"Only {_percent(min(rates))} of the completions end by themselves, and the reward judges the rest cut off: "
        "raise max_completion_length, or set missing_eos_penalty=1.0."
    )


def _weak_critic(record: RunRecord) -> str | None:
    explained = _values(record, "val/explained_variance")
    if len(explained) < CRITIC_ROLLOUTS:
        return None
    last = statistics.fmean(explained[-len(explained) // 3 :])
    if last >= LOW_EXPLAINED:
        return None
    return (
        f"The critic's explained variance ended at {last:.2f}, where a useful one has 0.3 or more: raise "
        "value_learning_rate to ten times learning_rate, set critic_warmup_rollouts=10, or use "
        "advantage_estimator='rloo', which needs no critic."
    )


def _dropped(record: RunRecord) -> str | None:
    for name, preparation in _preparations(record):
        read, kept = (number(preparation.get(key)) for key in ("rows_in", "rows_kept"))
        if not read or kept is None or (read - kept) / read <= DROPPED:
            continue
        drops = mapping(preparation.get("drops"))
        counts = {reason: number(mapping(each).get("count")) or 0.0 for reason, each in drops.items()}
        reason = max(counts, key=lambda each: counts[each], default="unknown")
        option = "max_prompt_length" if reason == _PROMPT_TOO_LONG else "max_length" if "length" in reason else None
        remedy = f"raise {option}" if option else "repair these rows in the data"
        share = _percent((read - kept) / read)
        return f"{share} of the rows of '{name}' were dropped, most of them for '{reason}': {remedy}."
    return None


def _truncated(record: RunRecord) -> str | None:
    for name, preparation in _preparations(record):
        kept, cut = (number(preparation.get(key)) for key in ("rows_kept", "truncated_completions"))
        if kept and cut is not None and cut / (2 * kept) > TRUNCATED:
            share = _percent(cut / (2 * kept))
            return f"{share} of the completions of '{name}' lost their end to max_length: raise max_length."
    return None


def _longer_answers(record: RunRecord) -> str | None:
    for evaluation in record.evaluations:
        after, before = (figure(side.get("tokens")) for side in both_sides(evaluation))
        if after is not None and before is not None and after.value > LONGER * before.value > 0:
            return (
                f"Answers grew from {before.value:.0f} to {after.value:.0f} tokens: see whether the gain holds at "
                "equal length. With PPO set overlong_buffer_tokens; with DPO use loss_type='simpo', or balance the "
                "lengths in the data."
            )
    return None


def _length_wins(record: RunRecord) -> str | None:
    for evaluation in record.evaluations:
        raw, controlled = _metric(evaluation, "win_rate"), _metric(evaluation, "length_controlled_win_rate")
        lows = [found.low for found in (raw, controlled) if found is not None and found.low is not None]
        if raw is not None and controlled is not None and len(lows) == 2 and lows[0] > 0.5 >= lows[1]:
            return (
                f"The win rate of {_percent(raw.value)} is {_percent(controlled.value)} at equal length, which may be "
                "no win at all: use loss_type='simpo', or balance the lengths of both sides in the data."
            )
    return None


def _partial_judge(record: RunRecord) -> str | None:
    for evaluation in record.evaluations:
        consistency = _metric(evaluation, "order_consistency")
        if consistency is not None and consistency.value < CONSISTENCY:
            return (
                f"The judge names the same answer in both orders for {_percent(consistency.value)} of the pairs only: "
                "its win rate says little, so give a larger model or a reward model as judge."
            )
    return None


def _calibration(record: RunRecord) -> str | None:
    for evaluation in record.evaluations:
        error = _metric(evaluation, "calibration_error")
        if error is not None and error.value > CALIBRATION:
            return (
                f"The stated chances are off by {_percent(error.value)} on average: use fewer num_train_epochs, or a "
                "lower learning_rate, and do not read margins as odds."
            )
    return None


RULES: tuple[Rule, ...] = (
    Rule("values that are no numbers", _not_numbers),
    Rule("an unfinished run", _unfinished),
    Rule("no held-out evaluation", _no_evaluation),
    Rule("no better than length alone", _length_alone),
    Rule("accuracy falling while the loss falls", _falling_accuracy),
    Rule("likelihood displacement", _displacement),
    Rule("overfitting", _overfit),
    Rule("far from the reference", _far_away),
    Rule("answers that are cut off", _cut_off),
    Rule("a weak critic", _weak_critic),
    Rule("gradient spikes", _spikes),
    Rule("a learning rate too low for LoRA", _small_rate),
    Rule("answers that grew longer", _longer_answers),
    Rule("wins by length", _length_wins),
    Rule("a judge that goes by the order", _partial_judge),
    Rule("chances that are off", _calibration),
    Rule("dropped rows", _dropped),
    Rule("truncated answers", _truncated),
    Rule("few held-out rows", _few_rows),
)


def _diagnoses(record: RunRecord) -> Iterator[Advice]:
    """What the doctor of PPO runs finds at the end of the log."""
    entries = [entry for entry in record.log if "objective/kl" in entry]
    resting = int(number(record.settings.get("critic_warmup_rollouts")) or 0)
    numbers = [
        {name: found for name, value in each.items() if (found := number(value)) is not None} for each in entries
    ]
    for finding in diagnose(numbers[resting:]):
        if finding.name not in _TOLD_HERE:
            yield Advice(finding.name, f"{finding.evidence}. {finding.explanation} Change {finding.remedy}")


def _held_out(record: RunRecord) -> list[dict[str, Any]]:
    """What the run itself measured on its held-out rows; else whatever was measured later, but on no other run."""
    own = [each for each in record.evaluations if each["name"] == HELD_OUT_PREFERENCES]
    return own or [each for each in record.evaluations if not mapping(each.get("details")).get("other_run")]


def _metric(evaluation: Mapping[str, Any], *names: str) -> Figure | None:
    """The first of the metrics of that name that the evaluation has, as measured at the end."""
    after, _ = both_sides(evaluation)
    return next((found for name in names if (found := figure(after.get(name))) is not None), None)


def _values(record: RunRecord, name: str) -> list[float]:
    return [found for entry in record.log if (found := number(entry.get(name))) is not None]


def _thirds(record: RunRecord, name: str) -> tuple[float, float] | None:
    """Means of the first and of the last third of a curve that is long enough."""
    values = _values(record, name)
    if len(values) < TREND_POINTS:
        return None
    third = len(values) // 3
    return statistics.fmean(values[:third]), statistics.fmean(values[-third:])


def _either(record: RunRecord, first: str, second: str) -> tuple[float, float] | None:
    return _thirds(record, first) or _thirds(record, second)


def _preparations(record: RunRecord) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for each in record.data:
        yield str(each["name"]), mapping(each.get("preparation"))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
