"""What `RewardTrainer` is handed, turned into a tokenizer and checked data."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import ConfigError, ModelError, nearest
from alignkit.models.tokenizer import read_tokenizer, with_distinct_pad_token
from alignkit.trainers.reward_config import RewardConfig
from alignkit.trainers.setup import build_tokenizer

logger = logging.getLogger(__name__)

_TEMPLATE_SUFFIXES = (".jinja", ".j2")


def reward_tokenizer(
    processing_class: Any, model: str | Path | PreTrainedModel | PeftModel, args: RewardConfig
) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the chosen end of a text, template, and a padding token that ends no text.

    One that the caller passed is not changed.

    Raises:
        ConfigError: an `eos_token` outside the vocabulary, or a template that cannot be read or needs new tokens.
        ModelError: no tokenizer.
    """
    given = build_tokenizer(processing_class, model, args)
    tokenizer = copy.deepcopy(given)
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            hint = nearest(args.eos_token, tokenizer.all_special_tokens)
            raise ConfigError(f"eos_token={args.eos_token!r} is not in the tokenizer's vocabulary.{hint}")
        tokenizer.eos_token = args.eos_token
    if args.chat_template_path is not None:
        tokenizer.chat_template = _chat_template(args.chat_template_path, tokenizer, args)
    padding = with_distinct_pad_token(tokenizer)
    if padding.pad_token != given.pad_token:
        logger.info(
            "The tokenizer pads with %r instead of %r: a sequence classifier reads the last token that is no padding, "
            "and so would never read the end of a text.",
            padding.pad_token,
            given.pad_token,
        )
    return padding


def _chat_template(path: str, tokenizer: PreTrainedTokenizerBase, args: RewardConfig) -> Any:
    if path.endswith(_TEMPLATE_SUFFIXES):
        try:
            return Path(path).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"chat_template_path={path!r} cannot be read: {error.strerror}") from None
    try:
        other: Any = read_tokenizer(path, trust_remote_code=args.trust_remote_code)
    except ModelError as error:
        raise ConfigError(f"chat_template_path={path!r} is no tokenizer: {error}") from error
    if other.chat_template is None:
        raise ConfigError(f"chat_template_path={path!r}: that tokenizer has no chat template")
    known = tokenizer.get_vocab()
    unknown = sorted(token for token in other.get_added_vocab() if token not in known and token in other.chat_template)
    if unknown:
        raise ConfigError(
            f"chat_template_path={path!r}: its template writes {unknown}, which the model's tokenizer does not have, "
            "and a frozen base cannot learn new tokens. Use a template of the model's own family."
        )
    return other.chat_template


def check_reward_data(dataset: Dataset | IterableDataset, args: RewardConfig) -> None:
    """See that the prepared training set has an end.

    Raises:
        ConfigError: a stream without `max_steps`.
    """
    if isinstance(dataset, IterableDataset) and args.max_steps <= 0:
        raise ConfigError("the training set is a stream, whose length is not known: set max_steps, e.g. max_steps=1000")
