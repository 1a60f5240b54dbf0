"""Padded, packed and prefix-shared rows give the same log-probs and gradients, whatever the lengths."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from alignkit.data.layout import LAYOUTS, Groups, group_costs, token_bounded_chunks
from alignkit.models.adapters import disable_dropout
from alignkit.models.bundle import ModelBundle
from tests.fuzz.harness import effort, try_all
from tests.model_factory import ARCHITECTURES
from tests.pair_factory import PAD, gradients, our_bundle

RELATIVE = 1e-5
SHARING = tuple(name for name in ARCHITECTURES if name not in ("bloom", "gptj"))  # these cannot take shared rows
FEW = ("llama", "gemma2", "gpt2", "cohere2")


@cache
def bundle_of(architecture: str) -> ModelBundle:
    """A tiny model in fp64: in fp32 a gradient that all but vanishes is nothing but the others' rounding."""
    bundle = our_bundle(architecture)
    bundle.model.double()
    disable_dropout(bundle.model)
    bundle.use_row_attention()
    return bundle


@st.composite
def groups(draw: st.DrawFn) -> Groups:
    """One to four groups of as many completions each; their prompts may begin alike, as under one system prompt."""
    count, branches = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    shortest = draw(st.sampled_from([1, 9, 10, 17, 3]))
    prompts = draw(st.lists(st.integers(shortest, shortest + 6), min_size=count, max_size=count))
    tails = [draw(st.lists(st.integers(1, 12), min_size=branches, max_size=branches)) for _ in range(count)]
    shared = draw(st.sampled_from([0, 9, 16, 8, 1, 0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    start = torch.randint(5, 127, (shared,), generator=generator)
    ids = []
    for prompt, lengths in zip(prompts, tails, strict=True):
        own = torch.randint(5, 127, (prompt + sum(lengths),), generator=generator)
        own[: min(shared, prompt)] = start[:prompt]
        ids.append(own)
    lengths = [[prompt, *of_group] for prompt, of_group in zip(prompts, tails, strict=True)]
    return Groups(torch.cat(ids), torch.tensor(lengths))


@effort(300, 8_000)
def test_a_layout_is_another_place_for_the_same_tokens(examples: int, tally: Counter[str]) -> None:
    """Without a model: what is scored, from which context, and what it costs."""

    def check(batch: Groups) -> None:
        expected = [
            (torch.cat([prompt, completion])[: len(prompt) + at].tolist(), int(token), len(prompt) + at)
            for prompt, *completions in batch.parts()
            for completion in completions
            for at, token in enumerate(completion)
        ]
        for name, lay_out in LAYOUTS.items():
            layout = lay_out(batch, PAD)
            assert layout.name == name
            flat, positions = layout.input_ids.flatten(), layout.position_ids.flatten()
            for (context, token, position), target, at in zip(
                expected, layout.targets.tolist(), layout.score_index.tolist(), strict=True
            ):
                assert target == token
                assert int(flat[at]) == context[-1]
                assert int(positions[at]) == position - 1
            ends = [[*context, token] for context, token, _ in expected]
            lasts = [ends[i - 1][-1] for i in accumulate(batch.lengths[:, 1:].flatten().tolist())]
            assert flat[layout.last_index].tolist() == lasts
            seen = [context_of(layout, int(at)) for at in layout.score_index]
            assert seen == [context for context, _, _ in expected]
            cost = int(group_costs(batch.lengths, name).sum())
            assert layout.tokens <= cost if name == "prefix_shared" else layout.tokens >= cost
            tally["tokens scored"] += len(expected)
            tally["shared starts"] += any(block.root for block in layout.blocks)

    try_all(check, examples, tally, batch=groups())
    assert tally["shared starts"] > examples // 20


def context_of(layout: Any, at: int) -> list[int]:
    """The ids that position `at` may see, itself included, by the layout's own account of its attention."""
    flat = layout.input_ids.flatten().tolist()
    if not layout.blocks:
        width = layout.input_ids.shape[1]
        row = at // width
        assert layout.attention_mask[row].tolist() == sorted(layout.attention_mask[row].tolist(), reverse=True)
        return flat[row * width : at + 1]
    block = next(block for block in layout.blocks if block.start <= at < block.start + block.prefix + sum(block.tails))
    root = flat[: block.root]
    if at < block.start + block.prefix:
        return root + flat[block.start : at + 1]
    begin = block.start + block.prefix
    for tail in block.tails:
        if at < begin + tail:
            return root + flat[block.start : block.start + block.prefix] + flat[begin : at + 1]
        begin += tail
    raise AssertionError("no tail holds this position")


def scores(bundle: ModelBundle, name: str, batch: Groups) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logps = bundle.score(LAYOUTS[name](batch, PAD)).logps
    (logps * torch.linspace(-1, 1.5, len(logps))).sum().backward()
    return logps.detach(), gradients(bundle.model)


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=RELATIVE, atol=RELATIVE)
    largest = max(gradient.norm().item() for gradient in expected[1].values())
    assert largest > 0
    for name, gradient in expected[1].items():
        # Some gradients are all but zero (a query of one key has none): the step's size is what they add noise to.
        scale = max(gradient.norm().item(), 0.01 * largest)
        assert (found[1][name] - gradient).norm().item() <= RELATIVE * scale, name


@pytest.mark.parametrize(
    ("architecture", "examples"),
    [*((name, 25) for name in FEW), *(pytest.param(name, 150, marks=pytest.mark.slow) for name in SHARING)],
)
def test_log_probs_and_gradients_of_every_layout(architecture: str, examples: int, tally: Counter[str]) -> None:
    bundle = bundle_of(architecture)

    def check(batch: Groups) -> None:
        expected = scores(bundle, "padded", batch)
        for name in ("packed", "prefix_shared"):
            assert_same(scores(bundle, name, batch), expected)
        tally["tokens scored"] += len(expected[0])

    try_all(check, examples, tally, batch=groups())


@effort(30, 1_000)
def test_chunks_add_up_to_the_batch(examples: int, tally: Counter[str]) -> None:
    """One gradient, in as many token-bounded chunks as a bound asks for, in every layout."""
    bundle = bundle_of("llama")

    def check(batch: Groups, layout: str, bound: int | None) -> None:
        logps = bundle.score(LAYOUTS[layout](batch, PAD)).logps
        weights = torch.linspace(-1, 1.5, len(logps))
        (logps * weights).sum().backward()
        whole = logps.detach(), gradients(bundle.model)
        sizes = token_bounded_chunks(group_costs(batch.lengths, layout).tolist(), bound)
        parts, done = [], 0
        for chunk in batch.split(sizes):
            part = bundle.score(LAYOUTS[layout](chunk, PAD)).logps
            (part * weights[done : done + len(part)]).sum().backward()
            parts.append(part.detach())
            done += len(part)
        assert_same((torch.cat(parts), gradients(bundle.model)), whole)
        tally["chunks"] += len(sizes)

    bounds = st.one_of(st.none(), st.integers(1, 60))
    try_all(check, examples, tally, batch=groups(), layout=st.sampled_from(sorted(LAYOUTS)), bound=bounds)
    assert tally["chunks"] > 1.1 * tally["inputs"]
