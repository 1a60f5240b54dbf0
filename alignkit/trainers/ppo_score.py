"""A rollout's episodes through the training engine: scored once, then cut into the micro-batches of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alignkit.data.layout import Layout
from alignkit.models.bundle import POLICY, ModelBundle
from alignkit.models.heads import VALUE
from alignkit.rollout.collect import Rollout, TokenTable
from alignkit.trainers.guards import ROW_ID
from alignkit.trainers.passes import Batch, Passes
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.ppo_loss import TOKEN_COLUMNS, ChunkScores


def groups_batch(prompts: list[list[int]], completions: list[list[int]]) -> Batch:
    """Collate P prompts and their P · G completions, those of a prompt side by side, without padding."""
    generations = len(completions) // len(prompts)
    parts = [
        [prompt, *completions[number * generations : (number + 1) * generations]]
        for number, prompt in enumerate(prompts)
    ]
    return {
        "lengths": torch.tensor([[len(ids) for ids in part] for part in parts]),
        "input_ids": torch.tensor([token for part in parts for ids in part for token in ids]),
    }


def batch_of(rollout: Rollout, part: slice) -> Batch:
    """The micro-batch of the prompts in `part`, with what the rollout knows of their tokens, `(P, G, T)` each."""
    generations = rollout.generations
    completions = [completion.ids for completion in rollout.completions]
    prompts = rollout.prompts.ids[part]
    episodes = slice(part.start * generations, (part.start + len(prompts)) * generations)
    columns = {
        "mask": rollout.mask,
        "old_logps": rollout.tokens.logps,
        "ref_logps": rollout.tokens.ref_logps,
        "old_values": rollout.tokens.values,
        "advantages": rollout.advantages,
        "returns": rollout.returns,
    }
    shaped = {name: columns[name][episodes].unflatten(0, (-1, generations)) for name in TOKEN_COLUMNS}
    rows = torch.tensor(rollout.prompts.rows[part])
    return groups_batch(prompts, completions[episodes]) | shaped | {ROW_ID: rows}


def score_tokens(bundle: ModelBundle, layout: Layout, args: PPOConfig, *, wrapped: nn.Module | None) -> ChunkScores:
    """Log-probs, entropies and values of a layout's tokens, with gradient.

    A critic on the policy's own trunk costs nothing but its head; one with an adapter of its own takes a second pass.
    """
    has_critic = VALUE in bundle.heads
    on_trunk = has_critic and bundle.adapters[VALUE] == bundle.adapters[POLICY]
    request: dict[str, Any] = {"temperature": args.temperature, "entropies": True}
    if on_trunk:
        request |= {"heads": (VALUE,), "head_index": layout.score_index}
    scores = bundle.score(layout, wrapped=wrapped, **request)
    values = None
    if on_trunk:
        values = scores.values[VALUE].squeeze(-1)
    elif has_critic:
        values = bundle.values(layout, layout.score_index, role=VALUE, wrapped=wrapped).squeeze(-1)
    assert scores.entropies is not None  # asked for
    return ChunkScores(scores.logps, values, scores.entropies)


@torch.no_grad()
def score_episodes(
    bundle: ModelBundle,
    passes: Passes,
    prompts: list[list[int]],
    completions: list[list[int]],
    args: PPOConfig,
    *,
    wrapped: nn.Module | None,
) -> TokenTable:
    """Score episodes in the micro-batches and chunks of training, on the CPU `(B, T)`.

    Products of matrices differ in their last bits with the number of rows, so only equal chunks give equal numbers.
    """
    generations = len(completions) // len(prompts)
    longest = max(map(len, completions))
    table = TokenTable(*(torch.zeros(len(completions), longest) for _ in TokenTable._fields))
    size, episode = args.per_device_train_batch_size, 0
    for start in range(0, len(prompts), size):
        few = prompts[start : start + size]
        batch = groups_batch(few, completions[start * generations : (start + len(few)) * generations])
        for chunk in passes.split({name: tensor.to(args.device) for name, tensor in batch.items()}):
            with passes.precision():
                layout = passes.lay_out(chunk)
                scores = score_tokens(bundle, layout, args, wrapped=wrapped)
                reference = bundle.score_reference(layout, wrapped=wrapped, temperature=args.temperature).logps
            place = (episode + layout.sequence_index.cpu(), layout.completion_position.cpu())
            found: tuple[Tensor | None, ...] = (scores.logps, reference, scores.values, scores.entropies)
            for target, source in zip(table, found, strict=True):
                if source is not None:
                    target[place] = source.float().cpu()
            episode += layout.num_sequences
    return table
