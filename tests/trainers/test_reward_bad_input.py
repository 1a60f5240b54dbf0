"""What `RewardTrainer` must refuse: each with its own message, before any forward pass."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from alignkit.errors import ConfigError, DataError, ModelError
from alignkit.models.adapters import add_adapter
from alignkit.trainers.ppo_config import PPOConfig
from tests.bad_input import (
    ANSWER,
    TEMPLATE,
    USER,
    Attempts,
    Case,
    Made,
    reward_trainer,
    save_models,
    tokenizer_with,
)
from tests.model_factory import tiny_model
from tests.rollout.reward_samples import tiny_classifier
from tests.tiny_preferences import lora, text_rows, token_rows

OTHER = {**ANSWER, "content": "no"}


def row(**changed: Any) -> list[dict[str, Any]]:
    """Four rows of a pair of texts, or of what is put in its place."""
    return [{"prompt": "a", "chosen": "b", "rejected": "c", **changed}] * 4


def in_folder(name: str) -> Made:
    return Made(lambda folder: str(folder / name))


CHAT = tokenizer_with(chat_template=TEMPLATE)

CASES: dict[str, Case] = {
    # --- rows ---
    "no dataset": Case({"train_dataset": None}, ConfigError, "train_dataset is required: pass a dataset of prefer"),
    "a file's name": Case({"train_dataset": "pairs.jsonl"}, DataError, "this is a str. Read a file with datasets.load"),
    "a dict of datasets": Case(
        {"train_dataset": DatasetDict({"train": Dataset.from_list(row())})}, DataError, r"a dict of datasets \['tr"
    ),
    "no rows": Case({"train_dataset": []}, DataError, "train: the dataset has no rows"),
    "no rows to evaluate on": Case({"eval_dataset": []}, DataError, "eval: the dataset has no rows"),
    "a stream without end": Case(
        {"train_dataset": IterableDataset.from_generator(lambda: iter(row())), "max_steps": -1},
        ConfigError,
        "the training set is a stream, whose length is not known: set max_steps",
    ),
    "other columns": Case({"train_dataset": [{"text": "a"}]}, DataError, r"The columns \['text'\] make no format"),
    "prompts alone": Case({"train_dataset": [{"prompt": "a"}]}, DataError, r"The columns \['prompt'\] make no format"),
    "single completions": Case(
        {"train_dataset": [{"prompt": "a", "completion": "b", "label": True}] * 4},
        DataError,
        "the rows are unpaired .* DPOTrainer and loss_type='kto', or give rows with chosen and rejected",
    ),
    "identical sides": Case(
        {"train_dataset": row(rejected="b")}, DataError, "(?s)dropped: identical .*chosen and rejected are the same"
    ),
    "an empty side": Case({"train_dataset": row(rejected=" ")}, DataError, "(?s)dropped: empty .*rejected is empty"),
    "a side of None": Case({"train_dataset": row(chosen=None)}, DataError, "(?s)dropped: not text .*chosen is None"),
    "an empty prompt": Case({"train_dataset": row(prompt="")}, DataError, "(?s)dropped: empty .*prompt is empty"),
    "a margin in words": Case({"train_dataset": row(margin="big")}, DataError, "(?s)not a number .*margin is 'big'"),
    "no margin in a row": Case({"train_dataset": row(margin=None)}, DataError, "(?s)not a number .*margin is None"),
    "a margin of NaN": Case({"train_dataset": row(margin=math.nan)}, DataError, "(?s)not a number .*margin is nan"),
    "a negative weight": Case({"train_dataset": row(weight=-1.0)}, DataError, r"(?s)weight is -1\.0, below 0"),
    "the user speaks last": Case(
        {"train_dataset": row(prompt=[USER], chosen=[ANSWER, USER], rejected=[OTHER]), "processing_class": CHAT},
        DataError,
        "(?s)dropped: wrong roles .*chosen ends with user, not with assistant",
    ),
    "conversations without a template": Case(
        {"train_dataset": row(prompt=[USER], chosen=[ANSWER], rejected=[OTHER])},
        DataError,
        "conversations, but the tokenizer has no chat template",
    ),
    "rows too long": Case({"max_length": 5}, DataError, "(?s)none of the 8 rows.*max_length=5"),
    "ids that the tokenizer lacks": Case(
        {"train_dataset": [{"prompt_ids": [4], "chosen_ids": [500], "rejected_ids": [6]}] * 4},
        DataError,
        "(?s)chosen_ids holds 500, the tokenizer's ids end at",
    ),
    "texts for ids": Case(
        {"train_dataset": [{"prompt_ids": "a", "chosen_ids": [5], "rejected_ids": [6]}] * 4},
        DataError,
        "(?s)dropped: not token ids .*prompt_ids is str",
    ),
    # --- models and tokenizers ---
    "letters that the model lacks": Case(
        {"model": Made(lambda folder: tiny_model("llama", vocab_size=100))},
        ModelError,
        r"train: the tokenizer makes token \d+, and the model's vocabulary has 100 tokens",
    ),
    "evaluation that the model cannot read": Case(
        {
            "model": Made(lambda folder: tiny_model("llama", vocab_size=100)),
            "train_dataset": [{"prompt": "1", "chosen": "2", "rejected": "3"}] * 4,
            "eval_dataset": text_rows(4),
        },
        ModelError,
        r"eval: the tokenizer makes token \d+, and the model's vocabulary has 100 tokens",
    ),
    "rows beyond learned positions": Case(
        {"model": Made(lambda folder: tiny_model("gpt2", n_positions=16)), "train_dataset": row(prompt="a" * 20)},
        DataError,
        "train: the longest row has 22 tokens, and the model has 16 positions: set max_length=16",
    ),
    "no end of a text": Case(
        {"processing_class": tokenizer_with(eos_token=None)}, DataError, "The tokenizer has no EOS token, so compl"
    ),
    "neither padding nor end": Case(
        {"processing_class": tokenizer_with(pad_token=None, eos_token=None)}, ModelError, "no pad token and no end-of"
    ),
    "an end that is no token": Case({"eos_token": "</t>"}, ConfigError, r"eos_token='</t>' is not .* mean '</s>'\?"),
    "a template that is not there": Case(
        {"chat_template_path": "nowhere.jinja"}, ConfigError, "'nowhere.jinja' cannot be read: No such file"
    ),
    "a number as model": Case({"model": 3}, ModelError, "model must be a name, a path, .* not int"),
    "a classifier": Case(
        {"model": Made(lambda folder: tiny_classifier("llama"))},
        ModelError,
        "LlamaForSequenceClassification is no causal language model, .* load it with AutoModelForCausalLM",
    ),
    "a policy's adapter": Case(
        {"model": in_folder("policy"), "peft_config": None}, ModelError, "is an adapter of a language model. Merge it"
    ),
    "a loaded policy": Case(
        {"model": Made(lambda folder: add_adapter(tiny_model("llama"), lora())), "peft_config": None},
        ModelError,
        "no reward head 'score' to train. Pass the base and a peft_config",
    ),
    "one head of three": Case(
        {"model": in_folder("ensemble"), "peft_config": None},
        ModelError,
        "the reward adapter has 3 heads and num_heads=1: set num_heads=3",
    ),
    "an adapter on an adapter": Case({"model": in_folder("reward")}, ModelError, "The model has an adapter already"),
    "an adapter of another task": Case(
        {"peft_config": lora(task_type="TOKEN_CLS")}, ModelError, "task_type 'TOKEN_CLS': a reward model needs"
    ),
    "an adapter on the output layer": Case(
        {"peft_config": lora(target_modules=["lm_head"])}, ModelError, "a reward model computes no logits: leave it out"
    ),
    # --- options ---
    "another trainer's options": Case({"args": PPOConfig()}, ConfigError, "args must be a RewardConfig, not a PPOC"),
    "an unknown option": Case({"num_head": 3}, TypeError, "num_head"),
    "no head": Case({"num_heads": 0}, ConfigError, "num_heads=0: must be a whole number, 1 or more"),
    "evaluations of nothing": Case({"eval_strategy": "epoch"}, ConfigError, "eval_strategy='epoch' needs an eval_d"),
    "a word for a switch": Case({"disable_dropout": "no"}, ConfigError, "disable_dropout='no': must be True or False"),
}  # fmt: skip


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> Attempts:
    models = save_models(tmp_path_factory.mktemp("models"))
    return Attempts(CASES, reward_trainer, tmp_path_factory.mktemp("runs"), models)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused(attempts: Attempts, name: str):
    case, outcome = CASES[name], attempts.run(name)
    assert type(outcome.error) is case.error, outcome.error
    assert re.search(case.message, str(outcome.error)), outcome.error
    assert outcome.passes == outcome.steps == 0
    assert outcome.is_output_unchanged


def test_messages_differ(attempts: Attempts):
    found = {str(attempts.run(name).error) for name in CASES}
    assert len(found) == len(CASES) >= 35


def test_good_input_is_not(tmp_path: Path):
    """What stands beside the refused: the same run with its data as it should be, and a stream with an end."""
    stream = IterableDataset.from_generator(lambda: iter(text_rows(8)))
    for number, data in enumerate((text_rows(8), token_rows(8), stream)):
        trainer = reward_trainer(tmp_path / str(number), train_dataset=data)
        trainer.train()
        assert trainer.state.global_step == 1


def test_rows_that_may_be_left_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [*text_rows(9), *row(rejected="b")[:1]]
    trainer = reward_trainer(tmp_path, train_dataset=rows)
    assert trainer.reports["train"].rows_dropped == 1
    assert "train: 1 of 10 rows are left out: identical (1)" in caplog.text
