"""Align a language model with single answers marked good or bad (KTO, arXiv 2402.01306), training a LoRA adapter.

The embedded default (each pair of the preference set taken apart into a good and a bad answer; no GPU, some minutes):

    accelerate launch recipes/kto_lora.py

Your own answers, one JSON line each: {"prompt": "...", "completion": "...", "label": true}

    accelerate launch recipes/kto_lora.py --dataset_name answers.jsonl --holdout_rows 100 --output_dir outputs/mine

Both kinds must occur on both sides of the split: shuffle a file that is sorted by label first.

Every field of ScriptArguments, ModelArguments and DPOConfig is an option; `--help` lists them. Where one kind of answer
is much rarer than the other, set --desirable_weight or --undesirable_weight so that both weigh about the same.

Left out here: pairs trained on as pairs (recipes/dpo_lora.py), answers side by side, safety evaluation, and publishing.
"""

from __future__ import annotations

from typing import Any

from alignkit.cli import ModelArguments, RecipeParser, ScriptArguments, plain_errors
from alignkit.cli.inputs import load_splits, new_adapter
from alignkit.data.show import show_example
from alignkit.errors import ConfigError
from alignkit.evaluation.finish import finish_run, record_preferences
from alignkit.evaluation.preference import summarize_preferences
from alignkit.evaluation.report import before_after_table, how_to_load, report_console
from alignkit.models.load import training_device
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer

DEFAULTS = {
    "loss_type": ["kto"],
    "output_dir": "outputs/kto_lora",
    "learning_rate": 1e-4,
    "num_train_epochs": 1,
    "logging_steps": 5,
    # The KL estimate is a mean over the micro-batch, so a small one makes it noisy.
    "per_device_train_batch_size": 16,
    "activation_checkpointing": training_device().type != "cpu",
}


def main() -> None:
    """Load, show, measure, train, measure, save."""
    # 1. Options: the defaults above, then --config, then the command line.
    parser = RecipeParser((ScriptArguments, ModelArguments, DPOConfig), description="KTO with a LoRA adapter")
    script, model, args = parser.parse(defaults=DEFAULTS)
    if args.loss_type != ["kto"]:
        raise ConfigError(f"loss_type={args.loss_type}: this recipe is for 'kto'; use recipes/dpo_lora.py for pairs.")
    args.model_init_kwargs = {**model.to_model_init_kwargs(), **(args.model_init_kwargs or {})}

    # 2. Data and model. A paired dataset gives two rows a pair; mismatched completions for the KL come from the next.
    train, test = load_splits(script)
    trainer = DPOTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        quantization_config=model.to_quantization_config(),
        peft_config=new_adapter(model),
    )
    console = report_console(quiet=not trainer.is_world_process_zero())
    for report in trainer.reports.values():
        console.print(report.table())
    first: Any = next(iter(trainer.train_dataset))
    console.print(show_example(first, trainer.processing_class))

    # 3. Before, training, after: how well rewards rank good answers above bad ones that were not trained on.
    held_out = trainer.eval_dataset
    before = summarize_preferences(trainer, held_out)
    trainer.train(args.resume_from_checkpoint)
    after = summarize_preferences(trainer, held_out)
    trainer.save_model()

    # 4. What came of it; with --push_to_hub, report and card go up too.
    if trainer.is_world_process_zero():
        record_preferences(trainer.record, before, after)
        console.print(before_after_table(before, after))
        console.print(finish_run(trainer.record, args.output_dir).lines(), markup=False, highlight=False)
        console.print(how_to_load(args.output_dir), markup=False, highlight=False)
    if args.push_to_hub:
        trainer.push_to_hub("Add what was measured")


if __name__ == "__main__":
    with plain_errors():
        main()
