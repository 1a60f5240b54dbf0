"""Small saved models and tokenizers for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.model_factory import VOCAB_SIZE, tiny_model


def character_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single ASCII characters whose ids fit the tiny models."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {chr(code): code for code in range(32, VOCAB_SIZE - 1)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama in bf16 with a tokenizer that has an EOS but no pad token. Read only."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    tiny_model("llama", hidden_size=64).to(torch.bfloat16).save_pretrained(folder)
    character_tokenizer(eos_token="</s>").save_pretrained(folder)
    return folder
