"""A tiny model with a chat template, and tiny data sets in the formats of the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.benchmarks.data import DATASETS
from tests.model_factory import tiny_model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["what", "how", "why", "tea", "bread", "train", "river", "moon", "slow", "warm", "quiet", "paper", "green"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama in bf16 with a byte tokenizer and a chat template, saved."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 1}
    tiny_model("llama", **sizes).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both data sets in their own formats, 40 pairs each, one of them unusable."""
    folder = tmp_path_factory.mktemp("data")
    hh, en_demo = [{"chosen": "same", "rejected": "same"}], [{"conversations": [], "chosen": {}, "rejected": {}}]
    for i in range(40):
        words = [WORDS[(i + j) % len(WORDS)] for j in range(6)]
        prompt = f"\n\nHuman: {words[0]} {words[1]} {i}?\n\nAssistant:"
        hh.append({"chosen": f"{prompt} {words[2]} {words[3]}.", "rejected": f"{prompt} {words[4]}."})
        said = {"conversations": [{"from": "human", "value": f"{words[0]} {i}"}]}
        en_demo.append(
            {
                **said,
                "chosen": {"from": "gpt", "value": words[2]},
                "rejected": {"from": "gpt", "value": f"{words[3]} {words[5]}"},
            }
        )
    (folder / DATASETS["hh"][0]).write_text("\n".join(map(json.dumps, hh)), encoding="utf-8")
    (folder / DATASETS["en_demo"][0]).write_text(json.dumps(en_demo), encoding="utf-8")
    return folder
