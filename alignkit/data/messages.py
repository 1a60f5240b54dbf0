"""Conversations: from the spellings that datasets use to lists of `{"role", "content"}`, and the order of roles."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.reasons import BadRow, DropReason, shown

Message = dict[str, Any]
Messages = list[Message]

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}

# Which role may come after which; None is the start, and a system message may only open the conversation.
_MAY_FOLLOW: dict[str | None, frozenset[str]] = {
    None: frozenset({"system", "developer", "user"}),
    "system": frozenset({"user"}),
    "developer": frozenset({"user"}),
    "user": frozenset({"assistant"}),
    "assistant": frozenset({"user", "tool"}),
    "tool": frozenset({"tool", "assistant"}),
}

_TURN = re.compile(r"\n\n(Human|Assistant):")


def as_text(value: Any, where: str) -> str:
    """Return `value` if it is a string that can be encoded as UTF-8.

    Raises:
        BadRow: `not text` for anything else, lone surrogates included.
    """
    if not isinstance(value, str):
        raise BadRow(DropReason.NOT_TEXT, f"{where} is {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            DropReason.NOT_TEXT, f"{where} has a lone surrogate {value[error.start]!a} at character {error.start}"
        ) from None
    return value


def as_messages(value: Any, where: str) -> Messages:
    """Return a list of messages with our roles out of role/content or from/value dicts; one dict is one message.

    Raises:
        BadRow: `not text` or `wrong roles`, naming the message.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise BadRow(DropReason.NOT_TEXT, f"{where} is {_kind(value)} where a list of messages is expected")
    return [_as_message(message, f"{where}[{index}]") for index, message in enumerate(value)]


def is_messages(value: Any) -> bool:
    """Whether `value` is meant as a conversation: one message, or a list that is not empty and starts with one."""
    if isinstance(value, Mapping):
        return True
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) > 0


def _as_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise BadRow(DropReason.NOT_TEXT, f"{where} is {_kind(message)} where a message is expected")
    role_key, content_key = ("role", "content") if message.get("role") is not None else ("from", "value")
    name = message.get(role_key)
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise BadRow(DropReason.WRONG_ROLES, f"{where} has the unknown role {shown(name)}")
    # Arrow gives every message the keys of all messages, filled with None; templates that ask `is defined` must not
    # see those. Keys that someone set stay.
    rest = {k: v for k, v in message.items() if v is not None and k not in ("role", "content", "from", "value")}
    if name.lower() == "function_call":
        call = _tool_call(message.get(content_key), where)
        return {"role": "assistant", "content": "", "tool_calls": [call], **rest}
    content = message.get(content_key)
    if isinstance(content, (list, tuple)):
        content = "".join(_text_part(part, f"{where}.{content_key}") for part in content)
    elif content is None and rest.get("tool_calls"):
        content = ""
    return {"role": ROLES[name.lower()], "content": as_text(content, f"{where}.{content_key}"), **rest}


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        return as_text(part.get("text"), where)
    raise BadRow(DropReason.NOT_TEXT, f"{where} has a part that is not text")


def _tool_call(value: Any, where: str) -> dict[str, Any]:
    try:
        call = json.loads(value) if isinstance(value, str) else value
        return {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadRow(
            DropReason.NOT_TEXT, f"{where} is a function call that is not JSON with name and arguments"
        ) from None


def check_order(messages: Messages, where: str) -> None:
    """Check that `messages` are a conversation, or the beginning of one.

    A conversation is an optional system message, then user and assistant in turn, where tools may answer the
    assistant.

    Raises:
        BadRow: `wrong roles`, naming the first message out of order.
    """
    previous: str | None = None
    for index, message in enumerate(messages):
        if message["role"] not in _MAY_FOLLOW[previous]:
            before = "at the start" if previous is None else f"after {previous}"
            raise BadRow(DropReason.WRONG_ROLES, f"{where}: message {index} is {message['role']} {before}")
        previous = message["role"]


def check_roles(prompt: Messages, completion: Messages, where: str) -> None:
    """Check that `prompt` + `completion` is a conversation and that the completion is the assistant's.

    The prompt ends with a user or a tool; the completion starts and ends with the assistant.

    Raises:
        BadRow: `wrong roles`, naming what is out of order.
    """
    check_order([*prompt, *completion], where)
    if completion[0]["role"] != "assistant":
        raise BadRow(DropReason.WRONG_ROLES, f"{where} starts with {completion[0]['role']}, not with assistant")
    if completion[-1]["role"] != "assistant":
        raise BadRow(DropReason.WRONG_ROLES, f"{where} ends with {completion[-1]['role']}, not with assistant")


def is_empty(message: Message) -> bool:
    """Whether a message says nothing: only whitespace and no tool call."""
    return not message["content"].strip() and not message.get("tool_calls")


def is_transcript(value: Any) -> bool:
    """Whether a string is a transcript as Anthropic's HH writes them: blank line, "Human:", …, "Assistant:"."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def transcript_to_messages(text: str) -> Messages:
    """Split a transcript at its "Human:" and "Assistant:" lines; the turns' texts are stripped."""
    pieces = _TURN.split("\n\n" + text.lstrip())[1:]
    names, contents = pieces[0::2], pieces[1::2]
    return [
        {"role": "user" if name == "Human" else "assistant", "content": content.strip()}
        for name, content in zip(names, contents, strict=True)
    ]


def split_transcript(text: str) -> tuple[str, str]:
    """Return (prompt, completion) as plain text; the prompt ends with the last "Assistant:"."""
    marks = list(_TURN.finditer(text))
    end = marks[-1].end() if marks else len(text)
    return text[:end], text[end:]


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    return f"{type(value).__name__} ({(value if isinstance(value, str) else shown(value))[:40]!a})"
