"""How many floating-point operations a DPO step needs at least, and how fast this machine multiplies matrices.

`python -m tests.benchmarks.arithmetic shape.json threads` measures the second and prints it as JSON.

With N frozen matrix weights in the blocks, n LoRA weights, a head of H × V, attention width W = layers · heads ·
head size, and for a step's pairs T distinct tokens (prompt counted once), S completion tokens and A visible
(query, key) pairs:

    blocks, policy      4·N·T + 6·n·T + 12·W·A    forward; backward to the inputs, and to the LoRA weights alone
    blocks, reference   2·N·T         +  4·W·A    forward
    head, policy        4·H·V·S                   forward; backward to the hidden states
    head, reference     2·H·V·S                   forward

Norms, activations, softmax and the optimizer are not counted: they are no matrix products.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

BLOCK_ROWS, HEAD_ROWS = 1024, 128  # tokens of a forward pass on a CPU, and of a chunk of the head
REPEATS = 30


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a model's arithmetic depends on."""

    hidden: int
    feed_forward: int
    vocabulary: int
    block_weights: int  # N
    lora_weights: int  # n
    attention_width: int  # W


@dataclass(frozen=True, slots=True)
class StepOperations:
    """Floating-point operations of one step, in the blocks and in the head."""

    blocks: float
    head: float


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Fastest measured bf16 matrix products, in operations per second."""

    blocks: float
    head: float

    def seconds(self, operations: StepOperations) -> float:
        """The time that a step's matrix products alone would take."""
        return operations.blocks / self.blocks + operations.head / self.head


def model_shape(model: PreTrainedModel, rank: int) -> ModelShape:
    """Read the shape off a model without adapters, given the rank that its adapters will have."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    values = config.to_dict()
    head_size = values.get("head_dim") or config.hidden_size // config.num_attention_heads
    return ModelShape(
        hidden=config.hidden_size,
        feed_forward=values.get("intermediate_size") or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        block_weights=sum(module.in_features * module.out_features for module in linear),
        lora_weights=sum(rank * (module.in_features + module.out_features) for module in linear),
        attention_width=config.num_hidden_layers * config.num_attention_heads * head_size,
    )


def visible_pairs(prompt: int, chosen: int, rejected: int) -> int:
    """(query, key) pairs: causal over prompt and chosen, then rejected over the prompt and itself."""
    first = prompt + chosen
    return first * (first + 1) // 2 + rejected * prompt + rejected * (rejected + 1) // 2


def step_operations(
    shape: ModelShape, lengths: list[list[int]], shared_start: int, *, with_reference: bool
) -> StepOperations:
    """Operations of a step over pairs with these lengths (prompt, chosen, rejected), `(B, 3)`.

    The first `shared_start` tokens are the same in all prompts of the step, and need to be computed once.
    """
    repeats = len(lengths) - 1
    tokens = sum(map(sum, lengths)) - repeats * shared_start
    completion = sum(chosen + rejected for _, chosen, rejected in lengths)
    seen = sum(visible_pairs(*row) for row in lengths) - repeats * shared_start * (shared_start + 1) // 2
    forward = 2 * shape.block_weights * tokens + 4 * shape.attention_width * seen
    policy = 4 * shape.block_weights * tokens + 6 * shape.lora_weights * tokens + 12 * shape.attention_width * seen
    head = 2 * shape.hidden * shape.vocabulary * completion
    passes = 3 if with_reference else 2
    return StepOperations(policy + forward * with_reference, head * passes)


def measure_ceiling(shape: ModelShape) -> Ceiling:
    """Time one representative product each of the blocks and of the head, in bf16; the fastest of many counts."""

    def rate(rows: int, inner: int, columns: int) -> float:
        a, b = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
        return 2 * rows * inner * columns / _fastest_seconds(lambda: torch.mm(a, b.t()))

    return Ceiling(
        rate(BLOCK_ROWS, shape.hidden, shape.feed_forward),
        rate(HEAD_ROWS, shape.hidden, shape.vocabulary),
    )


def _fastest_seconds(product: Callable[[], torch.Tensor]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - started)
    return best


def main(argv: list[str]) -> int:
    """Measure in a process of its own, with the benchmark's number of threads."""
    torch.set_num_threads(int(argv[2]))
    shape = ModelShape(**json.loads(Path(argv[1]).read_text(encoding="utf-8")))
    print(json.dumps(asdict(measure_ceiling(shape))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
