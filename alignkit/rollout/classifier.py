"""Sequence classifiers as rewards, each with its own tokenizer and chat template: what they get is text."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jinja2 import TemplateError
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import ConfigError, ModelError, nearest
from alignkit.models.attention import keep_soft_caps
from alignkit.rollout.reward import ComponentScores, RewardError, RewardFault, RewardInputs, single_component

logger = logging.getLogger(__name__)

Output = Literal["logit", "log_odds", "probability"]

_NO_LIMIT_TOKENS = 10**9  # tokenizers that know no limit say a number beyond this one
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
_NO_CLASSIFIER = re.compile(
    r"For(CausalLM|MaskedLM|ConditionalGeneration|QuestionAnswering|TokenClassification)|LMHead"
)


class _Head(NamedTuple):
    """How one number is read off the logits `(n, L)`: the label, and the function that makes `(n,)` of them."""

    label: int
    read: Callable[[Tensor, int], Tensor]


class ClassifierReward:
    """A sequence classifier as a reward source; its weights are frozen.

    A conversation is rendered by the classifier's own chat template. Text, and a conversation where the tokenizer has
    no template, is prompt and completion one after the other, with the special tokens that the tokenizer adds. What is
    longer than the classifier takes is cut from the left, where the prompt begins; a leading BOS or CLS stays.

    The score is read at a text's last token, whatever that token is. (`model(...)` by itself takes padding off by token
    id and reads a text that ends with a padding token too early; that matters where pad is EOS.)

    Args:
        model: a sequence classifier, or a `PeftModel` of one; it stays on its device.
        tokenizer: the model's own.
        name: for metrics and errors; by default the model's.
        label: which of several labels is the reward, by name or number.
        output: "logit" (the default where there is one label), "log_odds" (the default else): `log p / (1 − p)`, or
            "probability": `p`. `p` is a softmax over the labels, or a sigmoid of the label's own logit where there is
            one label or the model's labels do not exclude each other.
        completion_only: score the completion's text without the prompt and without a template.
        max_tokens: longest text; by default what the model and its tokenizer state.
        batch_tokens: most tokens in one forward pass, padding included.

    Attributes:
        truncated: samples that were cut so far.

    Raises:
        ModelError: not a classifier, or not a tokenizer.
        ConfigError: a label that the model lacks, none where it has several, or numbers out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        label: str | int | None = None,
        output: Output | None = None,
        completion_only: bool = False,
        max_tokens: int | None = None,
        batch_tokens: int = 8192,
    ) -> None:
        self._base = base_of(model)
        keep_soft_caps(self._base)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ModelError(f"a reward model needs its tokenizer, not {type(tokenizer).__name__}")
        self.names = (name or model_name(self._base),)
        self.model, self.tokenizer = model.requires_grad_(False), tokenizer
        self.completion_only, self.batch_tokens = completion_only, batch_tokens
        self.max_tokens = _max_tokens(self._base, tokenizer) if max_tokens is None else max_tokens
        for option, value in (("max_tokens", self.max_tokens), ("batch_tokens", batch_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{option}={value!r} of reward '{self.names[0]}': must be 1 or more")
        self._head = _head(self._base.config, label, output, self.names[0])
        self.truncated = 0
        self._said: set[str] = set()

    def __call__(self, inputs: RewardInputs) -> ComponentScores:
        """Return scores `(B, 1)` on the CPU.

        Raises:
            RewardError: samples that the template refuses or that have no text.
            ModelError: the tokenizer is another model's, or the model is no classifier.
        """
        faults: list[RewardFault] = []
        encoded: dict[int, list[int]] = {}
        for index, (prompt, completion) in enumerate(zip(inputs.prompts, inputs.completions, strict=True)):
            ids = self._encode(prompt, completion, index)
            if isinstance(ids, RewardFault):
                faults.append(ids)
            else:
                encoded[index] = ids
        values = self._values(encoded)
        scores = single_component([values.get(index) for index in range(len(inputs))])
        if faults:
            raise RewardError(self.names[0], faults, scores)
        return scores

    def _encode(self, prompt: Any, completion: Any, index: int) -> list[int] | RewardFault:
        try:
            text, is_rendered = self._text(prompt, completion)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            return RewardFault(
                index,
                "template refused",
                f"the reward model's chat template refuses the conversation ({type(error).__name__}: {error}). Give it "
                "the roles that this template knows, or score completions alone with completion_only.",
            )
        ids = self.tokenizer(text, add_special_tokens=not is_rendered, verbose=False)["input_ids"]
        ids = self._cut(cast("list[int]", ids))
        rows = cast(Any, self._base.get_input_embeddings()).num_embeddings
        if ids and max(ids) >= rows:
            raise ModelError(
                f"the tokenizer of reward '{self.names[0]}' makes token {max(ids)}, but the model has {rows} "
                "embeddings: it is another model's. Give the classifier's own in reward_processing_classes."
            )
        return ids or RewardFault(index, "no text", "prompt and completion have no token. Leave out empty prompts.")

    def _text(self, prompt: Any, completion: Any) -> tuple[str, bool]:
        """Return what to encode, and whether a template rendered it, special tokens included."""
        if self.completion_only:
            return _plain(completion), False
        if isinstance(prompt, str) or self.tokenizer.chat_template is None:
            if not isinstance(prompt, str):
                self._say_once("has no chat template: the contents of the messages are joined by blank lines")
                return "\n\n".join([_plain(prompt), _plain(completion)]), False
            return prompt + _plain(completion), False
        return str(self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)), True

    def _cut(self, ids: list[int]) -> list[int]:
        if self.max_tokens is None or len(ids) <= self.max_tokens:
            return ids
        self.truncated += 1
        self._say_once(f"takes {self.max_tokens} tokens: longer texts are cut from the left")
        has_mark = ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) and self.max_tokens > 1
        mark = ids[:1] if has_mark else []
        return mark + ids[len(mark) + len(ids) - self.max_tokens :]

    def _values(self, encoded: dict[int, list[int]]) -> dict[int, float]:
        """Score texts of similar length together."""
        values: dict[int, float] = {}
        with torch.no_grad(), evaluating(self.model):
            for batch in length_batches({index: len(ids) for index, ids in encoded.items()}, self.batch_tokens):
                logits = self._logits([encoded[index] for index in batch])  # (n, L)
                scores = self._head.read(logits, self._head.label)  # (n,)
                values.update(zip(batch, scores.tolist(), strict=True))
        return values

    def _logits(self, rows: list[list[int]]) -> Tensor:
        """Return logits `(n, L)` in fp32, on the CPU."""
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (n, T)
        pad = self._padding(rows)
        input_ids = torch.full(mask.shape, pad)
        input_ids[mask] = torch.tensor([token for row in rows for token in row])
        device = self.model.device
        with padding_with(self._base, pad):
            logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.long().to(device)).logits
        expected = (len(rows), self._base.config.num_labels)
        if logits.shape != expected:
            raise ModelError(
                f"reward '{self.names[0]}' ({type(self._base).__name__}) returned logits {tuple(logits.shape)} where a "
                f"sequence classifier returns {expected}. Load it with AutoModelForSequenceClassification."
            )
        return logits.float().cpu()

    def _padding(self, rows: list[list[int]]) -> int:
        """Choose the model's padding token, or another if a text ends with it: classifiers find a text's end by it."""
        last = {row[-1] for row in rows}
        own = self._base.config.get_text_config().pad_token_id
        if own is not None and own >= 0 and own not in last:
            return own
        if own in last:
            self._say_once(f"has texts that end with its padding token ({own}): scores are read at that token")
        return next(token for token in range(len(last) + 1) if token not in last)

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            logger.warning("reward '%s' %s.", self.names[0], what)
            self._said.add(what)


