"""Prompts, a tokenizer and plain generation for the tests of the rollout engines."""

from __future__ import annotations

import torch
from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from alignkit.rollout.engine import Completion, Sampling
from alignkit.rollout.hf import left_padded
from tests.models.conftest import character_tokenizer
from tests.pair_factory import PAD

EOS = 2
GREEDY = Sampling(max_new_tokens=24, temperature=0.0)
SAMPLED = Sampling(max_new_tokens=12)


def letter_tokenizer(**special_tokens: str) -> PreTrainedTokenizerBase:
    """The tokenizer of single characters, whose texts read as they were written."""
    tokenizer = character_tokenizer(**special_tokens)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


def random_prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 127, (length,), generator=generator).tolist() for length in lengths]


# Longer and shorter than the sliding window, two of one length, two of similar length, one of a single token.
PROMPTS = random_prompts(3, 14, 9, 12, 1, 20, 14)


def greedy_seeds(prompts: list[list[int]]) -> list[list[int]]:
    return [[0]] * len(prompts)


def own_generate(model, prompts: list[list[int]], new_tokens: int) -> list[Completion]:
    """Greedy generation of one left-padded batch by transformers itself."""
    ids, mask = left_padded(prompts, torch.device("cpu"))
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    completions = []
    for row in output[:, ids.shape[1] :].tolist():
        end = row.index(EOS) + 1 if EOS in row else len(row)
        completions.append(Completion(row[:end], EOS in row))
    return completions
