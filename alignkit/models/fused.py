"""RMSNorm and SwiGLU as one operation each, put in the place of a frozen model's own modules.

Models spell both as chains of elementwise operations, each a pass over memory that autograd also keeps for the backward
pass. Here the forward pass is short, only the inputs are kept, and the backward pass is written out. A module is
replaced only if it is recognised by its parts *and* gives the same numbers on a probe; names of parameters stay.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Largest relative difference on the probe, in fp32.
PROBE_TOLERANCE = 1e-5


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # (…, H), (H,)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        wide = x.float()
        scale = _inverse_rms(wide, eps)
        normal = wide.mul_(scale) if wide is not x else wide * scale
        return normal.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        # y = w ⊙ x̂ with x̂ = x · r and r = (mean x² + ε)^-½, so dx = r (g − x̂ · mean(g ⊙ x̂)) with g = dy ⊙ w.
        x, weight = ctx.saved_tensors
        wide = x.float()
        scale = _inverse_rms(wide, ctx.eps)
        normal = wide.mul_(scale) if wide is not x else wide * scale
        g = grad.float() * weight.float()
        inner = torch.linalg.vecdot(g, normal).div_(x.shape[-1]).unsqueeze(-1)
        return g.sub_(normal.mul_(inner)).mul_(scale).to(x.dtype), None, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """`(mean x² + ε)^-½` over the last dimension, which stays; PyTorch's own RMSNorm spells it slower on a CPU."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class FusedRMSNorm(nn.Module):
    """`w ⊙ x / √(mean x² + ε)` over the last dimension (arXiv 1910.07467, Eq. 4), statistics in fp32, `w` frozen."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `(…, H)`."""
        return _RMSNorm.apply(hidden_states, self.weight.to(hidden_states.dtype), self.eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():  # silu's own fused backward
            gate = gate.detach().requires_grad_()
            activated = F.silu(gate)
        (grad_gate,) = torch.autograd.grad(activated, gate, grad * up)
        return grad_gate, activated.detach().mul_(grad)


class FusedSwiGLU(nn.Module):
    """`down(silu(gate(x)) ⊙ up(x))` (arXiv 2002.05202, Eq. 6), keeping two tensors of the inner size, not four."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Map `(…, H)` to `(…, H)`."""
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


def fuse_frozen_modules(model: nn.Module) -> int:
    """Replace the RMSNorm and SwiGLU modules of `model` whose own weights are frozen; return how many were replaced."""
    replaced = 0
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            fused = _fused(module)
            if fused is not None:
                setattr(parent, name, fused.train(module.training))
                replaced += 1
    return replaced


def _fused(module: nn.Module) -> nn.Module | None:
    is_watched = module._forward_hooks or module._forward_pre_hooks
    if is_watched or isinstance(module, FusedRMSNorm | FusedSwiGLU):
        return None
    children = dict(module.named_children())
    parameters = dict(module.named_parameters(recurse=False))
    if type(module).__name__.endswith("RMSNorm") and set(parameters) == {"weight"} and not children:
        weight = parameters["weight"]
        eps = vars(module).get("variance_epsilon", vars(module).get("eps"))
        if weight.requires_grad or weight.is_meta or not isinstance(eps, float):
            return None
        fused: nn.Module = FusedRMSNorm(weight, eps)
        return fused if _agree(module, fused, weight.new_empty(3, weight.numel())) else None
    if set(children) == {"gate_proj", "up_proj", "down_proj", "act_fn"} and not parameters:
        if not isinstance(children["act_fn"], nn.SiLU) and type(children["act_fn"]).__name__ != "SiLUActivation":
            return None
        # The projections may be quantized or adapted; what counts is how the module combines them.
        with torch.random.fork_rng(devices=[]):
            small = {"gate_proj": nn.Linear(4, 6), "up_proj": nn.Linear(4, 6), "down_proj": nn.Linear(6, 4)}
        probe = copy.copy(module)
        probe._modules = {**module._modules, **small}
        if _agree(probe, FusedSwiGLU(**small), torch.empty(3, 4)):
            return FusedSwiGLU(children["gate_proj"], children["up_proj"], children["down_proj"])
    return None


@torch.no_grad()
def _agree(module: nn.Module, fused: nn.Module, sample: Tensor) -> bool:
    """Compare both on one fixed input of the shape, dtype and device of `sample`."""
    x = torch.linspace(-2, 3, sample.numel()).sin().view(sample.shape).to(sample)
    expected, found = module(x).float(), fused(x).float()
    tolerance = PROBE_TOLERANCE if sample.dtype == torch.float32 else 2e-2
    return bool((expected - found).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-6))
