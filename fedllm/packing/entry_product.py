"""The product of inputs with a change of some entries of a weight, as PEFT's layers compute it.

PEFT multiplies with A, then with B. Here the layer for A passes its input on, and the one for B
multiplies with the sparse change that the values of A and B stand for (`lora.entries`). The change
is dense for the moment of the product; its gradient is kept at the entries alone.

Legend: O out, I in, R rank, N entries.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedllm.lora.entries import entries_of, with_entries
from fedllm.packing.precision import in_float32
from fedllm.packing.stacked_adapters import ClientLengths


class PassedOn(nn.Module):
    """The layer in the place of A: its output is its input, in the number format of `weight`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


class EntryProduct(nn.Module):
    """The layer in the place of B: the product with the changes of one client, or of several.

    Args:
        client_lengths: the tokens of each client in a sequence of several; None: of one client.
    """

    def __init__(self, client_lengths: ClientLengths | None = None) -> None:
        super().__init__()
        self._client_lengths = client_lengths
        self._pairs: tuple[tuple[nn.Parameter, nn.Parameter, Tensor], ...] = ()

    def fill(self, pairs: Sequence[tuple[nn.Parameter, nn.Parameter, Tensor]]) -> None:
        """Set the values (A, B) and the places of their entries, client by client."""
        self._pairs = tuple(pairs)

    @property
    def weight(self) -> Tensor:
        """Values of B; all have their precision."""
        return self._pairs[0][1]

    def forward(self, x: Tensor) -> Tensor:
        """Return the product: (..., T, O) for (..., T, I)."""
        lengths = self._client_lengths.lengths if self._client_lengths else (x.shape[-2],)
        with in_float32(x.device):
            own = [
                _Product.apply(tokens, *pair)  # type: ignore[no-untyped-call]
                for tokens, pair in zip(torch.split(x, list(lengths), -2), self._pairs, strict=True)
            ]
            return torch.cat(own, dim=-2)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a_RI: Tensor, b_OR: Tensor, places_N: Tensor) -> Tensor:
        ctx.save_for_backward(x, a_RI, b_OR, places_N)
        return nn.functional.linear(x, with_entries(a_RI, b_OR, places_N))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a_RI, b_OR, places_N = ctx.saved_tensors
        change_OI = grad.flatten(0, -2).mT @ x.flatten(0, -2)
        grad_a, grad_b = entries_of(change_OI, places_N, len(a_RI))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ with_entries(a_RI, b_OR, places_N)
        return grad_x, grad_a, grad_b, None
