"""Configs from strangers: sizes that a model can have, names that stay in their folder, no code by the back door."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignkit.data.plain_files import leaves_folder
from alignkit.errors import ModelError

# Far above any model that there is, and low enough that a config alone cannot fill memory or build for minutes.
MAX_SIZES = {
    **dict.fromkeys(("vocab_size", "n_vocab", "type_vocab_size"), 2**24),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "head_dim", "embedding_size", "word_embed_proj_dim"), 2**20),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "moe_intermediate_size"), 2**22),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 2**11),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"), 2**14),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 2**14),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 2**31),
    "num_labels": 2**20,
}
# Of these a model may have none: dense models of a family with experts, attention that has widths of other names.
_MAY_BE_NONE = ("type_vocab_size", "n_inner", "head_dim", "num_experts", "num_local_experts", "n_routed_experts")
_COUNTS = frozenset(MAX_SIZES) - frozenset(_MAY_BE_NONE)

_ATTENTION = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
# Origins that tokenizers recorded when they were saved, often a path of that machine. No library opens them.
_ORIGINS = ("name_or_path", "_name_or_path", "base_model_name_or_path", "special_tokens_map_file")
_MAX_WALKED = 1_000_000


def check_config(config: Mapping[str, Any], where: str, *, trust_remote_code: bool = False) -> None:
    """Look a model's config over before a model is built from it.

    `auto_map`, which names code of the repository, needs no refusal here: without `trust_remote_code` transformers'
    own class is taken, and a model type that transformers does not know is refused by name.

    Args:
        config: of `config.json`, as a dictionary.
        where: the file's name, for the message.
        trust_remote_code: whether the user allows the repository's code to run.

    Raises:
        ModelError: a size that no model has, a name that leads out of the folder, or an attention function that would
            be fetched from the Hub as machine code.
    """
    for key, value in _settings(config):
        if key in MAX_SIZES and value is not None:
            _check_size(key, value, where)
        elif key in _ATTENTION and not trust_remote_code and "/" in str(value):
            raise ModelError(
                f"'{where}' asks for {key}={value!r}, which is code of another repository that would be fetched and "
                "run. If you trust it, pass trust_remote_code=True; else remove the entry."
            )
    check_names(config, where)


def check_names(config: Mapping[str, Any], where: str) -> None:
    """See that a config names no file outside its folder.

    Checked are the settings that libraries open: `..._file`, `..._files`, `init_inputs`, `transformers_weights`. Notes
    of where something once lay (`name_or_path`, `special_tokens_map_file`) are read by nobody and may say anything.

    Raises:
        ModelError: an absolute path, one with `..`, or an address.
    """
    for key, value in _settings(config):
        is_name = key.endswith(("_file", "_files")) or key in ("init_inputs", "transformers_weights")
        if not is_name or key in _ORIGINS:
            continue
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and leaves_folder(name):
                raise ModelError(
                    f"'{where}' names a file outside its folder: {key}={name!r}. No library is to open that. Remove "
                    "the entry, or do not use the folder."
                )


def check_weight_map(index: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the shards that an index of weights names, sorted.

    Raises:
        ModelError: no map from weights to files, or a name that is no safetensors file beside the index.
    """
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"'{where}' has no weight_map, which says where the weights are. Fetch it again.")
    for weight, name in names.items():
        if not isinstance(name, str) or leaves_folder(name) or "/" in name or "\\" in name:
            raise ModelError(
                f"'{where}' says that {weight!r} lies in {name!r}, which is no file beside it. Do not use the folder."
            )
        if not name.endswith(".safetensors"):
            raise ModelError(
                f"'{where}' says that {weight!r} lies in {name!r}; weights are read from safetensors alone. {CONVERT}"
            )
    return tuple(sorted(set(names.values())))


# What to do with weights that are pickles.
CONVERT = (
    "Pickled weights can run anything when they are loaded. If you trust whoever made them, convert them in a place "
    "where nothing can be lost: model.save_pretrained(folder) of transformers or PEFT writes safetensors; then give "
    "that folder."
)


def _check_size(key: str, value: Any, where: str) -> None:
    if isinstance(value, list):  # some models have one number for each layer
        for each in value[:_MAX_WALKED]:
            _check_size(key, each, where)
        return
    if isinstance(value, float) and value.is_integer():  # as some configs write lengths
        value = int(value)
    lowest = 1 if key in _COUNTS else 0
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= MAX_SIZES[key]:
        shown = repr(value) if len(repr(value)) < 80 else repr(value)[:80] + "…"
        raise ModelError(
            f"'{where}' has {key}={shown}; a whole number from {lowest} to {MAX_SIZES[key]:,} is expected. Fetch the "
            "model again, or ask where it came from."
        )


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """All (key, value) pairs at any depth, without recursion."""
    waiting, seen = [config], 0
    while waiting:
        found = waiting.pop()
        seen += 1
        if seen > _MAX_WALKED:
            raise ModelError(f"a config has more than {_MAX_WALKED:,} parts. Do not use it.")
        if isinstance(found, Mapping):
            for key, value in found.items():
                yield str(key), value
            waiting += [value for value in found.values() if isinstance(value, Mapping | list)]
        elif isinstance(found, list):
            waiting += [value for value in found if isinstance(value, Mapping | list)]
