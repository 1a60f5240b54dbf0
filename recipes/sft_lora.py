"""Teach a language model the chosen answers of a preference set (supervised fine-tuning), training a LoRA adapter.

This is the usual step before DPO: the policy then starts where preferred answers are likely.

    accelerate launch recipes/sft_lora.py
    accelerate launch recipes/dpo_lora.py --model_name_or_path outputs/sft_lora

The second command trains the same adapter on, and the adapter as it was is the reference. It needs `alignkit[sft]`:
training is TRL's SFTTrainer; data, model and adapter are prepared as in the other recipes, so the ids are DPO's.

Every field of ScriptArguments, ModelArguments and TRL's SFTConfig is an option; `--help` lists them.

Left out here: unpaired data, an evaluation of the answers (recipes/dpo_lora.py has one), and publishing.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch

from alignkit.cli import ModelArguments, RecipeParser, ScriptArguments, plain_errors
from alignkit.cli.inputs import load_splits, new_adapter
from alignkit.data.prepare import prepare_preferences
from alignkit.data.show import show_example
from alignkit.evaluation.finish import finish_run
from alignkit.evaluation.report import how_to_load, report_console
from alignkit.models.load import (
    add_adapter,
    compute_dtype,
    keep_adapters_fp32,
    load_model,
    load_tokenizer,
    training_device,
)
from alignkit.trainers.recording import begin_record

try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    sys.stderr.write('error: this recipe needs TRL and Python 3.11: pip install "alignkit[sft]"\n')
    sys.exit(2)

DEFAULTS = {
    "output_dir": "outputs/sft_lora",
    "learning_rate": 2e-4,
    "num_train_epochs": 1,
    "logging_steps": 5,
    "eval_strategy": "epoch",
    "completion_only_loss": True,
    "use_cpu": training_device().type == "cpu",
    "bf16": compute_dtype() == torch.bfloat16,  # not on a T4, whose 16-bit arithmetic is fp16
    "fp16": compute_dtype() == torch.float16,
    "gradient_checkpointing": training_device().type != "cpu",
}


def as_text(row: dict) -> dict:
    """Turn a prepared pair into what SFTTrainer reads; the mask says which tokens count: those of the answer."""
    prompt, chosen = row["prompt_ids"], row["chosen_ids"]
    return {"input_ids": prompt + chosen, "completion_mask": [0] * len(prompt) + [1] * len(chosen)}


def main() -> None:
    """Load, show, train, save."""
    # 1. Options: the defaults above, then --config, then the command line.
    parser = RecipeParser((ScriptArguments, ModelArguments, SFTConfig), description="SFT with a LoRA adapter")
    script, model_args, args = parser.parse(defaults=DEFAULTS)
    peft_config = new_adapter(model_args)
    name, remote = model_args.model_name_or_path, {"trust_remote_code": args.trust_remote_code}
    kwargs = model_args.to_model_init_kwargs() | (args.model_init_kwargs or {})
    args.model_init_kwargs = None  # the model is loaded here

    # 2. Data: tokenized, cut and counted as for DPO; of each pair only the chosen answer is used.
    tokenizer = load_tokenizer(name, revision=kwargs.get("revision"), **remote)
    console = report_console(quiet=args.process_index != 0)
    prepare = partial(prepare_preferences, tokenizer=tokenizer, max_length=args.max_length)
    splits = load_splits(script)
    prepared = [prepare(rows, name=name) for rows, name in zip(splits, ("train", "eval"), strict=True)]
    for _, report in prepared:
        console.print(report.table())
    console.print(show_example(next(iter(prepared[0][0])), tokenizer))
    train, test = (rows.map(as_text, remove_columns=rows.column_names) for rows, _ in prepared)

    # 3. Model: a frozen base in the device's dtype, and an fp32 adapter on it.
    if not model_args.use_peft:
        kwargs.setdefault("dtype", "float32")  # what trains is fp32
    model: Any = load_model(
        name, quantization_config=model_args.to_quantization_config(), model_init_kwargs=kwargs, **remote
    )
    if peft_config is not None:
        model = add_adapter(model, peft_config)
    trainer = SFTTrainer(model=model, args=args, train_dataset=train, eval_dataset=test, processing_class=tokenizer)
    if model_args.use_peft:
        keep_adapters_fp32(model)  # SFTTrainer rounds those of a quantized base to bf16

    # 4. Train, measure, save: what was done, on which rows, with which result.
    record = begin_record(trainer, "sft", *splits, {report.name: report for _, report in prepared})
    before = None if args.eval_strategy == "no" else trainer.evaluate()["eval_loss"]
    trainer.train(args.resume_from_checkpoint)
    trainer.save_model()
    if before is not None:
        after = trainer.evaluate()["eval_loss"]
        record.add_evaluation(
            "held-out text", {"loss": after}, rows=prepared[1][1].rows_kept, baseline={"loss": before}
        )
        console.print(f"held-out loss: {before:.4f} before, {after:.4f} after")
    if trainer.is_world_process_zero():
        console.print(finish_run(record, args.output_dir).lines(), markup=False, highlight=False)
    console.print(how_to_load(args.output_dir), markup=False, highlight=False)


if __name__ == "__main__":
    with plain_errors():
        main()
