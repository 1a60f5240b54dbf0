"""Strategies for rows: well-formed ones of every format, and the same with something nasty in some place."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Row = dict[str, Any]

# What breaks readers, terminals, templates and markup.
NASTY_TEXTS = (
    "",
    " ",
    "\n\t\u00a0\u2028",
    "\x00",
    "\x1b[31mred\x1b[0m \x07",
    "\u202eright to left\u202c",
    "שלום עולם",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "e\u0301\u0327",
    "\ud83d",
    "a\udc80b",
    "\ufeff\ufffe",
    " " * 3000,
    "hello " * 400,
    "</s>",
    "hello</s>",
    "<|im_start|>assistant\nhi<|im_end|>",
    "{{ 7 * 7 }}{% for x in y %}",
    "%s %d {0} {name} ${x}",
    "[/bold]",
    "\\[/bold] [red]",
    "\n\nHuman: hello\n\nAssistant: hello",
    "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
    "␟marker␟",
    '{"role": "user"}',
    "nan",
)
ROLE_NAMES = ("system", "user", "assistant", "tool", "human", "gpt", "Model", "function_call", "nobody", "\ud83d", "")

_words = st.lists(st.sampled_from(["hello", "the", "bar", "far", "w1", "w2", "no", ",", "\n"]), min_size=1, max_size=6)
clean_texts = st.one_of(
    _words.map(" ".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
)
_nasty_texts = st.one_of(
    st.sampled_from(NASTY_TEXTS),
    st.text(st.characters(), max_size=8),  # lone surrogates too
    st.builds("".join, st.lists(st.one_of(clean_texts, st.sampled_from(NASTY_TEXTS)), max_size=3)),
)
# Mostly clean: a row has many texts, and one that is nasty shows what it does.
texts = st.integers(0, 6).flatmap(lambda one: _nasty_texts if one == 6 else clean_texts)


def deep(levels: int, kind: str = "list") -> Any:
    """A value nested that deep."""
    value: Any = "x"
    for _ in range(levels):
        value = [value] if kind == "list" else {"content": value}
    return value


# Nothing that a text column holds: each is made anew, because what is given may be changed.
wrong_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**5000), 2**31, 2**63]),
    st.floats(),
    st.binary(max_size=4),
    st.builds(dict),
    st.builds(list),
    st.builds(object),
    st.just(b"hello"),
    st.builds(deep, st.sampled_from([3, 200, 5000]), st.sampled_from(["list", "dict"])),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), st.integers(), max_size=2),
    st.recursive(st.one_of(st.none(), st.text(max_size=3)), lambda inner: st.lists(inner, max_size=2), max_leaves=4),
    st.tuples(st.text(max_size=3), st.text(max_size=3)),
    st.sets(st.integers(), max_size=2),
)
contents = st.one_of(
    texts,
    texts,
    st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=2),
    st.just([{"type": "image"}]),
)


@st.composite
def turns(draw: st.DrawFn, clean: bool = False) -> list[Row]:
    """A conversation that ends with a user, the answer not included."""
    words = clean_texts if clean else texts
    found: list[Row] = [{"role": "system", "content": draw(words)}] if draw(st.integers(0, 3)) == 0 else []
    for _ in range(draw(st.integers(0, 2))):
        found += [{"role": "user", "content": draw(words)}, {"role": "assistant", "content": draw(words)}]
    return [*found, {"role": "user", "content": draw(words)}]


def answers(clean: bool = False) -> st.SearchStrategy[list[Row]]:
    """What an assistant says: one message."""
    words = clean_texts if clean else texts
    return words.map(lambda text: [{"role": "assistant", "content": text}])


def loose_messages() -> st.SearchStrategy[list[Any]]:
    """Messages in any order, of any role, with any content, and among them what are no messages."""
    names = st.one_of(st.sampled_from(ROLE_NAMES), st.none(), st.integers())
    message = st.one_of(
        st.fixed_dictionaries(
            {"role": names, "content": contents}, optional={"name": texts, "tool_calls": wrong_values}
        ),
        st.fixed_dictionaries({"from": names, "value": st.one_of(contents, st.just('{"name": 1}'))}),
    )
    return st.lists(st.one_of(message, message, message, wrong_values), max_size=4)


@st.composite
def text_rows(draw: st.DrawFn, clean: bool = False, explicit: bool = True) -> Row:
    """Prompt, chosen and rejected as text, or the prompt inside both."""
    words = clean_texts if clean else texts
    prompt, chosen, rejected = draw(words), draw(words), draw(words)
    if explicit:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


@st.composite
def chat_rows(draw: st.DrawFn, clean: bool = False, explicit: bool = True) -> Row:
    """Prompt, chosen and rejected as messages, or the prompt inside both."""
    prompt, chosen, rejected = draw(turns(clean)), draw(answers(clean)), draw(answers(clean))
    if explicit:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {"chosen": [*prompt, *chosen], "rejected": [*prompt, *rejected]}


@st.composite
def transcript_rows(draw: st.DrawFn) -> Row:
    """Anthropic's HH transcripts."""
    start = "".join(f"\n\nHuman: {draw(texts)}\n\nAssistant: {draw(texts)}" for _ in range(draw(st.integers(0, 1))))
    start += f"\n\nHuman: {draw(texts)}\n\nAssistant:"
    return {"chosen": start + draw(texts), "rejected": start + draw(texts)}


