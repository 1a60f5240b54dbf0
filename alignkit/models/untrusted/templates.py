"""Chat templates from strangers: programs in a sandbox that keeps them from files, not from running for ever."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

from alignkit.errors import ModelError

_CPU_SECONDS = 3  # a template takes milliseconds; a slow machine has its time all the same
_MOST_SECONDS = 30.0
_MAX_BYTES = 2 * 2**30


@functools.lru_cache(maxsize=64)
def check_template(template: str, where: str) -> None:
    """Try a chat template on a short conversation, in another process that has little time and memory.

    Rendering cannot be stopped from within: a few loops in one another, or one power of a power, run for years. A
    template that only does so for a certain text is not found out. What else is wrong with one is for its use to say.

    Raises:
        ModelError: it takes too long, or too much memory.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _TRY],
            input=json.dumps([template, _CPU_SECONDS, _MAX_BYTES]),
            capture_output=True,
            text=True,
            timeout=_MOST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        stopped = True
    else:
        stopped = done.returncode not in (0, 1)  # ended from outside, or out of memory
    if stopped:
        raise ModelError(
            f"The chat template of '{where}' does not end within {_CPU_SECONDS} s for three short messages, or fills "
            "the memory. Do not use it: remove it from the folder, and set tokenizer.chat_template yourself."
        )


_TRY = """
import json, sys
template, seconds, most = json.load(sys.stdin)
import jinja2.ext, jinja2.sandbox
class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
except ImportError:  # the other process waits no longer than it wants to
    pass
def raise_exception(message):
    raise jinja2.TemplateError(message)
roles = ("system", "user", "assistant")
try:
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = lambda value, **options: json.dumps(value)
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": lambda text: text}
    made = sandbox.from_string(template)
    for known in (roles, roles[1:]):  # some know no system
        for ask in (False, True):
            messages = [{"role": role, "content": "Hello."} for role in known]
            try:
                made.render(messages=messages, tools=None, add_generation_prompt=ask, bos_token="", eos_token="")
            except jinja2.TemplateError:
                pass
except MemoryError:
    sys.exit(3)
except Exception:
    sys.exit(1)
"""
