"""What `PPOTrainer` must refuse: each with its own message, before any forward pass where it can be known then."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from alignkit.errors import CheckpointError, ConfigError, DataError, ModelError, TrainingError
from alignkit.models.adapters import add_adapter
from alignkit.rollout.reward import RewardError
from alignkit.trainers.reward_config import RewardConfig
from tests.bad_input import ANSWER, TEMPLATE, USER, Attempts, Case, Made, save_models, tokenizer_with
from tests.model_factory import tiny_model
from tests.ppo_factory import ppo_trainer, prompts, vowels
from tests.rollout.reward_samples import tiny_classifier
from tests.tiny_preferences import character_tokenizer, lora, token_rows


def rows(*texts: Any) -> list[dict[str, Any]]:
    return [{"prompt": text} for text in texts]


def with_column(name: str) -> list[dict[str, Any]]:
    return [{"prompt": "a", name: "x"}] * 4


def gives(make: Callable[[int], Any]) -> Callable[..., Any]:
    """A reward function that returns `make(number of completions)`."""

    def judge(completions: list[str], **columns: Any) -> Any:
        return make(len(completions))

    return judge


def nothing_applies(completions: list[str]) -> list[None]:
    return [None] * len(completions)


def raises(completions: list[str]) -> list[float]:
    raise KeyError("score")


async def raises_later(completions: list[str]) -> list[float]:
    raise PermissionError("key expired")


def sleeps(completions: list[str]) -> list[float]:
    time.sleep(2)
    return [0.0] * len(completions)


async def sleeps_async(completions: list[str]) -> list[float]:
    await asyncio.sleep(60)
    return [0.0] * len(completions)


def wants_answer(completions: list[str], answer: list[str]) -> list[float]:
    return [0.0] * len(completions)


def in_folder(name: str) -> Made:
    return Made(lambda folder: str(folder / name))


def model(**overrides: Any) -> Made:
    return Made(lambda folder: tiny_model("llama", **overrides))


def without_end(folder: Path) -> Any:
    made = tiny_model("llama", eos_token_id=None)
    made.generation_config.eos_token_id = None
    return made


def with_value_adapter(folder: Path) -> Any:
    made = add_adapter(tiny_model("llama"), lora())
    made.add_adapter("value", lora())
    return made


SMALL = model(max_position_embeddings=64)
TEXT = {"ptx_coef": 0.1, "ptx_dataset": [{"prompt": "1", "completion": "~"}]}

CASES: dict[str, Case] = {
    # --- reward functions ---
    "raises": Case({"reward": raises}, RewardError, r"'raises', all samples .* raised KeyError: 'score'\. Cor", True),
    "raises in a coroutine": Case({"reward": raises_later}, RewardError, "raised PermissionError: key expired", True),
    "hangs": Case(
        {"reward": sleeps, "reward_timeout_s": 0.1}, RewardError, r"'sleeps', .* answer within 0\.1 s\. Make", True
    ),
    "hangs in a coroutine": Case(
        {"reward": sleeps_async, "reward_timeout_s": 0.1}, RewardError, r"'sleeps_async', .* within 0\.1 s", True
    ),
    "not a number": Case({"reward": gives(lambda n: [math.nan] * n)}, RewardError, r"the reward is \[nan\]", True),
    "infinite": Case(
        {"reward": gives(lambda n: [0.0] * (n - 1) + [-math.inf])}, RewardError, r"sample 3: .* is \[-inf\]", True
    ),
    "too few": Case({"reward": gives(lambda n: [0.0])}, RewardError, "returned 1 rewards for 4 completions", True),
    "two dimensions": Case({"reward": gives(lambda n: torch.zeros(n, 1))}, RewardError, r"shape \(4, 1\); retur", True),
    "texts": Case({"reward": gives(lambda n: ["good"] * n)}, RewardError, "'good', a str. Return one number", True),
    "nothing": Case({"reward": gives(lambda n: None)}, RewardError, "returned None, not a list", True),
    "a dict": Case({"reward": gives(lambda n: {"score": [0.0] * n})}, RewardError, "a dict, not a list", True),
    "a hidden coroutine": Case({"reward": lambda **k: sleeps_async([])}, RewardError, "declare it with `async", True),
    "None from every source": Case(
        {"reward": [nothing_applies, gives(lambda n: [None] * n)]},
        TrainingError,
        "sample 0: no reward applies; 'nothing_applies', 'judge' returned None or weigh 0. Add a reward",
        True,
    ),
    "None where it matters": Case(
        {"reward": [nothing_applies, vowels], "reward_weights": [1.0, 0.0]},
        TrainingError,
        "no reward applies; 'nothing_applies', 'vowels' returned None or weigh 0",
        True,
    ),
    "every sample dropped": Case(
        {"reward": nothing_applies, "on_reward_error": "drop"},
        TrainingError,
        r"all 4 samples were dropped.*: no source applies \(4\)",
        True,
    ),
    "every call fails": Case(
        {"reward": raises, "on_reward_error": "drop"},
        TrainingError,
        r"all 4 samples were dropped.*: raises: raised \(4\)\. the function raised KeyError",
        True,
    ),
    "a classifier with another's tokenizer": Case(
        {
            "reward": Made(lambda folder: tiny_classifier("llama", vocab_size=50)),
            "reward_processing_classes": character_tokenizer(),
        },
        ModelError,
        r"reward 'LlamaForSequenceClassification' makes token \d+, but the model has 50 embeddings",
        True,
    ),
    # --- rewards that are none ---
    "no reward": Case({"reward": []}, ConfigError, "reward_funcs is empty: give at least one"),
    "None as reward": Case({"reward": None}, ConfigError, "must be a function .* not a NoneType"),
    "a number as reward": Case({"reward": 3.0}, ConfigError, "must be a function .* not a float"),
    "a dict of rewards": Case({"reward": {"a": vowels}}, ConfigError, "must be a function .* not a dict"),
    "a class as reward": Case({"reward": dict}, ConfigError, "not the class dict"),
    "by position only": Case({"reward": lambda completions, /: []}, ConfigError, "remove the '/' from its signature"),
    "a column that is not there": Case(
        {"reward": wants_answer}, ConfigError, "asks for 'answer', which the train dataset does not have"
    ),
    "a column that evaluation lacks": Case(
        {"reward": wants_answer, "train_dataset": with_column("answer"), "eval_dataset": rows("a")},
        ConfigError,
        "asks for 'answer', which the eval dataset does not have",
    ),
    "the singular": Case({"reward": lambda prompt: []}, ConfigError, "asks for 'prompt', .* Did you mean 'prompts'"),
    "a column called prompts": Case(
        {"train_dataset": with_column("prompts")}, DataError, "train dataset's column 'prompts' has the name of an arg"
    ),
    "a column called completions": Case(
        {"train_dataset": with_column("completions")}, DataError, "train dataset's column 'completions' has the name"
    ),
    "prompts in one of two evaluations": Case(
        {"eval_dataset": {"easy": rows("a"), "hard": with_column("prompts")}},
        DataError,
        "the eval_hard dataset's column 'prompts'",
    ),
    "weights of wrong length": Case({"reward_weights": [1.0, 2.0]}, ConfigError, "2 reward weights for 1 rewards"),
    "a weight for each head": Case(
        {"reward": in_folder("ensemble"), "model": in_folder("base"), "reward_weights": [1.0, 1.0, 1.0]},
        ConfigError,
        r"3 reward weights for 1 rewards \('ensemble'\)",
    ),
    "all weights zero": Case({"reward_weights": [0.0]}, ConfigError, "are 0, so nothing would be learned"),
    # --- reward models ---
    "a path that is not there": Case({"reward": in_folder("rewrad")}, ModelError, r"No such path: .* mean 'reward'\?"),
    "an empty folder": Case({"reward": in_folder("empty")}, ModelError, "holds no model: neither config.json nor"),
    "a policy's adapter": Case({"reward": in_folder("policy")}, ModelError, "holds no reward adapter: give the output"),
    "a language model": Case({"reward": in_folder("other")}, ModelError, "no weights for score.weight, so its scores"),
    "a loaded language model": Case({"reward": model()}, ModelError, "LlamaForCausalLM is no sequence classifier"),
    "two labels": Case({"reward": in_folder("two")}, ConfigError, r"has 2 labels .* Say which one is the reward"),
    "a classifier from nowhere": Case(
        {"reward": Made(lambda folder: tiny_classifier("llama"))}, ModelError, "its tokenizer cannot be found. Pass it"
    ),
    "a tokenizer by name": Case(
        {"reward": Made(lambda folder: tiny_classifier("llama")), "reward_processing_classes": "base"},
        ModelError,
        "a reward model needs its tokenizer, not str",
    ),
    "a tokenizer for a function": Case(
        {"reward_processing_classes": character_tokenizer()}, ConfigError, "for the function 'vowels'; put None"
    ),
    "a tokenizer for one of two": Case(
        {"reward": [vowels, raises], "reward_processing_classes": character_tokenizer()},
        ConfigError,
        "1 reward_processing_classes for 2 rewards",
    ),
    "an adapter of a wider base": Case(
        {"reward": in_folder("reward"), "model": model(hidden_size=64)},
        ModelError,
        "does not fit this base, so it was trained on another one",
    ),
    "an adapter of another base": Case(
        {"reward": in_folder("reward"), "model": in_folder("other")},
        ModelError,
        r"was trained on '.*base', and the base here is '.*other'",
    ),
    # --- prompts ---
    "no dataset": Case({"train_dataset": None}, ConfigError, "train_dataset is required: pass a dataset of prompts"),
    "a file's name": Case({"train_dataset": "prompts.jsonl"}, DataError, "and this is a str. Read a file with"),
    "a number for a dataset": Case({"train_dataset": 3}, DataError, "a list of dicts, and this is a int"),
    "a dict of datasets": Case(
        {"train_dataset": DatasetDict({"train": prompts()})}, DataError, r"a dict of datasets \['train'\]; give one"
    ),
    "a dict of columns": Case(
        {"train_dataset": {"prompt": ["a"] * 4}}, DataError, r"a dict of columns \['prompt'\]; mak.* Dataset.from_dict"
    ),
    "a stream": Case(
        {"train_dataset": IterableDataset.from_generator(lambda: iter(rows("a")))},
        ConfigError,
        "PPO needs a dataset of known length, and this is a stream",
    ),
    "no rows": Case({"train_dataset": []}, DataError, "train: the dataset has no rows"),
    "nothing to evaluate on": Case({"eval_dataset": []}, DataError, "eval: the dataset has no rows"),
    "no column of prompts": Case(
        {"train_dataset": [{"promt": "a"}] * 4}, DataError, "none of the columns .* Did you mean 'prompt'"
    ),
    "token ids for text": Case(
        {"train_dataset": Dataset.from_list([{"input_ids": [40, 41]}] * 4)},
        DataError,
        "'input_ids' holds token ids, and PPO's rewards need text",
    ),
    "tokenised preferences": Case({"train_dataset": token_rows(4)}, DataError, "'prompt_ids' holds token ids"),
    "token ids as prompt": Case(
        {"train_dataset": rows(*[[40, 41]] * 4)}, DataError, "(?s)prompt is a list of token ids; rewards need text"
    ),
    "None as prompt": Case({"train_dataset": rows("a", None, "b", "c")}, DataError, "(?s)1 of 4 rows.*prompt is None"),
    "numbers as prompts": Case({"train_dataset": rows(1, 2, 3, 4)}, DataError, r"(?s)none of.*prompt is int \('1'\)"),
    "empty and blank prompts": Case(
        {"train_dataset": rows("a", "", " \n\t", "b")}, DataError, r"(?s)2 of 4 rows .* empty .* 1, 2 .*prompt is empty"
    ),
    "prompts too long": Case(
        {"train_dataset": rows("a", "b", "c" * 30, "d" * 40), "max_prompt_length": 20},
        DataError,
        "(?s)2 of 4 rows .*30 tokens,.*max_prompt_tokens=20",
    ),
    "the answer is there": Case(
        {"train_dataset": rows(*[[USER, ANSWER]] * 4), "processing_class": tokenizer_with(chat_template=TEMPLATE)},
        DataError,
        "(?s)none of the 4 rows.*prompt ends with assistant, not with user",
    ),
    "conversations without a template": Case(
        {"train_dataset": rows(*[[USER]] * 4)}, DataError, "conversations, but the tokenizer has no chat template"
    ),
    "too few prompts": Case(
        {"train_dataset": prompts(5), "num_mini_batches": 2, "per_device_train_batch_size": 3},
        ConfigError,
        r"a rollout takes 6 prompts \(per_device_train_batch_size=3 .* num_mini_batches=2 .* the dataset has 5",
    ),
    "prompts beyond the model": Case(
        {"train_dataset": rows("a", "b", "c", "d" * 60), "model": SMALL},
        DataError,
        r"train: the longest prompt has 60 tokens.* 64 positions: set max_prompt_length=57 to drop",
    ),
    "evaluation beyond the model": Case(
        {"eval_dataset": rows("a" * 58), "model": SMALL}, DataError, "eval: the longest prompt has 58 tokens"
    ),
    "completions beyond the model": Case(
        {"model": SMALL, "max_completion_length": 64},
        DataError,
        "max_completion_length=64 is more than the model's 64 positions: lower max_completion_length",
    ),
    # --- models and tokenizers ---
    "no end of sequence": Case(
        {"processing_class": tokenizer_with(eos_token=None), "model": Made(without_end)},
        ConfigError,
        "has an end-of-sequence token, so no completion would ever end. Set tokenizer.eos_token",
    ),
    "neither padding nor end": Case(
        {"processing_class": tokenizer_with(pad_token=None, eos_token=None)},
        ModelError,
        "The tokenizer has no pad token and no end-of-sequence token to pad with. Set one",
    ),
    "an end that the model lacks": Case(
        {"model": model(vocab_size=2, eos_token_id=1)}, ModelError, "end-of-sequence token 2 is outside the model's"
    ),
    "letters that the model lacks": Case(
        {"model": model(vocab_size=100)}, ModelError, r"train: the tokenizer makes token \d+, and .* 100 tokens"
    ),
    "texts that the model cannot read": Case(
        {"model": model(vocab_size=100), "train_dataset": rows(*"1234"), **TEXT},
        ModelError,
        "ptx: the tokenizer makes token 126, and the model's vocabulary has 100",
    ),
    "a tokenizer's name": Case({"processing_class": "base"}, ModelError, "processing_class must be a tokenizer, not s"),
    "a model that is not there": Case({"model": "./nowhere"}, ModelError, r"No such path: '\./nowhere'"),
    "a number as model": Case({"model": 3}, ModelError, "model must be a name, a path, .* not int"),
    "a classifier as policy": Case(
        {"model": Made(lambda folder: tiny_classifier("llama"))},
        ModelError,
        "LlamaForSequenceClassification is no causal language model, which every trainer starts from",
    ),
    "no adapter": Case({"peft_config": None}, ModelError, "PPOTrainer trains an adapter.*pass peft_config=LoraConfig"),
    "an adapter's name": Case({"peft_config": "lora"}, ModelError, "peft_config must be a PEFT config .* not str"),
    "an adapter for rewards": Case(
        {"peft_config": lora(task_type="SEQ_CLS")}, ModelError, "task_type 'SEQ_CLS' for a causal language model"
    ),
    "a layer that is not there": Case(
        {"peft_config": lora(target_modules=["q_prj"])}, ModelError, r"'q_prj'.* Did you mean 'q_proj'\?"
    ),
    "a critic's adapter twice": Case(
        {"value_adapter": True, "model": Made(with_value_adapter), "peft_config": None},
        ModelError,
        "an adapter called 'value' already",
    ),
    "a checkpoint that is not there": Case(
        {"resume_from_checkpoint": "./nowhere"}, CheckpointError, "there is no checkpoint at nowhere"
    ),
    # --- options ---
    "another trainer's options": Case({"args": RewardConfig()}, ConfigError, "args must be a PPOConfig, not a RewardC"),
    "an unknown option": Case({"kl_coeff": 0.1}, TypeError, "kl_coeff"),
    "temperature 0": Case({"temperature": 0}, ConfigError, r"temperature=0: must be positive: greedy completions"),
    "negative temperature": Case({"temperature": -1.0}, ConfigError, r"temperature=-1\.0: must be positive"),
    "negative KL weight": Case({"kl_coef": -0.1}, ConfigError, r"kl_coef=-0\.1: must be a finite number, 0 or more"),
    "no clipping": Case({"cliprange": 0.0}, ConfigError, r"cliprange=0\.0: must be a positive"),
    "negative clipping": Case({"cliprange_value": -0.2}, ConfigError, r"cliprange_value=-0\.2: must be a positive"),
    "no generation": Case({"num_generations": 0}, ConfigError, "num_generations=0: must be a whole number, 1 or more"),
    "no epoch": Case({"num_train_epochs": 0}, ConfigError, "num_train_epochs=0: must be a positive"),
    "a word for a switch": Case(
        {"whiten_advantages": "no"}, ConfigError, "whiten_advantages='no': must be True or False, and any text would"
    ),
    "evaluations of nothing": Case(
        {"eval_strategy": "steps", "eval_steps": 1}, ConfigError, "eval_strategy='steps' needs an eval_dataset"
    ),
    "saving within a rollout": Case(
        {"save_strategy": "steps", "save_steps": 0.5, "num_mini_batches": 2},
        ConfigError,
        r"save_steps=0\.5: give a number of optimizer steps, a multiple of 2",
    ),
    "texts without weight": Case(
        {"ptx_dataset": [{"prompt": "a", "completion": "b"}]}, ConfigError, "with ptx_coef=0"
    ),
    "weight without texts": Case({"ptx_coef": 0.1}, ConfigError, "ptx_coef=0.1 weighs a loss on ptx_dataset"),
    "texts of no format": Case(
        {"ptx_coef": 0.1, "ptx_dataset": [{"promt": "a"}]}, DataError, "make no format that alignkit understands"
    ),
    "texts to avoid alone": Case(
        {"ptx_coef": 0.1, "ptx_dataset": [{"prompt": "a", "completion": "b", "label": False}]},
        ConfigError,
        "every row is labelled as undesirable",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Attempts:
    def build(folder: Path, reward: Any = vowels, **given: Any) -> Any:
        return ppo_trainer(folder, reward, random=False, **given)

    return Attempts(CASES, build, tmp_path_factory.mktemp("runs"), models)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused(attempts: Attempts, name: str):
    case, outcome = CASES[name], attempts.run(name)
    assert type(outcome.error) is case.error, outcome.error
    assert re.search(case.message, str(outcome.error)), outcome.error
    assert (outcome.passes > 0) == case.late
    assert outcome.steps == 0
    assert outcome.is_output_unchanged


def test_messages_differ(attempts: Attempts):
    found = {str(attempts.run(name).error) for name in CASES}
    assert len(found) == len(CASES) >= 35
