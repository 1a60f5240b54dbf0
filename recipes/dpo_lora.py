"""Align a language model with preferences by DPO, training a LoRA adapter.

The embedded default (a 135M chat model and a small preference set, no GPU, some minutes):

    accelerate launch recipes/dpo_lora.py

Real models and cards, several GPUs, your own file:

    accelerate launch recipes/dpo_lora.py --config recipes/configs/qwen3-4b-12gb.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/dpo_lora.py --config FILE.yaml
    accelerate launch recipes/dpo_lora.py --dataset_name pairs.jsonl --holdout_rows 300 --output_dir outputs/mine

Every field of ScriptArguments, ModelArguments and DPOConfig is an option; `--help` lists them.

Left out here: a supervised stage before (recipes/sft_lora.py), unpaired feedback (recipes/kto_lora.py), merging the
adapter into its base, safety evaluation, and publishing (`alignkit publish outputs/dpo_lora ID`).
"""

from __future__ import annotations

from typing import Any

from alignkit.cli import ModelArguments, RecipeParser, ScriptArguments, plain_errors
from alignkit.cli.inputs import load_splits, new_adapter
from alignkit.data.show import show_example
from alignkit.evaluation.finish import finish_run, record_answers, record_preferences
from alignkit.evaluation.generation import compare_answers
from alignkit.evaluation.preference import summarize_preferences
from alignkit.evaluation.report import answers_table, before_after_table, how_to_load, report_console
from alignkit.models.load import training_device
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer

DEFAULTS = {
    "output_dir": "outputs/dpo_lora",
    "learning_rate": 1e-4,  # LoRA; full fine-tuning wants about 1e-6
    "num_train_epochs": 1,
    "logging_steps": 5,
    # Recomputing activations saves memory, which is scarce on a GPU, and costs time, which is scarce on a CPU.
    "activation_checkpointing": training_device().type != "cpu",
}
PROMPTS = 4  # held-out prompts that are answered before and after


def main() -> None:
    """Load, show, measure, train, measure, save."""
    # 1. Options: the defaults above, then --config, then the command line.
    parser = RecipeParser((ScriptArguments, ModelArguments, DPOConfig), description="DPO with a LoRA adapter")
    script, model, args = parser.parse(defaults=DEFAULTS)
    args.model_init_kwargs = {**model.to_model_init_kwargs(), **(args.model_init_kwargs or {})}

    # 2. Data and model. Rows that cannot be used are counted, and too many of them are an error.
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

    # 3. Before, training, after: on rows that are not trained on.
    held_out = trainer.eval_dataset
    before = summarize_preferences(trainer, held_out)
    trainer.train(args.resume_from_checkpoint)
    after = summarize_preferences(trainer, held_out)
    trainer.save_model()

    # 4. What came of it; with --push_to_hub, report and card go up too.
    if trainer.is_world_process_zero():
        prompts = [row["prompt_ids"] for row, _ in zip(held_out, range(PROMPTS), strict=False)]
        answers = compare_answers(trainer, prompts)
        record_preferences(trainer.record, before, after)
        record_answers(trainer.record, answers)
        console.print(before_after_table(before, after))
        if answers:
            console.print(answers_table(answers))
        console.print(finish_run(trainer.record, args.output_dir).lines(), markup=False, highlight=False)
        console.print(how_to_load(args.output_dir), markup=False, highlight=False)
    if args.push_to_hub:
        trainer.push_to_hub("Add what was measured")


if __name__ == "__main__":
    with plain_errors():
        main()
