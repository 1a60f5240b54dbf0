"""What a row may tell its chat template: `tools` and `chat_template_kwargs`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from alignkit.data.reasons import BadRow, DropReason

# Arguments of `apply_chat_template` that decide what is encoded; a row may not change them.
_RESERVED_TEMPLATE_KEYS = frozenset(
    {"conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "tools"}
)


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
    return _without_none(tools) or None, kept


def _from_json(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRow(DropReason.BAD_TEMPLATE_ARGUMENTS, f"{name} is not JSON: {error}") from None


def _without_none(value: Any) -> Any:
    """Drop the keys that Arrow filled with None because another row's tools have them."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
