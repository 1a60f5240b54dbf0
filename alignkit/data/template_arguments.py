"""What a row may tell its chat template: `tools` and `chat_template_kwargs`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from alignkit.data.reasons import BadRow, DropReason

# Arguments of `apply_chat_template` that decide what is encoded; a row may not change them. Above all it may bring no
# template of its own, which would be run.
_RESERVED_TEMPLATE_KEYS = frozenset(
    {
        "conversation",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
_MAX_LEVELS = 100


def template_arguments(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]] | None, dict[str, Any]]:
    """Read `tools` (a list or its JSON) and `chat_template_kwargs` (a mapping or its JSON).

    Raises:
        BadRow: `bad tools or chat_template_kwargs`.
    """
    tools = _from_json(row.get("tools"), "tools")
    kwargs = _from_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if tools is not None and not isinstance(tools, list):
        raise BadRow(DropReason.BAD_TEMPLATE_ARGUMENTS, f"tools is {type(tools).__name__}, not a list")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise BadRow(
            DropReason.BAD_TEMPLATE_ARGUMENTS, f"chat_template_kwargs is {type(kwargs).__name__}, not a mapping"
        )
    kept = {key: value for key, value in (kwargs or {}).items() if value is not None}  # None: Arrow filled it in
    reserved = sorted(_RESERVED_TEMPLATE_KEYS.intersection(kept))
    if reserved:
        raise BadRow(DropReason.BAD_TEMPLATE_ARGUMENTS, f"chat_template_kwargs may not set {reserved[0]!r}")
    return _without_none(tools, "tools") or None, kept


def _from_json(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(DropReason.BAD_TEMPLATE_ARGUMENTS, f"{name} is not JSON: {error}") from None


def _without_none(value: Any, name: str, level: int = 0) -> Any:
    """Drop the keys that Arrow filled with None because another row's tools have them."""
    if level > _MAX_LEVELS:
        raise BadRow(DropReason.BAD_TEMPLATE_ARGUMENTS, f"{name} is nested more than {_MAX_LEVELS} levels deep")
    if isinstance(value, Mapping):
        return {key: _without_none(item, name, level + 1) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item, name, level + 1) for item in value]
    return value
