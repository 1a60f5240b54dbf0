"""A local instruct model as a judge: how likely it is to reply "A" rather than "B"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alignkit.data.records import Text
from alignkit.errors import DataError, ModelError
from alignkit.evaluation.judge_prompt import judge_question
from alignkit.evaluation.judges import Verdicts
from alignkit.evaluation.models import PolicyModel, load_policy
from alignkit.evaluation.prompts import shown_text
from alignkit.evaluation.scoring import BATCH_TOKENS, completion_logps, context_tokens

_LABELS = ("A", "B")


class ModelJudge:
    """A causal language model that is asked which of two answers is better.

    Its verdict is `p(A) / (p(A) + p(B))` for the first token of its reply, after the question of
    `alignkit.evaluation.judge_prompt`. Small models prefer a letter whatever stands behind it: ask both orders, and
    look at the order consistency before believing the rest.

    Args:
        model: a name, a folder, or what `load_policy` returns.
        tokenizer: by default the model's.
        name: for results.
        batch_tokens: most tokens in one forward pass.
        **loading: further arguments of `load_policy`, such as `quantization_config`.

    Attributes:
        shortened: questions so far whose texts were cut to fit the model's context.

    Raises:
        ModelError: no language model, or a tokenizer that writes A and B as the same token.
    """

    def __init__(
        self,
        model: str | Path | PolicyModel | Any,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        batch_tokens: int = BATCH_TOKENS,
        **loading: Any,
    ) -> None:
        self.policy = load_policy(model, tokenizer, **loading)
        self.name = name or f"model {Path(self.policy.name).name}"
        self.batch_tokens, self.shortened = batch_tokens, 0
        self._labels = [self._ids(label) for label in _LABELS]
        own: Any = self.policy.tokenizer
        self._special_tokens = sorted({*own.all_special_tokens, *own.get_added_vocab()})
        if self._labels[0] == self._labels[1] or not all(self._labels):
            raise ModelError(f"'{self.policy.name}' writes 'A' and 'B' as the same tokens and cannot be asked for one")

    def __call__(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """Return `p(A) / (p(A) + p(B))` of each question.

        Raises:
            DataError: a context that is too short for the question alone.
        """
        groups = [(self.question_ids(*texts), *self._labels) for texts in zip(prompts, first, second, strict=True)]
        found = completion_logps(
            self.policy, groups, with_reference=False, batch_tokens=self.batch_tokens, what="Judging", quiet=True
        )
        logps = torch.stack([one.policy.sum() for one in found]).view(-1, 2)  # (N, 2)
        return logps.softmax(1)[:, 0].tolist()

    def question_ids(self, prompt: Text, first: str, second: str) -> list[int]:
        """Encode one question; where it is too long, the longest of its three texts are cut to fit."""
        context = context_tokens(self.policy.bundle.base)
        room = None if context is None else context - max(map(len, self._labels))
        longest = max(len(text) for text in (shown_text(prompt), first, second))
        ids = self._encode(prompt, first, second, longest)
        if room is None or len(ids) <= room:
            return ids
        self.shortened += 1
        while len(ids) > room and longest > 1:
            longest = min(longest - 1, int(longest * room / len(ids)))
            ids = self._encode(prompt, first, second, longest)
        if len(ids) > room:
            raise DataError(f"the context of judge '{self.name}' ({context} tokens) is too short for a question")
        return ids

    def _encode(self, prompt: Text, first: str, second: str, longest: int) -> list[int]:
        request = shown_text(prompt)[-longest:]  # what is asked stands at the end
        asked = judge_question(request, first[:longest], second[:longest], special_tokens=self._special_tokens)
        text = "\n\n".join(message["content"] for message in asked.messages)
        tokenizer: Any = self.policy.tokenizer
        if tokenizer.chat_template is None:
            return list(tokenizer(f"{text}\n\nReply: ", verbose=False)["input_ids"])
        turn = [{"role": "user", "content": text}]  # not every template knows a system's turn
        rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])

    def _ids(self, label: str) -> list[int]:
        tokenizer: Any = self.policy.tokenizer
        return list(tokenizer(label, add_special_tokens=False)["input_ids"])
