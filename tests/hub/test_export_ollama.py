"""Modelfiles: read as Ollama reads them, and rendered as Go renders them, they give the tokenizer's own text."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, PreTrainedTokenizerFast

from alignkit.hub.ollama import ChatPieces, chat_pieces, go_template, stop_strings, write_modelfile
from tests.models.conftest import character_tokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The system message goes into the first user message.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set before = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set before = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ before if loop.first else '' }}{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + ZEPHYR
NUMBERED = "{% for message in messages %}{{ loop.index }}. {{ message['content'] }}\n{% endfor %}"


def tokenizer_with(template: str | None, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = character_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = template
    return tokenizer


# ------------------------------------------------------------ Ollama's reader, and the part of Go's templates in use


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Read commands and their arguments as Ollama's parser does, or fail."""
    commands, rest = [], text
    while rest:
        if rest[0] in " \t\n":
            rest = rest[1:]
            continue
        if rest[0] == "#":
            rest = rest.partition("\n")[2]
            continue
        found = re.match(r'([A-Za-z]+) (?:"""(.*?)"""|"([^"\n]*)"|([^"\n][^\n]*))(?:\n|$)', rest, re.DOTALL)
        assert found, f"Ollama cannot read: {rest[:60]!r}"
        name = found[1].lower()
        assert name in {"from", "template", "system", "adapter", "license", "parameter", "message", "requires"}
        value = next(part for part in found.groups()[1:] if part is not None)
        if name == "parameter":
            name, value = _parameter(value)
        commands.append((name, value))
        rest = rest[found.end() :]
    assert any(name == "from" for name, _ in commands), "no FROM line"
    return commands


def _parameter(value: str) -> tuple[str, str]:
    name, _, argument = value.partition(" ")
    assert re.fullmatch(r"[A-Za-z0-9_]+", name)
    if argument.startswith('"'):
        assert len(argument) >= 2
        assert argument.endswith('"')
        argument = argument[1:-1]
    return name, argument


