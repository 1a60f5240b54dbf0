"""Chunked token log-probabilities against `log_softmax`, in values, gradients and memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignkit.functional import logprobs
from alignkit.functional.logprobs import (
    Logits,
    chunk_tokens,
    frozen_head_logps,
    frozen_head_logps_entropy,
    log_sum_square_probs,
    recomputed_head_logps,
    recomputed_head_logps_entropy,
    token_statistics,
)

FORMS = {
    "plain": Logits(),
    "scale": Logits(0.5),
    "softcap": Logits(softcap=2.0),
    "both": Logits(1.7, 3.0),
    "temperature": Logits(temperature=0.7),
    "all three": Logits(1.7, 3.0, 1.4),
}
VOCABULARY, WIDTH = 11, 5


def inputs(tokens: int = 40, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, bias and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((tokens, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    )
    return hidden.requires_grad_(), weight, bias, torch.arange(tokens) % VOCABULARY


def naive(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, form: Logits) -> Tensor:
    z = F.linear(hidden, weight, bias) * form.scale
    if form.softcap is not None:
        z = form.softcap * torch.tanh(z / form.softcap)
    return torch.log_softmax(z / form.temperature, -1)[torch.arange(len(targets)), targets]


def naive_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, form: Logits) -> Tensor:
    return torch.distributions.Categorical(logits=form(F.linear(hidden, weight, bias))).entropy()


@pytest.fixture(params=[False, True], ids=["one chunk", "chunks of 16"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run with everything in one chunk, and in chunks of 16 tokens, the last of them smaller."""
    if request.param:
        monkeypatch.setattr(logprobs, "CPU_CHUNK_BYTES", 16 * 4 * VOCABULARY)
        assert chunk_tokens(VOCABULARY, torch.device("cpu")) == 16
    return request.param


def test_two_tokens_by_hand():
    """Logits (0, ln 3): p = 1/4, 3/4. d log p0 / dh = (δ − p) W = 3/4 (w0 − w1); with w0 = 0, w1 = ln 3: −0.8240."""
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [1.0986123]])
    logps = frozen_head_logps(hidden, weight, None, torch.tensor([0, 1]))
    torch.testing.assert_close(logps.detach(), torch.tensor([-1.3862944, -0.2876821]), rtol=1e-5, atol=1e-6)
    logps.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[-0.8239592], [0.2746531]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("chunked")
def test_frozen_head_equals_naive(form, with_bias):
    hidden, weight, bias, targets = inputs()
    bias = bias if with_bias else None
    direction = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    expected = naive(hidden, weight, bias, targets, FORMS[form])
    (expected_grad,) = torch.autograd.grad((expected * direction).sum(), hidden)
    found = frozen_head_logps(hidden, weight, bias, targets, FORMS[form])
    (grad,) = torch.autograd.grad((found * direction).sum(), hidden)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # the path without a gradient
        found = frozen_head_logps(hidden, weight, bias, targets, FORMS[form])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_frozen_head_gradcheck(form):
    hidden, weight, bias, targets = inputs(tokens=4)
    assert torch.autograd.gradcheck(lambda h: frozen_head_logps(h, weight, bias, targets, FORMS[form]), hidden)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("chunked")
def test_trained_head_equals_naive(form):
    hidden, weight, bias, targets = inputs()
    weight.requires_grad_()
    bias.requires_grad_()
    leaves = [hidden, weight, bias]
    direction = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    expected = naive(hidden, weight, bias, targets, FORMS[form])
    expected_grads = torch.autograd.grad((expected * direction).sum(), leaves)
    found = recomputed_head_logps(hidden, lambda h: F.linear(h, weight, bias), targets, FORMS[form])
    grads = torch.autograd.grad((found * direction).sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-10)


