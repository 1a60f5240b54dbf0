"""Log-probabilities and rewards of token ids, without a trainer: the engine that training scores with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignkit.data.layout import Groups, Layout, group_costs, layout_function, token_bounded_chunks
from alignkit.errors import ConfigError, DataError, ModelError, TrainingError
from alignkit.evaluation.models import PolicyModel, progress
from alignkit.models.bundle import ModelBundle
from alignkit.models.probe import choose_layout
from alignkit.models.reward_files import RewardModel
from alignkit.models.scoring import TokenScores
from alignkit.rollout.classifier import base_of, length_batches, padding_with
from alignkit.rollout.hf import evaluating

BATCH_TOKENS = 4096
_NO_LIMIT_TOKENS = 10**9
_PROBED = 8  # groups that the layout is chosen on

Ids = Sequence[int]


class TokenLogps(NamedTuple):
    """Log-probabilities of a completion's tokens in nats, `(T,)` each, in double precision on the CPU.

    `reference` is empty where nothing was asked of a reference.
    """

    policy: Tensor
    reference: Tensor


def completion_logps(
    policy: PolicyModel,
    groups: Sequence[Sequence[Ids]],
    *,
    with_reference: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    what: str = "Scoring",
    quiet: bool = False,
) -> list[TokenLogps]:
    """Score completions under the policy, and under its reference.

    Groups are laid out as training lays them out (a prompt is computed once), after the same comparison with padded
    rows. Modes, trainable parameters and the attention implementation are as before afterwards.

    Args:
        policy: the model.
        groups: `(prompt ids, completion ids, ...)`, all with the same number of completions.
        with_reference: score the reference too.
        batch_tokens: most tokens in one forward pass.
        what: names the progress bar.
        quiet: show none.

    Returns:
        One entry for each completion, those of the first group first.

    Raises:
        DataError: groups without tokens, longer than the model's context, or with ids outside its vocabulary.
        ModelError: no reference to score.
        TrainingError: log-probabilities that are not finite.
    """
    if with_reference and not policy.bundle.can_reference:
        raise ModelError(
            f"'{policy.name}' has no adapters to switch off, so there is nothing to compare it with: pass reference= "
            "(--reference), the model that it was trained from."
        )
    check_ids(policy, groups)
    found: list[TokenLogps] = []
    with _ready(policy.bundle):
        for layout in _layouts(policy, groups, batch_tokens, what, quiet):
            ours = _by_completion(policy.bundle.score(layout), layout)
            theirs = [torch.empty(0, dtype=torch.float64)] * len(ours)
            if with_reference:
                theirs = _by_completion(policy.bundle.score_reference(layout), layout)
            found += [TokenLogps(*pair) for pair in zip(ours, theirs, strict=True)]
    return found


def sequence_rewards(
    reward: RewardModel,
    sequences: Sequence[Ids],
    *,
    batch_tokens: int = BATCH_TOKENS,
    what: str = "Rewarding",
    quiet: bool = False,
) -> Tensor:
    """Score whole sequences with a sequence classifier, read at their last token.

    Args:
        reward: the classifier.
        sequences: token ids of prompt and completion.
        batch_tokens: most tokens in one forward pass, padding included.
        what: names the progress bar.
        quiet: show none.

    Returns:
        Rewards `(N, heads)`, in double precision on the CPU.

    Raises:
        ModelError: logits of another shape than a classifier's.
        TrainingError: rewards that are not finite.
    """
    base: Any = base_of(reward.model)
    rewards = torch.zeros(len(sequences), base.config.num_labels, dtype=torch.float64)
    batches = length_batches({number: len(ids) for number, ids in enumerate(sequences)}, batch_tokens)
    with torch.no_grad(), evaluating(reward.model):
        for batch in progress(batches, what, quiet=quiet):
            rows = [sequences[number] for number in batch]
            rewards[batch] = _classifier_logits(reward.model, base, rows)
    _check_finite(rewards, "rewards")
    return rewards


def context_tokens(model: Any) -> int | None:
    """The positions that a model states, or None where it states none."""
    values = model.config.get_text_config().to_dict()
    positions = values.get("max_position_embeddings") or values.get("n_positions")
    return positions if isinstance(positions, int) and 0 < positions < _NO_LIMIT_TOKENS else None


def check_ids(policy: PolicyModel, groups: Sequence[Sequence[Ids]]) -> None:
    """See that groups fit the model.

    Raises:
        DataError: one does not.
        ConfigError: groups with different numbers of completions.
    """
    if not groups:
        raise DataError("there is nothing to score: the data has no rows")
    if len({len(group) for group in groups}) > 1:
        raise ConfigError("groups have different numbers of completions: score them in separate calls")
    base = policy.bundle.base
    vocabulary, most = base.config.get_text_config().vocab_size, context_tokens(base)
    for number, (prompt, *completions) in enumerate(groups):
        if not prompt or not all(completions):
            raise DataError(f"row {number} has a prompt or a completion without tokens: remove it")
        largest = max(max(ids) for ids in (prompt, *completions))
        if largest >= vocabulary:
            raise DataError(
                f"row {number} holds the token id {largest}, but the model's vocabulary has {vocabulary} tokens. Use "
                "the tokenizer that belongs to the model."
            )
        longest = len(prompt) + max(map(len, completions))
        if most is not None and longest > most:
            raise DataError(f"row {number} has {longest} tokens, and the model's context {most}: lower max_length")


@contextlib.contextmanager
def _ready(bundle: ModelBundle) -> Iterator[None]:
    """Evaluation mode, and afterwards the attention that the model came with."""
    own = bundle.attention_implementations
    separate = contextlib.nullcontext() if bundle.reference is None else evaluating(bundle.reference)
    try:
        with torch.no_grad(), evaluating(bundle.model), separate:
            yield
    finally:
        bundle.use_own_attention(own)


def _layouts(
    policy: PolicyModel, groups: Sequence[Sequence[Ids]], batch_tokens: int, what: str, quiet: bool
) -> Iterator[Layout]:
    lengths = torch.tensor([[len(ids) for ids in group] for group in groups])
    pad: Any = policy.tokenizer.pad_token_id
    probe = _groups(policy, groups[:_PROBED])
    name = choose_layout(policy.bundle, probe, "auto", pad)
    lay_out: Callable[[Groups, int], Layout] = layout_function(name)
    start = 0
    sizes = token_bounded_chunks(group_costs(lengths, name).tolist(), batch_tokens)
    for size in progress(sizes, what, quiet=quiet):
        yield lay_out(_groups(policy, groups[start : start + size]), pad)
        start += size


def _groups(policy: PolicyModel, groups: Sequence[Sequence[Ids]]) -> Groups:
    flat = [token for group in groups for ids in group for token in ids]
    lengths = torch.tensor([[len(ids) for ids in group] for group in groups])
    return Groups(torch.tensor(flat, device=policy.bundle.base.device), lengths)


def _by_completion(scores: TokenScores, layout: Layout) -> list[Tensor]:
    logps = scores.logps.double().cpu()
    _check_finite(logps, "log-probabilities")
    return list(logps.split(layout.completion_tokens.flatten().tolist()))


def _classifier_logits(model: Any, base: Any, rows: Sequence[Ids]) -> Tensor:
    """Logits `(n, heads)` of rows padded on the right with a token that ends none of them."""
    own: Any = base.config.get_text_config().pad_token_id
    last = {row[-1] for row in rows}
    candidates = ([] if own is None or own < 0 else [own]) + list(range(len(last) + 1))
    pad = next(int(token) for token in candidates if token not in last)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (n, T)
    input_ids = torch.full(mask.shape, pad)
    input_ids[mask] = torch.tensor([token for row in rows for token in row])
    with padding_with(base, pad):
        logits = model(input_ids=input_ids.to(model.device), attention_mask=mask.long().to(model.device)).logits
    if logits.shape != (len(rows), base.config.num_labels):
        raise ModelError(f"{type(base).__name__} returned logits {tuple(logits.shape)}, not one row per text")
    return logits.double().cpu()


def _check_finite(values: Tensor, what: str) -> None:
    if not bool(values.isfinite().all()):
        raise TrainingError(f"{what} are not finite, so nothing can be measured: the model's weights have diverged")