def base_of(model: Any) -> PreTrainedModel:
    """Return a classifier without PEFT's wrapper.

    Raises:
        ModelError: it is none.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise ModelError(f"a reward model must be a PreTrainedModel or a PeftModel of one, not {type(base).__name__}")
    if _NO_CLASSIFIER.search(type(base).__name__):
        raise ModelError(
            f"{type(base).__name__} is no sequence classifier and has no score to give. Load a reward model with "
            "AutoModelForSequenceClassification."
        )
    return base


def model_name(model: PreTrainedModel) -> str:
    """The last part of where the model came from, or its class."""
    return (model.config.name_or_path or "").rstrip("/").split("/")[-1] or type(model).__name__


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def padding_with(model: PreTrainedModel, pad: int) -> Iterator[None]:
    """Let a model take `pad` for its padding token, by which it finds where each text ends."""
    configs = [model.config, model.config.get_text_config()]
    before = [config.pad_token_id for config in configs]
    try:
        for config in configs:
            config.pad_token_id = pad
        yield
    finally:
        for config, token in zip(configs, before, strict=True):
            config.pad_token_id = token


def length_batches(lengths: dict[int, int], batch_tokens: int) -> list[list[int]]:
    """Group samples, longest first, so that rows × longest row of each group is at most `batch_tokens`, or one row."""
    batches: list[list[int]] = []
    for index in sorted(lengths, key=lambda index: -lengths[index]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def logit(logits: Tensor, label: int) -> Tensor:
    """`z_k`, `(n,)`."""
    return logits[:, label]


def log_odds(logits: Tensor, label: int) -> Tensor:
    """`log p_k / (1 − p_k) = z_k − log Σ_{j≠k} exp z_j` for a softmax over the labels, `(n,)`."""
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
    return logits[:, label] - others.logsumexp(dim=1)


def probability(logits: Tensor, label: int) -> Tensor:
    """`p_k` of a softmax over the labels, `(n,)`."""
    return logits.softmax(dim=1)[:, label]


def independent_probability(logits: Tensor, label: int) -> Tensor:
    """`p_k = 1 / (1 + exp −z_k)` for labels that do not exclude each other, `(n,)`."""
    return logits[:, label].sigmoid()


def _head(config: Any, label: str | int | None, output: Output | None, name: str) -> _Head:
    if output is not None and output not in get_args(Output):
        raise ConfigError(
            f"output={output!r} of reward '{name}': must be one of {', '.join(get_args(Output))}."
            f"{nearest(output, get_args(Output))}"
        )
    count = config.num_labels
    exclusive = count > 1 and config.problem_type != "multi_label_classification"
    index = _label_index(config, label, name)
    chosen = output or ("logit" if count == 1 else "log_odds")
    if chosen == "probability":
        return _Head(index, probability if exclusive else independent_probability)
    return _Head(index, log_odds if chosen == "log_odds" and exclusive else logit)


def _label_index(config: Any, label: str | int | None, name: str) -> int:
    labels = {int(index): str(text) for index, text in config.id2label.items()}
    listed = ", ".join(f"{index} '{text}'" for index, text in labels.items())
    if label is None:
        if config.num_labels == 1:
            return 0
        raise ConfigError(
            f"reward '{name}' has {config.num_labels} labels ({listed}). Say which one is the reward: "
            "ClassifierReward(model, tokenizer, label=...), or load_classifier(name, label=...)."
        )
    if isinstance(label, int) and label in labels:
        return label
    found = [index for index, text in labels.items() if text == label]
    if not found:
        raise ConfigError(
            f"reward '{name}' has no label {label!r}; it has {listed}.{nearest(str(label), labels.values())}"
        )
    return found[0]


def _max_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    values = model.config.get_text_config().to_dict()
    stated = [values[key] for key in _LENGTH_KEYS if isinstance(values.get(key), int) and values[key] > 0]
    limit = min([*stated, tokenizer.model_max_length])
    return limit if limit < _NO_LIMIT_TOKENS else None


def _plain(text: Any) -> str:
    """The text of a string or of a list of messages."""
    return text if isinstance(text, str) else "\n\n".join(message.get("content") or "" for message in text)