def execute(template: str, messages: list[dict[str, str]]) -> str:
    """Execute a template on what Ollama hands to it."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    pieces = iter(re.split(r"(\{\{.*?\}\})", template))
    return _block(list(pieces), {"System": system, "Messages": messages})


def _block(pieces: list[str], scope: dict[str, Any]) -> str:
    output, index = [], 0
    while index < len(pieces):
        piece = pieces[index]
        if not piece.startswith("{{"):
            output.append(piece)
        elif (action := piece[2:-2].strip()).startswith("."):
            output.append(str(scope[action[1:]]))
        else:
            branches, end = _branches(pieces, index)
            if action.startswith("range "):
                for item in scope[action.split(".")[1]]:
                    fields = {"Role": item["role"], "Content": item["content"]}
                    output.append(_block(branches[0][1], fields))
            else:
                chosen = next((body for condition, body in branches if _holds(condition, scope)), [])
                output.append(_block(chosen, scope))
            index = end
        index += 1
    return "".join(output)


def _branches(pieces: list[str], start: int) -> tuple[list[tuple[str, list[str]]], int]:
    """The branches of the `if` or `range` at `start`, each with its condition, and where its `end` is."""
    branches: list[tuple[str, list[str]]] = [(pieces[start][2:-2].strip(), [])]
    depth = 0
    for index in range(start + 1, len(pieces)):
        action = pieces[index][2:-2].strip() if pieces[index].startswith("{{") else ""
        if depth == 0 and action == "end":
            return branches, index
        if depth == 0 and action.startswith("else"):
            branches.append((action.removeprefix("else").strip() or "if true", []))
            continue
        depth += action.startswith(("if ", "range ")) - (action == "end")
        branches[-1][1].append(pieces[index])
    raise AssertionError("a block without its end")


def _holds(condition: str, scope: dict[str, Any]) -> bool:
    if condition == "if true":
        return True
    if found := re.fullmatch(r'if eq \.(\w+) "(\w+)"', condition):
        return scope[found[1]] == found[2]
    found = re.fullmatch(r"if \.(\w+)", condition)
    assert found, f"not in use: {condition}"
    return bool(scope[found[1]])


def conversations() -> Iterator[list[dict[str, str]]]:
    turns = [("user", "Hi {there}"), ("assistant", "Yes?"), ("user", 'Say "x"'), ("assistant", "x"), ("user", "Bye")]
    for count in (1, 3, 5):
        for system in ([], [("system", "Answer in one word.")]):
            yield [{"role": role, "content": content} for role, content in [*system, *turns[:count]]]


# ------------------------------------------------------------ templates


@pytest.mark.parametrize("template", [CHATML, LLAMA3, ZEPHYR], ids=["chatml", "llama3", "zephyr"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_go_template_writes_what_the_chat_template_writes(tmp_path: Path, template: str, adds_bos: bool) -> None:
    tokenizer = tokenizer_with(template, adds_bos=adds_bos)
    commands = read_modelfile(write_modelfile(tmp_path, "model.gguf", tokenizer).read_text())
    (written,) = [value for name, value in commands if name == "template"]
    for messages in conversations():
        wanted: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # llama.cpp puts <s> before every text where the tokenizer does.
        assert execute(written, messages) == (wanted.removeprefix("<s>") if adds_bos else wanted)


@pytest.mark.parametrize("template", [None, GEMMA, NO_SYSTEM, NUMBERED, "{% broken"])
def test_what_cannot_be_proved_equal_is_left_to_ollama(
    tmp_path: Path, template: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tokenizer_with(template)
    assert chat_pieces(tokenizer) is None
    with caplog.at_level(logging.WARNING, logger="alignkit"):
        text = write_modelfile(tmp_path, "model.gguf", tokenizer).read_text()
    assert [name for name, _ in read_modelfile(text)] == ["from", "stop"]
    assert "ollama show --template" in text
    assert "no TEMPLATE" in caplog.text


@pytest.mark.parametrize("literal", ["{{ .System }}", "a}}", '"""', "\u00a0", "\x07"])
def test_what_a_modelfile_cannot_hold_is_not_written(literal: str) -> None:
    good = ChatPieces("", ("<s>", "\n"), ("<u>", "\n"), ("<a>", "\n"))
    assert go_template(good) is not None
    assert go_template(good._replace(user=(literal, "\n"))) is None


def test_what_runs_into_the_signs_around_it_is_left_to_ollama() -> None:
    good = ChatPieces("", ("<s>", "</s>"), ("<u>", "</u>"), ("<a>", "</a>"))
    assert go_template(good) is not None
    assert go_template(good._replace(user=("{", "}"))) is None
    assert go_template(good._replace(without_system="{")) is None
    assert go_template(good._replace(assistant=('"', '"'))) is None
    assert go_template(good._replace(user=('"', '"'))) is not None


# ------------------------------------------------------------ the rest of the file


def test_a_whole_modelfile(tmp_path: Path) -> None:
    generation = GenerationConfig(eos_token_id=[2, ord("!")])
    path = write_modelfile(
        tmp_path, "model.gguf", tokenizer_with(CHATML), generation=generation, license_name="apache-2.0"
    )
    assert path == tmp_path / "Modelfile"
    assert str(tmp_path) not in path.read_text()
    commands = read_modelfile(path.read_text())
    assert [name for name, _ in commands] == ["from", "template", "stop", "stop", "license"]
    assert commands[0] == ("from", "./model.gguf")
    assert commands[2:] == [("stop", "</s>"), ("stop", "!"), ("license", "apache-2.0")]


def test_stops_are_the_ends_that_are_known() -> None:
    tokenizer = tokenizer_with(CHATML)
    assert stop_strings(tokenizer) == ["</s>"]
    assert stop_strings(tokenizer, GenerationConfig(eos_token_id=2)) == ["</s>"]
    assert stop_strings(tokenizer, GenerationConfig(eos_token_id=ord('"'))) == ["</s>"]
