"""An Ollama Modelfile for a GGUF file.

Ollama does not run the Jinja chat template inside a GGUF file. Where a Modelfile has no TEMPLATE, it looks that one up
in a list of its own, by edit distance, and takes `{{ .Prompt }}` where nothing is near: the model then sees bare text,
and nobody is told. So the template is written out in Ollama's language (Go's text/template) where that can be proved to
give the same text, and is left to Ollama, with a comment that says so, where it cannot.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SYSTEM, _USER, _ANSWER, _AGAIN = "Ssystem7f3a", "Uuser41bd", "Aassistant9c2e", "Uagain58d0"


class ChatPieces(NamedTuple):
    """What a chat template puts around messages; the text is `start + (around each message) + answer_begin`."""

    without_system: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Put the pieces together as `go_template` does, with the beginning of an answer at the end."""
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        parts = [self.system[0] + system + self.system[1] if system else self.without_system]
        for message in messages:
            if message["role"] != "system":
                before, after = self.user if message["role"] == "user" else self.assistant
                parts.append(before + message["content"] + after)
        return "".join(parts) + self.assistant[0]


def chat_pieces(tokenizer: PreTrainedTokenizerBase) -> ChatPieces | None:
    """Take a chat template apart, or return None where it is more than a text around each message.

    The pieces are checked against the template itself, on conversations with and without a system message. What a
    tokenizer puts before every text by itself is left out, because llama.cpp adds it too.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        pieces = _take_apart(tokenizer)
        same = pieces is not None and all(
            pieces.render(messages) == _render(tokenizer, messages, answer=True) for messages in _CONVERSATIONS
        )
    except (TemplateError, ValueError, TypeError):  # the template refuses a conversation, or is none
        return None
    return pieces if same else None


_CONVERSATIONS: tuple[list[dict[str, str]], ...] = tuple(
    [{"role": role, "content": content} for role, content in messages]
    for messages in (
        [("user", "Hello")],
        [("system", "Be brief."), ("user", "Hello, 1 + 1?")],
        [("user", "Hello"), ("assistant", "Hi."), ("user", "And now?")],
        [
            ("system", "Be kind."),
            ("user", "One"),
            ("assistant", "Two"),
            ("user", "3"),
            ("assistant", "4"),
            ("user", "5"),
        ],
    )
)


def _take_apart(tokenizer: PreTrainedTokenizerBase) -> ChatPieces | None:
    system, user, answer, again = (
        {"role": role, "content": content}
        for role, content in (("system", _SYSTEM), ("user", _USER), ("assistant", _ANSWER), ("user", _AGAIN))
    )
    whole = _split(_render(tokenizer, [system, user, answer, again], answer=False), _SYSTEM, _USER, _ANSWER, _AGAIN)
    alone = _split(_render(tokenizer, [user], answer=False), _USER)
    ended = _split(_render(tokenizer, [user, answer], answer=False), _USER, _ANSWER)
    open_ended = _split(_render(tokenizer, [user], answer=True), _USER)
    if whole is None or alone is None or ended is None or open_ended is None:
        return None
    before_system, system_to_user, user_to_answer, answer_to_user, user_end = whole
    answer_begin, answer_end = open_ended[1].removeprefix(user_end), ended[-1]
    user_begin = answer_to_user.removeprefix(answer_end)
    fits = (
        open_ended[1].startswith(user_end),
        answer_to_user.startswith(answer_end),
        system_to_user.endswith(user_begin),
        alone[0].endswith(user_begin),
        user_to_answer == user_end + answer_begin,
    )
    if not all(fits):
        return None
    return ChatPieces(
        without_system=alone[0].removesuffix(user_begin),
        system=(before_system, system_to_user.removesuffix(user_begin)),
        user=(user_begin, user_end),
        assistant=(answer_begin, answer_end),
    )


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, answer: bool) -> str:
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    ids = tokenizer("")["input_ids"]
    adds_its_own = bool(ids) and ids[0] == tokenizer.bos_token_id
    return text.removeprefix(str(tokenizer.bos_token)) if adds_its_own else text


def _split(text: str, *marks: str) -> list[str] | None:
    """Cut `text` at each of `marks`, which must occur once and in order."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        parts.append(before)
    return [*parts, text]


def go_template(pieces: ChatPieces) -> str | None:
    """Write the pieces in Ollama's template language, or return None where a Modelfile cannot hold them."""
    literals = [pieces.without_system, *pieces.system, *pieces.user, *pieces.assistant]
    if any("{{" in text or "}}" in text or '"""' in text or not _is_printable(text) for text in literals):
        return None
    if any(text.endswith("{") for text in literals) or pieces.assistant[0].endswith('"'):
        return None  # it would run into the braces, or the quotes, that follow
    system = f"{pieces.system[0]}{{{{ .System }}}}{pieces.system[1]}"
    user = f"{pieces.user[0]}{{{{ .Content }}}}{pieces.user[1]}"
    assistant = f"{pieces.assistant[0]}{{{{ .Content }}}}{pieces.assistant[1]}"
    return (
        f"{{{{ if .System }}}}{system}{{{{ else }}}}{pieces.without_system}{{{{ end }}}}{{{{ range .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}'
        f"{pieces.assistant[0]}"
    )


def _is_printable(text: str) -> bool:
    """Ollama's reader drops every other character without a word."""
    return all(character.isprintable() or character in "\n\t" for character in text)


def stop_strings(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None = None) -> list[str]:
    """Return the texts at which an answer ends: the tokenizer's end of sequence, and those of the generation config."""
    named = [] if generation is None else generation.eos_token_id
    ids = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    tokens = [str(tokenizer.convert_ids_to_tokens(index)) for index in dict.fromkeys(ids) if index is not None]
    return [token for token in tokens if _is_printable(token) and '"' not in token]


def write_modelfile(
    folder: str | Path,
    gguf_name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    generation: GenerationConfig | None = None,
    license_name: str | None = None,
) -> Path:
    """Write `Modelfile` into `folder` and return its path.

    Args:
        folder: where the GGUF file lies; the Modelfile names it relative to itself.
        gguf_name: the file's name.
        tokenizer: whose chat template and end tokens the model was trained with.
        generation: whose end tokens stop an answer too.
        license_name: of the base, where it is known.
    """
    pieces = chat_pieces(tokenizer)
    template = None if pieces is None else go_template(pieces)
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{gguf_name}", ""]
    if template is not None:
        lines += [f'TEMPLATE """{template}"""', ""]
    else:
        reason = (
            "has no chat template" if tokenizer.chat_template is None else "has one that is no text around messages"
        )
        lines += [
            f"# No TEMPLATE: the tokenizer {reason}. Ollama takes the one of its own that is nearest to it,",
            "# or feeds the model bare text; see what it took with `ollama show --template NAME`.",
            "",
        ]
        logger.warning("The Modelfile has no TEMPLATE: the tokenizer %s. Check what Ollama takes instead.", reason)
    lines += [f'PARAMETER stop "{stop}"' for stop in stop_strings(tokenizer, generation)]
    if license_name is not None:
        lines += ["", f'LICENSE """{license_name}"""']
    path = Path(folder) / "Modelfile"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