def test_entropy_of_two_words_by_hand():
    """Logits (0, ln 3): p = 1/4, 3/4, H = 0.5623351, ∂H/∂z₁ = −¾ (ln ¾ + H) = −0.2059898; dz₁/dh = ln 3 = 1.0986123."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [1.0986123]])
    found = frozen_head_logps_entropy(hidden, weight, None, torch.tensor([0]))
    torch.testing.assert_close(found.entropy.detach(), torch.tensor([0.5623351]), rtol=1e-5, atol=0)
    found.entropy.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[-0.2263029]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["frozen", "trained"])
@pytest.mark.usefixtures("chunked")
def test_logps_and_entropy_equal_naive(kind, form):
    hidden, weight, bias, targets = inputs()
    logits = FORMS[form]
    leaves = [hidden] if kind == "frozen" else [hidden, weight.requires_grad_(), bias.requires_grad_()]

    def score() -> logprobs.LogpsEntropy:
        if kind == "frozen":
            return frozen_head_logps_entropy(hidden, weight, bias, targets, logits)
        return recomputed_head_logps_entropy(hidden, lambda h: F.linear(h, weight, bias), targets, logits)

    up, other_up = torch.linspace(-1, 2, 40, dtype=torch.float64), torch.linspace(3, -1, 40, dtype=torch.float64)
    expected = naive(hidden, weight, bias, targets, logits), naive_entropy(hidden, weight, bias, logits)
    expected_grads = torch.autograd.grad((expected[0] * up + expected[1] * other_up).sum(), leaves)
    found = score()
    grads = torch.autograd.grad((found.logps * up + found.entropy * other_up).sum(), leaves)
    for tensor, other in zip([*found, *grads], [*expected, *expected_grads], strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        for tensor, other in zip(score(), expected, strict=True):
            torch.testing.assert_close(tensor, other.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_beside_entropies_are_the_same_numbers(dtype):
    """Bit for bit, in values and in their own gradient, whichever function scored them."""
    hidden, weight, bias, targets = inputs(dtype=dtype)
    alone = frozen_head_logps(hidden, weight, bias, targets, FORMS["all three"])
    beside, entropy = frozen_head_logps_entropy(hidden, weight, bias, targets, FORMS["all three"])
    assert torch.equal(alone, beside)
    assert entropy.dtype == torch.float32
    (grad,), (other,) = (torch.autograd.grad(logps.sum(), hidden) for logps in (alone, beside))
    assert torch.equal(grad, other)
    with torch.no_grad():
        assert torch.equal(frozen_head_logps_entropy(hidden, weight, bias, targets, FORMS["all three"]).logps, alone)


def test_temperature_divides_in_fp32():
    """A bf16 model's logits are not rounded once more: log-probs are those of a sampler that divides fp32 logits."""
    hidden, weight, _, targets = inputs(dtype=torch.bfloat16)
    expected = torch.log_softmax(F.linear(hidden, weight).float() / 0.7, -1)[torch.arange(40), targets]
    torch.testing.assert_close(frozen_head_logps(hidden, weight, None, targets, Logits(temperature=0.7)), expected)


def test_high_temperature_is_uniform_and_low_temperature_is_greedy():
    hidden, weight, bias, targets = inputs()
    hot = frozen_head_logps_entropy(hidden, weight, bias, targets, Logits(temperature=1e9))
    torch.testing.assert_close(hot.entropy, torch.full((40,), 2.3978953, dtype=torch.float64))  # ln 11
    torch.testing.assert_close(hot.logps, -hot.entropy)
    top = F.linear(hidden, weight, bias).argmax(-1)
    cold = frozen_head_logps_entropy(hidden, weight, bias, top, Logits(temperature=1e-4))
    assert cold.logps.min() > -1e-3
    assert cold.entropy.max() < 1e-2


@pytest.mark.usefixtures("chunked")
def test_low_rank_head_equals_naive():
    """A LoRA'd head: the frozen weight gets no gradient, both factors do."""
    hidden, weight, _, targets = inputs()
    low_a = torch.full((2, WIDTH), 0.3, dtype=torch.float64, requires_grad=True)
    low_b = torch.linspace(-1, 1, 2 * VOCABULARY, dtype=torch.float64).view(VOCABULARY, 2).requires_grad_()
    leaves = [hidden, low_a, low_b]
    expected = naive(hidden, weight + low_b @ low_a, None, targets, Logits())
    expected_grads = torch.autograd.grad(expected.pow(2).sum(), leaves)
    found = recomputed_head_logps(hidden, lambda h: h @ weight.t() + h @ low_a.t() @ low_b.t(), targets)
    grads = torch.autograd.grad(found.pow(2).sum(), leaves)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-9)


