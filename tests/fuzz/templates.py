"""Chat templates: the shapes that models really have, and broken ones."""

from __future__ import annotations

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The end of a turn is the EOS, and nothing introduces an answer.
NO_GENERATION_PROMPT = "{% for m in messages %}[{{ m.role }}] {{ m.content }} </s>{% endfor %}"
# As thinking models have it: the prompt for generation is not how the finished turn begins.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
WORKING = {
    "chatml": CHATML,
    "chatml with tools": CHATML_TOOLS,
    "llama 3": LLAMA3,
    "gemma": GEMMA,
    "no generation prompt": NO_GENERATION_PROMPT,
    "thinking": THINKING,
}
# Templates after which the last completion token is the tokenizer's EOS, or is followed by a line break alone.
ENDS_WITH_EOS = ("no generation prompt", "thinking")

BROKEN = {
    "syntax": "{% for m in messages %}{{ m.content }",
    "unknown filter": "{{ messages | no_such_filter }}",
    "unknown function": "{{ strftime_then('x') }}",
    "undefined attribute": "{{ messages[0].nothing.further }}",
    "index": "{{ messages[100].content }}",
    "text plus number": "{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
    "division by zero": "{{ 1 // (messages | length - messages | length) }}",
    "huge range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "overflow": "{{ 2.0 ** 5000 }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "forbidden": "{{ messages.__class__.__mro__ }}",
    "refuses all": "{{ raise_exception('never') }}",
    "repeats what it refuses": "{{ raise_exception(messages[0].content ~ messages[0].name) }}",
    "says nothing": "",
    "says the same": "hello",
    "forgets the answers": "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
    "forgets the questions": "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}",
    "backwards": "{% for m in messages[::-1] %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "counts messages": "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "changes what it is given": "{% for m in messages %}{{ messages.pop() }}{% endfor %}",
    "lists what it is given": "{{ messages }}",
    "needs an argument": "{% for m in messages %}{{ m.content[:limit] }}{% endfor %}",
}
