"""Sentences of the model card that follow from the record: what it is, how it is loaded, its purpose and limits."""

from __future__ import annotations

import json

from alignkit.hub.record import RunRecord
from alignkit.hub.wording import METHODS, base_name, count, size, value_of

_BYTES_PER_WEIGHT_16_BIT = 2.0
_BYTES_PER_WEIGHT_NF4 = 0.52  # with double quantization, arXiv 2305.14314

_GENERATE_CHAT = """messages = [{"role": "user", "content": "Give me three tips for a good night's sleep."}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""

_GENERATE_TEXT = """inputs = tokenizer("The best way to fall asleep is", return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""

_SCORE = """inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4."}],
    return_tensors="pt", return_dict=True,
)
print(model(**inputs).logits)  # the reward; only differences between answers to one prompt mean something"""

_SCORE_TEXT = """inputs = tokenizer("What is 2 + 2? 4." + tokenizer.eos_token, return_tensors="pt")
print(model(**inputs).logits)  # the reward; only differences between answers to one prompt mean something"""


def what_it_is(record: RunRecord) -> str:
    """One sentence: what was trained, on which base, how and on what."""
    kind = "A LoRA adapter" if record.adapter and record.adapter["kind"] == "LORA" else "An adapter"
    kind = kind if record.adapter else "A model, trained whole,"
    base = base_name(record.base)
    shown = f"[{base}](https://huggingface.co/{base})" if record.base.get("hub_id") else f"`{base}`"
    relation = "for" if record.adapter else "from"
    method = METHODS.get(record.method, record.method)
    train = next((each for each in record.data if each["name"] == "train"), {})
    rows = f"{train['rows']:,} rows" if train.get("rows") is not None else "a stream of rows"
    source = f" of {train['source']}" if train.get("source") else ""
    what = "prompts" if record.method == "ppo" else "preferences"
    trained = "" if record.method == "reward" else "trained by "
    earlier = ", continuing from an adapter of an earlier training" if (record.adapter or {}).get("continued") else ""
    return f"{kind} {relation} {shown}, {trained}{method} on {what}: {rows}{source}{earlier}. Made with alignkit."


def reward_advice(record: RunRecord) -> str | None:
    """What to know before rewards are computed; `None` for a policy."""
    if record.method != "reward":
        return None
    return (
        "`pad_token_id` matters: a sequence classifier reads the last token whose id is not the padding token's, and "
        "with a padding token that equals the end-of-sequence token it would read the token before the end. The "
        "tokenizer here pads with another one. `alignkit.load_reward_model(model_id)` does all of this and keeps the "
        "head in fp32, as in training; in 16 bits rewards are those of training up to rounding. Tokenize prompt and "
        "answer together: conversations with the chat template, plain text with EOS at its end."
    )


def base_advice(record: RunRecord, repo_id: str | None) -> str | None:
    """What to know about the base before loading; `None` where the snippet is all."""
    base = record.base
    if base.get("hub_id") is None and repo_id is not None:
        return (
            f"The base, `{base['name']}`, is {base.get('note') or 'no repository of the Hub'}: you need your own copy "
            "of it, and its path instead of its name when you load."
        )
    if base.get("note"):
        return f"It was trained on a base that was {base['note']}."
    return None


def snippet(record: RunRecord, repo_id: str | None) -> str:
    """Lines of Python that load the model without alignkit and use it.

    Args:
        record: of the run.
        repo_id: on the Hub; `None` for the folder that the card lies in.
    """
    place = f"model_id = {json.dumps(repo_id)}" if repo_id else 'model_id = "."  # the folder that holds this card'
    is_chat = bool(record.base.get("is_chat"))
    if record.method == "reward":
        return "\n".join([*_reward_loading(record, place), "", _SCORE if is_chat else _SCORE_TEXT])
    return "\n".join(
        [*_policy_loading(record, place, on_hub=repo_id is not None), "", _GENERATE_CHAT if is_chat else _GENERATE_TEXT]
    )


def _policy_loading(record: RunRecord, place: str, *, on_hub: bool) -> list[str]:
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(model_id)"
    if record.adapter is None:
        load = 'model = AutoModelForCausalLM.from_pretrained(model_id, dtype="auto")'
        return ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", place, tokenizer, load]
    if record.base.get("hub_id") is None and on_hub:  # beside the run, the adapter's config knows where the base is
        return [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            place,
            tokenizer,
            f'base = AutoModelForCausalLM.from_pretrained({json.dumps(record.base["name"])}, dtype="auto")',
            "model = PeftModel.from_pretrained(base, model_id)",
        ]
    load = 'model = AutoPeftModelForCausalLM.from_pretrained(model_id, dtype="auto")'
    imports = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
    return [*imports, "", place, tokenizer, load]


def _reward_loading(record: RunRecord, place: str) -> list[str]:
    heads = record.settings.get("num_heads", 1)
    pad = "pad_token_id=tokenizer.pad_token_id"
    imports = ["from transformers import AutoModelForSequenceClassification, AutoTokenizer", "", place]
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(model_id)"
    if record.adapter is None:
        load = f'model = AutoModelForSequenceClassification.from_pretrained(model_id, dtype="float32", {pad}).eval()'
        return [*imports, tokenizer, load]
    return [
        "from peft import PeftConfig, PeftModel",
        *imports,
        tokenizer,
        "base = AutoModelForSequenceClassification.from_pretrained(",
        "    PeftConfig.from_pretrained(model_id).base_model_name_or_path,",
        f'    num_labels={heads}, {pad}, dtype="float32",',
        ")",
        "model = PeftModel.from_pretrained(base, model_id).eval()",
    ]


def memory_needed(record: RunRecord) -> str:
    """What the weights take, by arithmetic."""
    weights = record.base["parameters"]
    packed = size(weights * _BYTES_PER_WEIGHT_NF4)
    adapter = ""
    if record.adapter is not None:
        adapter = f", and {size(4 * record.adapter['trainable_parameters'])} for what was trained"
    return (
        f"Memory for the weights, by arithmetic: {size(weights * _BYTES_PER_WEIGHT_16_BIT)} in 16 bits, or {packed} in "
        f"4 bits (NF4) for {count(weights)} parameters{adapter}; keys, values and activations come on top."
    )


def intended_use(record: RunRecord) -> str:
    """What the model is for, by its method."""
    if record.method == "reward":
        return (
            "Ranking answers to one prompt, or rewarding them in training. A reward says which of two answers people "
            "of this data set would rather have; it is no measure of truth or safety, and a policy that is trained "
            "against it will find its weaknesses."
        )
    return (
        "Answering prompts of the kind that it was trained on, and studying what this training changed. It takes its "
        "abilities and its faults from the base, whose own card and license apply too."
    )


def limits(record: RunRecord) -> list[str]:
    """What the record does not support, or speaks against."""
    found = []
    if not any(each["name"].startswith("safety") for each in record.evaluations):
        found.append("No safety evaluation was made: nothing is known about harmful answers, or needless refusals.")
    if record.audit is None:
        found.append("The data was not audited for near-duplicates, contradictions or overlap with the held-out rows.")
    if not record.evaluations:
        found.append("It was not evaluated on rows that it was not trained on.")
    for evaluation in record.evaluations:
        accuracy, shorter = (evaluation["metrics"].get(name) for name in ("accuracy", "shorter"))
        low = accuracy.get("low") if isinstance(accuracy, dict) else None
        length = value_of(shorter)
        if low is not None and length is not None and low <= length:
            found.append(
                f"{evaluation['name']}: the interval of the accuracy reaches {low:.3f}, and preferring the shorter "
                f"answer alone gives {length:.3f}: this is no proof that more than length was learned."
            )
    if record.method == "ppo":
        found.append(
            "The reward is the one that was trained against, so a higher reward shows that the optimizer worked and "
            "not that answers are better; read the answers."
        )
    if record.base.get("quantization"):
        found.append(
            f"It was trained on a base packed as {record.base['quantization']}; on unpacked weights it behaves a "
            "little differently."
        )
    if not any((each.get("details") or {}).get("other_run") for each in record.evaluations):
        found.append("One run with one seed: other seeds give other figures.")
    return found
