"""Align a language model with a reward by PPO, training a LoRA adapter and a critic on one frozen base.

The embedded default (a 135M chat model learns to answer in a positive tone, no GPU, some minutes):

    accelerate launch recipes/ppo_lora.py

A reward model of your own, several of them, a real model and card:

    accelerate launch recipes/reward_lora.py && accelerate launch recipes/ppo_lora.py --reward_model outputs/reward_lora
    accelerate launch recipes/ppo_lora.py --reward_model A --reward_model B --reward_weights 1 0.5
    accelerate launch recipes/ppo_lora.py --config recipes/configs/ppo-llama-3.1-8b-12gb.yaml

Every field of ScriptArguments, ModelArguments, RewardArguments and PPOConfig is an option; `--help` lists them.
The default reward, VADER's sentiment, can be checked at a glance. It counts cheerful words: it teaches tone, no more.

Left out here: training the reward model, judging answers by anything but the reward trained on, and publishing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alignkit.cli import ModelArguments, RecipeParser, RewardArguments, ScriptArguments, plain_errors
from alignkit.cli.inputs import load_splits, new_adapter
from alignkit.data.show import show_example
from alignkit.errors import ConfigError
from alignkit.evaluation.finish import finish_run, record_rollouts
from alignkit.evaluation.report import answers_table, how_to_load, report_console
from alignkit.evaluation.rollouts import rated_side_by_side, rollouts_table, summarize_rollouts
from alignkit.models.load import training_device
from alignkit.trainers.ppo import PPOTrainer
from alignkit.trainers.ppo_config import PPOConfig

DEFAULTS = {
    "output_dir": "outputs/ppo_lora",
    "learning_rate": 2e-4,
    "value_learning_rate": 1e-3,  # the critic's head starts from nothing
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "num_mini_batches": 2,  # so 16 prompts a rollout, with 4 optimizer steps for each
    "num_ppo_epochs": 2,
    "max_completion_length": 32,
    "logging_steps": 4,  # a rollout
    # Recomputing activations saves memory, which is scarce on a GPU, and costs time, which is scarce on a CPU.
    "activation_checkpointing": training_device().type != "cpu",
}
SHOWN = 4  # held-out prompts whose answers are shown before and after


def sentiment_reward() -> Callable[..., list[float]]:
    """Return a reward: VADER's compound sentiment of each answer, from -1 (negative) to 1 (positive)."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ConfigError(
            'The default reward needs the package vaderSentiment: pip install "alignkit[demo]", or give --reward_model'
        ) from error
    analyzer = SentimentIntensityAnalyzer()

    def sentiment(completions: list[Any], **_: Any) -> list[float]:
        texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in completions]
        return [analyzer.polarity_scores(text)["compound"] for text in texts]

    return sentiment


def main() -> None:
    """Load, show, measure, train, measure, save."""
    # 1. Options: the defaults above, then --config, then the command line.
    options = (ScriptArguments, ModelArguments, RewardArguments, PPOConfig)
    parser = RecipeParser(options, description="PPO with a LoRA adapter")
    script, model, reward, args = parser.parse(defaults=DEFAULTS)
    args.model_init_kwargs = {**model.to_model_init_kwargs(), **(args.model_init_kwargs or {})}

    # 2. Prompts, rewards and model. Prompts that cannot be used are counted, and too many of them are an error.
    train, test = load_splits(script)
    trainer = PPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=reward.reward_model or sentiment_reward(),
        args=args,
        train_dataset=train,
        eval_dataset=test,
        quantization_config=model.to_quantization_config(),
        peft_config=new_adapter(model),
    )
    console = report_console(quiet=not trainer.is_world_process_zero())
    for report in trainer.reports.values():
        console.print(report.table())
    held_out: Any = trainer.eval_dataset
    console.print(show_example(held_out[0], trainer.processing_class))

    # 3. Before, training, after: on prompts that are not trained on.
    before = summarize_rollouts(trainer, held_out)
    trainer.train(args.resume_from_checkpoint)
    after = summarize_rollouts(trainer, held_out)
    trainer.save_model()

    # 4. What came of it; with --push_to_hub, report and card go up too.
    if trainer.is_world_process_zero():
        answers = rated_side_by_side(before, after, SHOWN)
        record_rollouts(trainer.record, before, after)
        console.print(rollouts_table(before, after), answers_table(answers))
        console.print(finish_run(trainer.record, args.output_dir).lines(), markup=False, highlight=False)
        console.print(how_to_load(args.output_dir), markup=False, highlight=False)
    if args.push_to_hub:
        trainer.push_to_hub("Add what was measured")


if __name__ == "__main__":
    with plain_errors():
        main()
