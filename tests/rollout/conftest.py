"""Tokenizers of the data tests, for this folder too."""

from __future__ import annotations

from tests.data.conftest import byte_bpe_tokenizer, smol_tokenizer, word_tokenizer

__all__ = ["byte_bpe_tokenizer", "smol_tokenizer", "word_tokenizer"]
