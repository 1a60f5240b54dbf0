"""Random pairs and plain reference computations for the tests of the engine.

`plain_*` functions use transformers and PEFT alone, one sequence at a time: nothing of alignkit's engine.
"""

from __future__ import annotations

import random
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from alignkit.data.layout import Pairs
from alignkit.models.adapters import add_adapter
from alignkit.models.bundle import ModelBundle
from alignkit.models.lora import FUSED_LORA
from tests.model_factory import tiny_model

PAD = 0
# Tokens of prompt, chosen, rejected. Longer than the tiny models' sliding window, unequal, with completions of one.
LENGTHS = ((11, 5, 9), (3, 1, 12), (17, 7, 1))

Sequence = tuple[list[int], list[int]]


def random_pairs(lengths: tuple[tuple[int, int, int], ...] = LENGTHS, seed: int = 0) -> Pairs:
    """Pairs of the given lengths with token ids of the tiny models' vocabulary, special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(map(sum, lengths))
    return Pairs(torch.randint(5, 127, (total,), generator=generator), torch.tensor(lengths))


def pairs_with_a_shared_start() -> Pairs:
    """Pairs whose prompts all begin with the same ids, as those under one system prompt do."""
    lengths = ((14, 5, 9), (12, 1, 12), (17, 7, 1))
    parts = random_pairs(lengths).parts()
    shared = parts[0][0][:11]
    parts = [(torch.cat([shared, prompt[11:]]), *tails) for prompt, *tails in parts]
    return Pairs(torch.cat([ids for group in parts for ids in group]), torch.tensor(lengths))


def random_rows(count: int, seed: int = 0, longest: int = 7) -> list[dict[str, list[int]]]:
    """Tokenised rows as `DPOTrainer` takes them."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(5, 98) for _ in range(draw.randint(low, high))]

    return [
        {"prompt_ids": ids(3, 9), "chosen_ids": ids(2, longest), "rejected_ids": ids(2, longest)} for _ in range(count)
    ]


def sequences(pairs: Pairs) -> list[Sequence]:
    """`(prompt, completion)` of every sequence, chosen and rejected alternating."""
    parts = [part.tolist() for part in pairs.input_ids.split(pairs.lengths.flatten().tolist())]
    found = []
    for prompt, chosen, rejected in zip(parts[0::3], parts[1::3], parts[2::3], strict=True):
        found += [(prompt, chosen), (prompt, rejected)]
    return found


def plain_token_logps(model: nn.Module, pairs: Pairs) -> Tensor:
    """Completion token log-probabilities out of the model's own logits, one sequence at a time, `(S,)`."""
    logps = []
    for prompt, completion in sequences(pairs):
        ids = torch.tensor([prompt + completion])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps.append(torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(logps)


def fill_adapter(model: PeftModel, seed: int = 0, scale: float = 0.05, adapter: str | None = None) -> None:
    """Give every trainable weight a value that its name decides, so that two copies agree and B is not zero."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(trainable(model).items())):
            if adapter is None or f".{adapter}." in name:
                generator = torch.Generator().manual_seed(1000 * seed + number)
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora_config(**settings) -> LoraConfig:
    """LoRA of rank 4 on every linear layer."""
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def our_model(architecture: str = "llama", config: LoraConfig | None = None, **overrides) -> PeftModel:
    """A tiny model with fused LoRA, its adapter away from zero."""
    model = add_adapter(tiny_model(architecture, **overrides), config or lora_config(), custom_modules=FUSED_LORA)
    torch.manual_seed(0)
    reset(model)
    return model


def plain_model(architecture: str = "llama", config: LoraConfig | None = None, **overrides) -> PeftModel:
    """The same weights as `our_model`, but PEFT's own layers and transformers' eager attention."""
    base = tiny_model(architecture, **overrides)
    base.set_attn_implementation("eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reads a renamed property, and says that it sets fan_in_fan_out for GPT-2
        model = get_peft_model(base, config or lora_config())
    reset(model)
    return model.eval()


def reset(model: PeftModel) -> None:
    """Make the LoRA weights of a model independent of how it was built."""
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_" in name:
                parameter.zero_()
    fill_adapter(model, scale=0.2)


def our_bundle(architecture: str = "llama", config: LoraConfig | None = None, **overrides) -> ModelBundle:
    """A bundle around `our_model`."""
    return ModelBundle(our_model(architecture, config, **overrides))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Take the gradients off the trainable parameters."""
    found = {name: parameter.grad.clone() for name, parameter in trainable(model).items() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def mixed(logps: Tensor) -> Tensor:
    """A scalar whose derivative differs from token to token, of both signs."""
    return (logps * torch.linspace(-1, 1.5, len(logps), dtype=logps.dtype)).sum()


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5) -> None:
    """Compare tensor by tensor, relative to each tensor's norm; none may be zero."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        norm = tensor.norm().item()
        assert norm > 0, f"{name} has no gradient"
        error = (found[name] - tensor).norm().item() / norm
        assert error <= relative, f"{name}: relative error {error:.2e}"
