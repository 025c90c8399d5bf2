"""The product of dropped inputs with A, in a form that saves little for the gradient.

Autograd would save, for every adapted module, the mask in float32 and the input after dropout.
This module saves a mask of one byte per entry and the input. The input is saved anyway, often once
for several modules, or it is recomputed from other saved tensors. The backward pass recomputes the
rest, with the same bits.

Legend: T tokens, I in, R rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedllm.packing.gated_mlp import Activation, product_inputs
from fedllm.packing.precision import in_float32
from fedllm.packing.row_dropout import RowDropout


class LeanFactor(nn.Module):
    """A of an adapter with the dropout before it, if any; PEFT uses it as A."""

    def __init__(self, factor: nn.Linear, dropout: RowDropout | None) -> None:
        super().__init__()
        self.factor = factor
        self.dropout = dropout

    @property
    def weight(self) -> Tensor:
        """The factor A, (R, I)."""
        return self.factor.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of A with `x` after dropout: (..., R) for (..., I)."""
        dropout = self.dropout if self.training else None
        source = product_inputs(x)
        if dropout is None and source is None:
            product: Tensor = self.factor(x)
            return product
        kept = None if dropout is None else dropout.kept(x)
        act = None if source is None else source.act
        saved = (x.detach(),) if source is None else (source.gate_TF, source.up_TF)
        with in_float32(x.device):
            return _Product.apply(x, self.weight, kept, dropout, act, *saved)  # type: ignore[no-any-return,no-untyped-call]


class _Product(torch.autograd.Function):
    """The product of A with dropped `x`; `saved` is `x`, or gate and up of `act(gate) * up`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a_RI: Tensor,
        kept: Tensor | None,
        dropout: RowDropout | None,
        act: Activation | None,
        *saved: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(a_RI, kept, *saved)
        ctx.dropout, ctx.act = dropout, act  # not tensors: those would outlive the backward pass
        return nn.functional.linear(_dropped(x, kept, dropout), a_RI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a_RI, kept, *saved = ctx.saved_tensors
        x = saved[0] if ctx.act is None else ctx.act(saved[0]) * saved[1]
        grad_TR = grad.flatten(0, -2)
        # autograd's products, in its order: the same bits
        grad_a = None
        if ctx.needs_input_grad[1]:
            grad_a = grad_TR.t() @ _dropped(x, kept, ctx.dropout).flatten(0, -2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TR @ a_RI).view_as(x)
            if kept is not None:
                grad_x.mul_(ctx.dropout.gains(kept, x.dtype))
        return grad_x, grad_a, None, None, None, *(None for _ in saved)


def _dropped(x: Tensor, kept: Tensor | None, dropout: RowDropout | None) -> Tensor:
    return x if kept is None or dropout is None else x * dropout.gains(kept, x.dtype)
