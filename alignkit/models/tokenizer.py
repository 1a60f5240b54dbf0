"""Tokenizers: loading, and a padding token that is always there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from alignkit.errors import ModelError
from alignkit.models.source import LOADING_ERRORS, Source, explain, locate, locate_base
from alignkit.models.untrusted.configs import check_config
from alignkit.models.untrusted.folders import check_folder, check_tokenizer
from alignkit.models.untrusted.templates import check_template


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return `tokenizer` if it can pad, else a copy that pads with its end-of-sequence token.

    The object passed in is never changed. Padding with EOS is safe here because every mask in alignkit comes from
    lengths, never from token ids.

    Raises:
        ModelError: the tokenizer has neither a padding nor an end-of-sequence token.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer
    if tokenizer.eos_token_id is None:
        owner = f" of '{tokenizer.name_or_path}'" if tokenizer.name_or_path else ""
        raise ModelError(
            f"The tokenizer{owner} has no pad token and no end-of-sequence token to pad with. "
            'Set one first: tokenizer.pad_token = "..." with a token of its vocabulary.'
        )
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padded.eos_token
    return padded


def with_distinct_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return `tokenizer`, or a copy of it, with a padding token that ends no text.

    transformers' sequence classifiers read the last token of a row whose id is not the padding token's. With pad == EOS
    (SmolLM2, and every tokenizer that had no padding token) they would read the token before the EOS instead, and give
    another reward than the one that was trained. So the unknown token, or the beginning of a text, pads instead; where
    there is neither, the first ordinary token does, which no text that ends in EOS ends in. alignkit itself never
    looks at padding: its masks come from lengths.

    Raises:
        ModelError: the tokenizer has neither a padding nor an end-of-sequence token.
    """
    tokenizer = with_pad_token(tokenizer)
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    named: list[Any] = [tokenizer.unk_token_id, tokenizer.bos_token_id]
    usable = (token for token in (*named, *range(len(tokenizer))) if token not in (None, tokenizer.eos_token_id))
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padded.convert_ids_to_tokens(next(usable))
    return padded


def load_tokenizer(
    model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, **hub_kwargs: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model's name or path and make sure that it can pad.

    An adapter folder that holds no tokenizer uses its base model's. `"demo"` is the embedded demonstration model.

    Args:
        model: a name on the Hub, a folder, a `.gguf` file, an adapter, or `"demo"`.
        revision: branch, tag or commit of `model` on the Hub.
        trust_remote_code: allow tokenizer code from the repository to run.
        hub_kwargs: `token`, `cache_dir`, `local_files_only`, `subfolder`, as for `from_pretrained`.

    Raises:
        ModelError: there is no such model, it holds no tokenizer, or the tokenizer has neither pad nor EOS token.
    """
    if revision is not None:
        hub_kwargs["revision"] = revision
    source = locate(model, hub_kwargs)
    if source.adapter is not None and not _has_tokenizer(source):
        source = locate_base(source)
    return with_pad_token(_from_pretrained(source, trust_remote_code))


def read_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer as it is, from a folder or repository that need hold no model.

    Raises:
        ModelError: there is none.
    """
    if Path(name).expanduser().is_dir():
        check_folder(Path(name).expanduser())
    return _from_pretrained(Source(name, {}), trust_remote_code)


def _has_tokenizer(source: Source) -> bool:
    # An adapter on the Hub is asked only for its own tokenizer where it is a local folder: one that was trained with
    # added tokens saves it beside the adapter.
    folder = Path(source.name)
    return (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()


def _from_pretrained(source: Source, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    kwargs = dict(source.kwargs)
    folder = Path(source.name).expanduser() / kwargs.get("subfolder", "")
    if source.gguf_file is not None:
        kwargs["gguf_file"] = source.gguf_file
    elif folder.is_dir():
        check_tokenizer(folder)
    else:
        _check_hub_config(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, trust_remote_code=trust_remote_code, **kwargs)
    except (*LOADING_ERRORS, RecursionError) as error:
        raise ModelError(
            f"No tokenizer could be loaded from '{source.name}': {explain(error, source.name)} "
            "If the tokenizer lives elsewhere, load it yourself and pass it as processing_class."
        ) from error
    templates: Any = tokenizer.chat_template or {}
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        check_template(template, source.name)
    return tokenizer


def _check_hub_config(source: Source) -> None:
    """Look over the `config.json` of a repository: transformers makes a config of it to choose a tokenizer."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(source.name, **source.kwargs)
    except (OSError, ValueError, RecursionError):  # none, or one that transformers will refuse in its own words
        return
    check_config(config, f"{source.name}/config.json", trust_remote_code=True)
