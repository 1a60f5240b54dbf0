"""From what a user names to reward sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from alignkit.errors import ConfigError, ModelError
from alignkit.rollout.callables import CallableReward
from alignkit.rollout.classifier import ClassifierReward
from alignkit.rollout.mix import RewardMix
from alignkit.rollout.sources import load_classifier, make_reward_sources
from tests.model_factory import tiny_model
from tests.rollout.reward_samples import samples, tiny_classifier

CPU = torch.device("cpu")
# PEFT asks for it under its old name.
PLAIN_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture
def folder(tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A saved classifier with its tokenizer."""
    path = tmp_path / "judge"
    tiny_classifier("llama", vocab_size=len(word_tokenizer)).save_pretrained(path)
    word_tokenizer.save_pretrained(path)
    return path


def make(spec: Any, *args: Any, **kwargs: Any) -> list[Any]:
    return make_reward_sources(spec, *args, device=CPU, **kwargs)


def test_one_of_each(folder: Path, word_tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    own = ClassifierReward(model, word_tokenizer, name="own")
    sources = make([length, str(folder), folder, model, own], [None, None, word_tokenizer, None, None])
    assert [type(source) for source in sources] == [CallableReward, *[ClassifierReward] * 4]
    assert sources[-1] is own
    mix = RewardMix(sources)
    assert mix.names == ("length", "judge", "judge_2", "judge_3", "own")
    components = mix(samples("w1", "w2 w3")).components
    assert components["length"].values.tolist() == [2.0, 5.0]
    for name in ("judge_2", "judge_3", "own"):
        torch.testing.assert_close(components[name].values, components["judge"].values)
    assert components["judge"].values.unique().numel() == 2


def test_a_single_thing_needs_no_list(folder: Path) -> None:
    assert [source.names for source in make(length)] == [("length",)]
    assert [source.names for source in make(str(folder))] == [("judge",)]


def test_loading_options_reach_the_model(folder: Path) -> None:
    (source,) = make(str(folder), model_init_kwargs={"dtype": torch.bfloat16})
    assert source.model.dtype == torch.bfloat16
    (source,) = make(str(folder))
    assert source.model.dtype == torch.float32
    assert load_classifier(folder, device=CPU, max_tokens=7, name="x").max_tokens == 7


@PLAIN_PEFT
def test_an_adapter_is_left_to_its_factory(tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase) -> None:
    base = tiny_classifier("llama", vocab_size=len(word_tokenizer))
    base.config.name_or_path = "base"
    get_peft_model(base, LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear")).save_pretrained(tmp_path)
    asked: list[str] = []

    def adapter_source(name: str) -> CallableReward:
        asked.append(name)
        return CallableReward(length, name="adapter")

    (source,) = make(str(tmp_path), adapter_source=adapter_source)
    assert source.names == ("adapter",)
    assert asked == [str(tmp_path)]
    with pytest.raises(ModelError, match="holds an adapter, and there is no base here for it to share"):
        make(str(tmp_path))
    with pytest.raises(ConfigError, match=r"names a tokenizer for the adapter .*; put None"):
        make(str(tmp_path), word_tokenizer, adapter_source=adapter_source)
    with pytest.raises(ModelError, match="holds an adapter, not a whole sequence classifier"):
        load_classifier(tmp_path)


def test_a_language_model_is_no_classifier(tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase) -> None:
    tiny_model("llama", vocab_size=len(word_tokenizer)).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no weights for score\.weight, so its scores would be random"):
        make(str(tmp_path))


def test_what_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such path"):
        make(str(tmp_path / "nothing"))


def test_a_model_that_came_from_nowhere_needs_a_tokenizer(word_tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_classifier("llama", vocab_size=len(word_tokenizer))
    with pytest.raises(ModelError, match="does not say where it came from, so its tokenizer cannot be found"):
        make(model)
    assert make(model, word_tokenizer)[0].names == ("LlamaForSequenceClassification",)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ([], ConfigError, "reward_funcs is empty"),
        (3, ConfigError, "must be a function or an object that can be called, not a int"),
        ([None], ConfigError, "not a NoneType"),
        (CallableReward, ConfigError, "not the class CallableReward"),
        (torch.nn.Linear(2, 2), ModelError, "must be a PreTrainedModel or a PeftModel of one, not Linear"),
    ],
)
def test_what_is_no_reward_is_refused(spec: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(spec)


def test_tokenizers_must_match(word_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match="1 reward_processing_classes for 2 rewards: give one for each"):
        make([length, length], [None])
    with pytest.raises(ConfigError, match="names a tokenizer for the function 'length'; put None in its place"):
        make(length, word_tokenizer)
    own = CallableReward(length, name="own")
    with pytest.raises(ConfigError, match="names a tokenizer for 'own', which is a reward source already"):
        make([own], [word_tokenizer])
