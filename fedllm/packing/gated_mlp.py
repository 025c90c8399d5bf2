"""Gated MLPs that save less for the gradient.

For `down(act(gate(x)) * up(x))` autograd saves four tensors as wide as the MLP: the outputs of gate
and up, the activation, and the product for the adapter of `down`. Two cheap operations recompute
the last two from the first two, with the same bits.

Legend: T tokens, F features of the MLP.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LARGE = 1 << 18
"""Number of entries from which on a tensor is recomputed instead of saved."""

_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ProductInputs:
    """The inputs of a gated MLP's product, `act(gate) * up`."""

    act: Activation
    gate_TF: Tensor
    up_TF: Tensor


def is_large(x: Tensor) -> bool:
    """Say whether a tensor is large enough to recompute: each call has a fixed cost."""
    return x.numel() >= LARGE


def product_inputs(x: Tensor) -> ProductInputs | None:
    """Return the inputs of a gated MLP's product; None for other tensors."""
    inputs: ProductInputs | None = getattr(x, "product_inputs", None)
    return inputs


def save_mlp_memory(model: nn.Module) -> None:
    """Let a model's gated MLPs save less; MLPs that compute another formula stay as they are."""
    same: dict[type, bool] = {}
    for module in model.modules():
        if {name for name, _ in module.named_children()} != _PARTS:
            continue
        kind = type(module)
        if kind not in same:
            same[kind] = _computes_the_same(module)
        if same[kind]:
            module.forward = partial(_forward, module)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    gate_TF, up_TF = mlp.gate_proj(x), mlp.up_proj(x)
    trained = gate_TF.requires_grad and up_TF.requires_grad
    if not (torch.is_grad_enabled() and trained and is_large(gate_TF)):
        output: Tensor = mlp.down_proj(mlp.act_fn(gate_TF) * up_TF)
        return output
    product_TF: Any = _Product.apply(gate_TF, up_TF, mlp.act_fn)  # type: ignore[no-untyped-call]
    product_TF.product_inputs = ProductInputs(
        act=mlp.act_fn, gate_TF=gate_TF.detach(), up_TF=up_TF.detach()
    )
    return mlp.down_proj(product_TF)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor, act: Activation) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        ctx.act = act
        return act(gate_TF) * up_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor, None]:
        gate_TF, up_TF = ctx.saved_tensors
        with torch.enable_grad():
            gate_TF = gate_TF.detach().requires_grad_()
            active_TF = ctx.act(gate_TF)
        (grad_gate_TF,) = torch.autograd.grad(active_TF, gate_TF, grad_TF * up_TF)
        return grad_gate_TF, grad_TF * active_TF.detach(), None


def _computes_the_same(mlp: Any) -> bool:
    """Say whether a class's forward pass gives the bits of the formula, for one input."""
    weight_FI = mlp.gate_proj.weight
    draws = torch.Generator().manual_seed(0)
    x_TI = torch.randn(1, 2, mlp.gate_proj.in_features, generator=draws).to(weight_FI.device)
    if weight_FI.is_floating_point():
        x_TI = x_TI.to(weight_FI.dtype)
    with torch.no_grad():
        return torch.equal(type(mlp).forward(mlp, x_TI), _forward(mlp, x_TI))
