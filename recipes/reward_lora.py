"""Train a reward model from preferences (Bradley-Terry): a LoRA adapter and a scalar head on a language model.

The embedded default (a 135M chat model and a small preference set, no GPU, some minutes):

    accelerate launch recipes/reward_lora.py

Real models, an ensemble of heads, your own file:

    accelerate launch recipes/reward_lora.py --model_name_or_path Qwen/Qwen3-4B --load_in_4bit --num_heads 4
    accelerate launch recipes/reward_lora.py --dataset_name pairs.jsonl --holdout_rows 300 --output_dir outputs/mine

Every field of ScriptArguments, ModelArguments and RewardConfig is an option; `--help` lists them.

The result is an adapter for transformers' sequence classifiers, and a reward that a policy on the same base can be
trained against.

Left out here: several objectives, rewards for single steps of an answer, and publishing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignkit.cli import ModelArguments, RecipeParser, ScriptArguments, plain_errors
from alignkit.cli.inputs import load_splits, new_adapter
from alignkit.data.show import show_example
from alignkit.evaluation.finish import finish_run, record_preferences
from alignkit.evaluation.preference import summarize_rewards
from alignkit.evaluation.report import before_after_table, report_console
from alignkit.models.load import training_device
from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig

DEFAULTS = {
    "output_dir": "outputs/reward_lora",
    "num_train_epochs": 1,
    "logging_steps": 5,
    "center_rewards_coefficient": 0.01,  # only differences matter to the loss; this keeps rewards around 0
    # Recomputing activations saves memory, which is scarce on a GPU, and costs time, which is scarce on a CPU.
    "activation_checkpointing": training_device().type != "cpu",
}


def main() -> None:
    """Load, show, measure, train, measure, save."""
    # 1. Options: the defaults above, then --config, then the command line.
    parser = RecipeParser((ScriptArguments, ModelArguments, RewardConfig), description="A reward model with LoRA")
    script, model, args = parser.parse(defaults=DEFAULTS)
    args.model_init_kwargs = {**model.to_model_init_kwargs(), **(args.model_init_kwargs or {})}

    # 2. Data and model. Rows that cannot be used, or are too long to be judged, are counted.
    train, test = load_splits(script)
    trainer = RewardTrainer(
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
    held_out: Any = trainer.eval_dataset
    before = summarize_rewards(trainer, held_out)
    trainer.train(args.resume_from_checkpoint)
    after = summarize_rewards(trainer, held_out)
    trainer.save_model()

    # 4. What came of it; with --push_to_hub, report and card go up too.
    if trainer.is_world_process_zero():
        folder = Path(args.output_dir)
        record_preferences(trainer.record, before, after)
        console.print(before_after_table(before, after))
        console.print(finish_run(trainer.record, folder).lines(), markup=False, highlight=False)
        load = f'model, tokenizer = alignkit.load_reward_model("{folder}")  # or see {folder / "README.md"}'
        console.print(load, markup=False, highlight=False)
    if args.push_to_hub:
        trainer.push_to_hub("Add what was measured")


if __name__ == "__main__":
    with plain_errors():
        main()
