"""`alignkit eval`: what a model is worth on data that it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignkit.cli.commands_run import evaluation_table
from alignkit.cli.output import AsJson, console, print_json
from alignkit.errors import ConfigError
from alignkit.hub.record import RECORD_FILE, RunRecord

if TYPE_CHECKING:
    from alignkit.evaluation.run import EvaluationOptions

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A run's folder, a name on the Hub, or a reward model.", show_default=False),
]
Data = Annotated[str | None, typer.Option(help="Held-out preferences: a file, folder, Hub id, or 'demo'.")]
Split = Annotated[str, typer.Option(help="Split of the data, with a slice if you like: 'train[-300:]'.")]
Prompts = Annotated[
    str | None, typer.Option(help="Prompts to answer, as --data is given; by default those of the data.")
]
Texts = Annotated[Path | None, typer.Option(help="Text file for perplexity: documents are separated by empty lines.")]
JudgeName = Annotated[
    str | None, typer.Option(help="Who compares answers: 'reward:PATH', 'model:PATH' or 'NAME@https://host/v1'.")
]
Reference = Annotated[
    str | None,
    typer.Option(help="What a model without an adapter was trained from: a folder or a name on the Hub."),
]
Frontier = Annotated[
    str | None,
    typer.Option(help="Reward model by which every checkpoint in the run's folder gets its reward, beside its KL."),
]
Beta = Annotated[float | None, typer.Option(help="Of a policy's loss; by default the run's own, or 0.1.")]
MaxPairs = Annotated[int | None, typer.Option(help="Score only the first pairs.")]
MaxPrompts = Annotated[int, typer.Option(help="Answer the first prompts.")]
MaxNewTokens = Annotated[int, typer.Option(help="Length at which answers are cut, in tokens.")]
Temperature = Annotated[float, typer.Option(help="Of the answers that are compared; 0 is greedy.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="Pack the base's weights (NF4).")]
Keep = Annotated[
    bool, typer.Option("--record/--no-record", help="Add what is found to the run's record, report and card.")
]


def evaluate(
    model: Model,
    data: Data = None,
    split: Split = "test",
    prompts: Prompts = None,
    texts: Texts = None,
    judge: JudgeName = None,
    reference: Reference = None,
    frontier: Frontier = None,
    beta: Beta = None,
    max_pairs: MaxPairs = None,
    max_prompts: MaxPrompts = 32,
    max_new_tokens: MaxNewTokens = 96,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    load_in_4bit: FourBit = False,
    keep: Keep = True,
    as_json: AsJson = False,
) -> None:
    """Evaluate a policy or a reward model on held-out data, with 95 % intervals.

    A policy: accuracy, margin and calibration on pairs; answers beside those of its reference; KL; a judge's win rate,
    both orders asked, also with length taken out; perplexity. A reward model: accuracy, by subset where rows name one.

    [bold]Examples[/bold]

      alignkit eval outputs/dpo_lora --data demo

      alignkit eval outputs/dpo_lora --data pairs.jsonl --split "train[-300:]" --judge reward:outputs/reward_lora

      alignkit eval outputs/ppo_lora --data pairs.jsonl --frontier outputs/reward_lora

      alignkit eval me/my-adapter --data owner/pairs --judge gpt-4o-mini@https://api.openai.com/v1 --json
    """
    from alignkit.evaluation.run import EvaluationOptions, evaluate_run
    from alignkit.models.load import nf4

    record, asked = _record_of(model), prompts or data
    if frontier is not None and asked is None:
        raise ConfigError("--frontier needs prompts to answer: give --prompts, or --data.")
    options = EvaluationOptions(
        split=split,
        beta=record.settings.get("beta") if beta is None and record is not None else beta,
        max_pairs=max_pairs,
        max_prompts=max_prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        quiet=as_json,
    )
    loading: dict[str, Any] = {"quantization_config": nf4()} if load_in_4bit else {}
    given = {"data": data, "prompts": prompts, "judge": judge, "reference": reference}
    documents = None if texts is None else _documents(texts)
    found = evaluate_run(model, options=options, texts=documents, **given, **loading)
    if frontier is not None and asked is not None:
        found.append(_frontier(model, frontier, asked, options, loading))
    _print(model, found, as_json)
    if keep and record is not None:  # last, since a folder that cannot be written must not cost what was measured
        written = _add(found, record, Path(model).expanduser())
        typer.echo(written, err=as_json)


def _frontier(
    run: str, reward: str, prompts: str, options: EvaluationOptions, loading: dict[str, Any]
) -> dict[str, Any]:
    from alignkit.evaluation.frontier import frontier_entry, reward_kl_frontier

    how = {"max_new_tokens": options.max_new_tokens, "each": options.samples_per_prompt, "seed": options.seed}
    drawn = {"count": options.max_prompts, "split": options.split, "quiet": options.quiet}
    return frontier_entry(reward_kl_frontier(Path(run).expanduser(), prompts, reward, **how, **drawn, **loading))


def _print(model: str, found: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json({"model": model, "evaluations": found})
        return
    for evaluation in found:
        console().print(evaluation_table(evaluation))


def _documents(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--texts: '{path}' cannot be read as UTF-8 text ({error}).") from error
    found = [part.strip() for part in text.split("\n\n") if part.strip()]
    if not found:
        raise ConfigError(f"--texts: '{path}' holds no text.")
    return found


def _record_of(model: str) -> RunRecord | None:
    folder = Path(model).expanduser()
    return RunRecord.load(folder) if (folder / RECORD_FILE).is_file() else None


def _add(found: list[dict[str, Any]], record: RunRecord, folder: Path) -> str:
    """Add evaluations to the record of a run, and write its report and card anew."""
    from alignkit.evaluation.finish import finish_run

    for each in found:
        measured = {key: each[key] for key in ("rows", "baseline", "details")}
        record.add_evaluation(each["name"], each["metrics"], **measured)
    try:
        return finish_run(record, folder).lines()
    except OSError as error:
        raise ConfigError(
            f"what was measured could not be added to the run in '{folder}': {error.strerror}. Pass --no-record, "
            "or make the folder writable."
        ) from error