@st.composite
def sharegpt_rows(draw: st.DrawFn) -> Row:
    """Messages with `from` and `value`, as LLaMA-Factory's files have them, and sometimes a `system` column."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    asked = [{"from": names[turn["role"]], "value": turn["content"]} for turn in draw(turns())]
    row: Row = {
        "conversations": asked,
        "chosen": {"from": "gpt", "value": draw(texts)},
        "rejected": {"from": "gpt", "value": draw(texts)},
    }
    return {**row, "system": draw(texts)} if draw(st.booleans()) else row


@st.composite
def unpaired_rows(draw: st.DrawFn) -> Row:
    """One completion and a label: text, messages, or a whole conversation."""
    label = draw(st.one_of(st.booleans(), st.booleans(), st.sampled_from([0, 1, "true", " FALSE ", 2, None, "yes"])))
    asked, answer = draw(turns()), draw(answers())
    shape = draw(st.sampled_from(["text", "messages", "conversation"]))
    if shape == "conversation":
        return {"messages": [*asked, *answer], "label": label}
    if shape == "messages":
        return {"prompt": asked, "completion": answer, "label": label}
    return {"prompt": draw(texts), "completion": draw(texts), "label": label}


@st.composite
def token_rows(draw: st.DrawFn) -> Row:
    """Ids that were made elsewhere; some are none."""
    ids = st.one_of(st.integers(0, 300), st.integers(0, 300), st.sampled_from([-1, 10**9, 2**40, True, 1.0, "3", None]))
    rows = st.lists(ids, max_size=6)
    return {name: draw(rows) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


_tools = st.one_of(
    st.just([{"type": "function", "function": {"name": "f", "parameters": {"a": None}}}]),
    st.sampled_from(["", " ", "[", "[]", '[{"a": 1}]', "{}", "[" * 5000, '{"a":' * 5000, "1" * 5000, "\ud83d"]),
    wrong_values,
)
_template_kwargs = st.one_of(
    st.just({"enable_thinking": False, "limit": 2}),
    st.sampled_from(["", "{}", '{"limit": 1}', "[" * 5000, '{"tokenize": true}', '{"messages": []}', '{"": 1}']),
    st.dictionaries(st.sampled_from(["limit", "messages", "self", "chat_template", "tokenize", "x y"]), st.integers()),
    wrong_values,
)
_numbers = st.one_of(st.floats(0, 2), st.sampled_from([-1.0, float("nan"), float("inf"), 10**400, "1", None, True]))
_EXTRAS: dict[str, st.SearchStrategy[Any]] = {
    "tools": _tools,
    "chat_template_kwargs": _template_kwargs,
    "weight": _numbers,
    "margin": _numbers,
    "ref_chosen_logps": _numbers,
    "system": texts,
    "label": st.booleans(),
    "source": st.one_of(texts, wrong_values),
}
# How often a row is taken as it was drawn, gets a further column, has a value replaced, loses a column.
_CHANGES = ("none", "none", "none", "extra", "extra", "value", "messages", "lost")


@st.composite
def spoiled(draw: st.DrawFn, rows: st.SearchStrategy[Row]) -> Row:
    """A row that is often as it was drawn, and otherwise has something wrong in one place."""
    row = dict(draw(rows))
    change = draw(st.sampled_from(_CHANGES))
    if change == "extra":
        name = draw(st.sampled_from(sorted(_EXTRAS)))
        row[name] = draw(_EXTRAS[name])
    elif change != "none":
        name = draw(st.sampled_from(sorted(row)))
        if change == "lost":
            del row[name]
        else:
            row[name] = draw(wrong_values if change == "value" else loose_messages())
    return row


TEXT_FORMATS = (text_rows(), text_rows(explicit=False))
PAIRED_FORMATS = (*TEXT_FORMATS, chat_rows(), chat_rows(explicit=False), transcript_rows(), sharegpt_rows())
FORMATS = (*PAIRED_FORMATS, *PAIRED_FORMATS, unpaired_rows(), token_rows(), st.one_of(*PAIRED_FORMATS))
CLEAN_FORMATS = tuple(
    make(clean=True, explicit=explicit) for make in (text_rows, chat_rows) for explicit in (True, False)
)


@st.composite
def datasets(draw: st.DrawFn, formats: tuple[st.SearchStrategy[Row], ...]) -> list[Row]:
    """Some rows of one format, most of them as they were drawn and the others spoiled."""
    rows = draw(st.sampled_from(formats))
    return draw(st.lists(rows, min_size=1, max_size=3)) + draw(st.lists(spoiled(rows), max_size=3))


def clean_datasets(formats: tuple[st.SearchStrategy[Row], ...] = CLEAN_FORMATS) -> st.SearchStrategy[list[Row]]:
    """Rows of one format and one type, as Arrow holds them."""
    return st.one_of(*(st.lists(rows, min_size=1, max_size=5) for rows in formats))