def test_no_tokens_give_an_empty_result_that_has_a_gradient():
    hidden, weight, _, targets = inputs(tokens=0)
    for logps in (
        frozen_head_logps(hidden, weight, None, targets),
        recomputed_head_logps(hidden, lambda h: h @ weight.t(), targets),
    ):
        assert logps.shape == (0,)
        (grad,) = torch.autograd.grad(logps.sum(), hidden)
        assert grad.shape == (0, WIDTH)
    for found in (
        frozen_head_logps_entropy(hidden, weight, None, targets),
        recomputed_head_logps_entropy(hidden, lambda h: h @ weight.t(), targets),
    ):
        (grad,) = torch.autograd.grad(found.logps.sum() + found.entropy.sum(), hidden)
        assert grad.shape == (0, WIDTH)


def bf16_case() -> tuple[Tensor, Tensor, Tensor]:
    """A head of 64 words over 256 dimensions and 8 hidden states at which the target has p ≈ 0.996."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator).bfloat16()
    targets = torch.arange(8)
    hidden = torch.randn(8, 256, generator=generator) * 0.05
    for _ in range(200):  # walk along the target's own direction until its probability is right
        p = torch.softmax(hidden.bfloat16().float() @ weight.float().t(), -1)[torch.arange(8), targets]
        hidden = hidden + torch.where(p < 0.9955, 2e-3, -5e-4)[:, None] * weight[targets].float()
    return hidden.bfloat16(), weight, targets


def relative_errors(grad: Tensor, exact: Tensor) -> Tensor:
    return (grad.double() - exact).norm(dim=-1) / exact.norm(dim=-1)


def test_bf16_gradient_does_not_cancel_where_the_model_is_sure():
    hidden, weight, targets = bf16_case()
    exact_hidden = hidden.double().requires_grad_()
    exact_logps = naive(exact_hidden, weight.double(), None, targets, Logits())
    (exact,) = torch.autograd.grad(exact_logps.sum(), exact_hidden)
    probability = exact_logps.detach().exp()
    assert ((probability > 0.99) & (probability < 0.999)).all()

    leaf = hidden.clone().requires_grad_()
    frozen_head_logps(leaf, weight, None, targets).sum().backward()
    assert leaf.grad.dtype == torch.bfloat16
    assert relative_errors(leaf.grad, exact).max() < 0.05  # what rounding the logits to bf16 leaves

    # Control: `W[target] − softmax · W`, the same mathematics rounded before the difference, loses most digits.
    low = torch.softmax(hidden.float() @ weight.float().t(), -1).bfloat16()
    cancelled = weight[targets] - low @ weight
    assert relative_errors(cancelled, exact).median() > 0.2


def test_log_probs_of_a_bf16_model_are_fp32():
    hidden, weight, bias, targets = inputs(dtype=torch.bfloat16)
    logps = frozen_head_logps(hidden, weight, bias, targets)
    assert logps.dtype == torch.float32
    exact = torch.log_softmax(F.linear(hidden, weight, bias).float(), -1)[torch.arange(40), targets]
    torch.testing.assert_close(logps, exact, rtol=1e-5, atol=1e-5)
    assert recomputed_head_logps(hidden, lambda h: F.linear(h, weight, bias), targets).dtype == torch.float32


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("kind", ["frozen", "trained", "frozen, entropy", "trained, entropy"])
def test_no_tensor_of_tokens_by_vocabulary(kind, monkeypatch):
    """Nothing larger than one chunk of logits is ever made, and none of the logits is kept for the backward pass."""
    tokens, vocabulary = 400, 300
    monkeypatch.setattr(logprobs, "CPU_CHUNK_BYTES", 16 * 4 * vocabulary)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, WIDTH, generator=generator, requires_grad=kind.startswith("trained"))
    targets = torch.arange(tokens) % vocabulary
    saved = [0]

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    def score() -> Tensor:
        if kind == "frozen":
            return frozen_head_logps(hidden, weight, None, targets)
        if kind == "trained":
            return recomputed_head_logps(hidden, lambda h: h @ weight.t(), targets)
        if kind == "frozen, entropy":
            return sum(frozen_head_logps_entropy(hidden, weight, None, targets))
        return sum(recomputed_head_logps_entropy(hidden, lambda h: h @ weight.t(), targets))

    with LargestTensor() as largest:
        score().sum().backward()
    assert 16 * vocabulary <= largest.elements < 2 * 16 * vocabulary
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = score()
    assert max(saved) <= tokens * WIDTH
    assert logps.requires_grad
    # Control: the measure sees what a plain log-softmax keeps.
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        naive(hidden, weight, None, targets, Logits())
    assert max(saved) >= tokens * vocabulary


@pytest.mark.parametrize("score", [frozen_head_logps, lambda *args: sum(frozen_head_logps_entropy(*args))])
def test_backward_does_not_multiply_with_the_head_again(score):
    """All products with a frozen head are in the forward pass."""
    hidden, weight, _, targets = inputs(dtype=torch.float32)
    logps = score(hidden, weight, None, targets)

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        names: tuple[str, ...] = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names += (function._schema.name,)
            return function(*args, **(kwargs or {}))

    with Products() as seen:
        logps.sum().backward()
    assert "aten::mul" in seen.names
    assert not {"aten::mm", "aten::addmm", "aten::bmm"} & set(seen.names)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("chunked")
def test_statistics_equal_naive(form):
    hidden, weight, bias, targets = inputs()
    with torch.no_grad():
        z = FORMS[form](F.linear(hidden, weight, bias))
        probs = torch.softmax(z, -1)
    found = token_statistics(hidden, lambda h: F.linear(h, weight, bias), targets, FORMS[form])
    torch.testing.assert_close(found.entropy, torch.distributions.Categorical(probs).entropy())
    torch.testing.assert_close(found.mean_logit, z.mean(-1))
    assert torch.equal(found.is_top1, z.argmax(-1) == targets)
    assert 0 < found.is_top1.sum() < len(targets)
    assert not found.entropy.requires_grad
    squares = log_sum_square_probs(hidden, lambda h: F.linear(h, weight, bias), FORMS[form])
    torch.testing.assert_close(squares, (probs**2).sum(-1).log())
    assert not squares.requires_grad


def test_uniform_statistics_by_hand():
    """Equal logits over 4 words: entropy ln 4, mean logit their value, Σ p² = 1/4."""
    head = nn.Linear(1, 4, bias=False)
    nn.init.constant_(head.weight, 0.5)
    hidden = torch.ones(1, 1)
    found = token_statistics(hidden, head, torch.tensor([0]))
    assert found.entropy.item() == pytest.approx(1.3862944, rel=1e-5)
    assert found.mean_logit.item() == 0.5
    assert log_sum_square_probs(hidden, head).item() == pytest.approx(-1.3862944, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_slope_is_the_derivative_of_the_logits(form):
    product = torch.linspace(-3, 3, 9, dtype=torch.float64, requires_grad=True)
    logits = FORMS[form](product)
    (expected,) = torch.autograd.grad(logits.sum(), product)
    slope = FORMS[form].slope(logits.detach())
    torch.testing.assert_close(torch.as_tensor(slope, dtype=torch.float64).expand(9), expected)


def test_chunks_have_at_least_sixteen_tokens():
    assert chunk_tokens(10**9, torch.device("cpu")) == 16
    assert chunk_tokens(49152, torch.device("cpu")) == 28 * 2**20 // (4 * 49152) == 149
    assert chunk_tokens(128256, torch.device("cuda")) == 256 * 2**20 // (4 * 128256) == 523
