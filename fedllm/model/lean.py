"""The product with A behind dropout, which keeps little for the gradient.

Autograd would keep, for every adapted module, the mask in float32 and the dropped input. The input
itself is kept anyway, often once for several modules, and a mask is one byte per entry: the rest
is formed again, to the same bits.

Legend: T tokens, I in, R rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedllm.model.noise import RowDropout
from fedllm.model.precision import in_float32


class DroppedFactor(nn.Module):
    """A of an adapter together with the dropout before it; PEFT takes it for A."""

    def __init__(self, factor: nn.Linear, dropout: RowDropout) -> None:
        super().__init__()
        self.factor = factor
        self.dropout = dropout

    @property
    def weight(self) -> Tensor:
        """A itself, (R, I)."""
        return self.factor.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of A with the dropped `x`, (..., R) of (..., I)."""
        if not self.training:
            product: Tensor = self.factor(x)
            return product
        with in_float32(x.device):
            return _Product.apply(x, self.weight, self.dropout.kept(x), self.dropout)  # type: ignore[no-any-return,no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a_RI: Tensor, kept: Tensor, dropout: RowDropout) -> Tensor:
        ctx.save_for_backward(x, a_RI, kept)
        ctx.dropout = dropout
        return nn.functional.linear(x * dropout.gains(kept, x.dtype), a_RI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, a_RI, kept = ctx.saved_tensors
        gains = ctx.dropout.gains(kept, x.dtype)
        grad_TR = grad.flatten(0, -2)
        # the products that autograd forms, in its order: the same bits
        grad_a = grad_TR.t() @ (x * gains).flatten(0, -2)
        grad_x = (grad_TR @ a_RI).view_as(x).mul_(gains) if ctx.needs_input_grad[0] else None
        return grad_x, grad_a, None, None
