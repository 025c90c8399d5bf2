"""Stacked adapters: those of several clients in one model, each for its client's tokens.

The clients' packed rows follow each other in one sequence, in which no part sees another client's.
The base computes them together. Every adapted module multiplies them with stacked factors, padded
with zeros to the largest rank: one batched product with A, one with B. A batch entry has the tokens
of only one client, so that NaN and infinity stay with their client.

Legend: C clients, T tokens, S max tokens of a client, O out, I in, R largest rank, K targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedllm.packing.losses import target_losses
from fedllm.packing.precision import in_float32
from fedllm.packing.row_dropout import Piece
from fedllm.packing.sequences import Packed


class ClientLengths:
    """The number of tokens of each client in the current sequence, in order."""

    def __init__(self) -> None:
        self.lengths: tuple[int, ...] = ()

    def enter(self, lengths: Sequence[int]) -> None:
        """Set the number of tokens of each client in the next forward pass."""
        self.lengths = tuple(lengths)

    def gather(self, x_1TI: Tensor) -> Tensor:
        """Return the tokens with one batch entry per client (C, S, I), with zeros after them."""
        assert sum(self.lengths) == x_1TI.shape[1], "Seats.enter before the forward pass"
        x_CSI: Tensor = _Gather.apply(x_1TI, self.lengths)  # type: ignore[no-untyped-call]
        return x_CSI

    def scatter(self, x_CSO: Tensor) -> Tensor:
        """Return the sequence of all clients' tokens (1, T, O); it undoes `gather`."""
        x_1TO: Tensor = _Scatter.apply(x_CSO, self.lengths)  # type: ignore[no-untyped-call]
        return x_1TO


class _Gather(torch.autograd.Function):
    """The copy to batch entries; slices would have a whole tensor as gradient per client."""

    @staticmethod
    def forward(ctx: Any, x_1TI: Tensor, lengths: Sequence[int]) -> Tensor:
        ctx.lengths = lengths
        return _entries(x_1TI, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CSI: Tensor) -> tuple[Tensor, None]:
        return _sequence(grad_CSI, ctx.lengths), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_CSO: Tensor, lengths: Sequence[int]) -> Tensor:
        ctx.lengths = lengths
        return _sequence(x_CSO, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_1TO: Tensor) -> tuple[Tensor, None]:
        return _entries(grad_1TO, ctx.lengths), None


def _entries(x_1TI: Tensor, lengths: Sequence[int]) -> Tensor:
    x_CSI = x_1TI.new_empty(len(lengths), max(lengths), x_1TI.shape[2])
    for x_SI, own_SI in zip(x_CSI, torch.split(x_1TI[0], list(lengths)), strict=True):
        x_SI[: len(own_SI)] = own_SI
        x_SI[len(own_SI) :] = 0.0  # uninitialised memory would enter products
    return x_CSI


def _sequence(x_CSO: Tensor, lengths: Sequence[int]) -> Tensor:
    own = [x_SO[:length] for x_SO, length in zip(x_CSO, lengths, strict=True)]
    return torch.cat(own).unsqueeze(0)


class _Stacked(nn.Module):
    """The factors A, or B, of all clients for one module; PEFT uses it as an adapter's layer."""

    def __init__(self, client_lengths: ClientLengths) -> None:
        super().__init__()
        self._client_lengths = client_lengths
        self.factors = nn.ParameterList()

    def fill(self, factors: Sequence[nn.Parameter]) -> None:
        """Set the factors; they stay the clients' own parameters."""
        self.factors = nn.ParameterList(factors)

    @property
    def weight(self) -> Tensor:
        """A factor; all have its precision."""
        factor: Tensor = self.factors[0]
        return factor


class StackedA(_Stacked):
    """The product of each client's tokens with its A, (R, I) or of a smaller rank."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input of `StackedB`: (C, S, R) for (1, T, I), and (C * S, R) for (T, I)."""
        rank = max(a_RI.shape[0] for a_RI in self.factors)
        padded = [nn.functional.pad(a, (0, 0, 0, rank - a.shape[0])) for a in self.factors]
        a_CRI = torch.stack(padded)
        flat = x.dim() == 2
        x_CSI = self._client_lengths.gather(x.unsqueeze(0) if flat else x)
        with in_float32(x.device):
            h_CSR = torch.bmm(x_CSI, a_CRI.transpose(1, 2))
        return h_CSR.flatten(0, 1) if flat else h_CSR


class StackedB(_Stacked):
    """The product of each client's output of `StackedA` with its scale and B, at most (O, R)."""

    def __init__(self, client_lengths: ClientLengths) -> None:
        super().__init__(client_lengths)
        self.scales: tuple[float, ...] = ()

    def forward(self, h: Tensor) -> Tensor:
        """Return the product: (1, T, O) for (C, S, R), and (T, O) for (C * S, R)."""
        rank = max(b_OR.shape[1] for b_OR in self.factors)
        padded = [
            nn.functional.pad(b_OR * scale, (0, rank - b_OR.shape[1]))
            for b_OR, scale in zip(self.factors, self.scales, strict=True)
        ]
        b_COR = torch.stack(padded)
        flat = h.dim() == 2
        h_CSR = h.view(len(self.factors), -1, h.shape[1]) if flat else h
        with in_float32(h.device):
            x_CSO = torch.bmm(h_CSR, b_COR.transpose(1, 2))
        x_1TO = self._client_lengths.scatter(x_CSO)
        return x_1TO.squeeze(0) if flat else x_1TO


@dataclass(frozen=True, kw_only=True)
class StackedPass:
    """A forward pass of the packed rows of several clients as one sequence.

    `lengths` is the number of tokens per client, `entries` the number of its targets.
    """

    packed: Packed
    lengths: tuple[int, ...]
    entries: tuple[int, ...]

    @classmethod
    def of(cls, packs: Sequence[Packed]) -> "StackedPass":
        """Join the packs, one per client, to one sequence."""
        lengths = tuple(pack.computed_tokens for pack in packs)
        starts = _starts(lengths)
        firsts = _starts([len(pack.kept_U) for pack in packs])
        packed = Packed(
            tokens_1T=torch.cat([pack.tokens_1T for pack in packs], dim=1),
            positions_1T=torch.cat([pack.positions_1T for pack in packs], dim=1),
            parts=tuple(
                replace(
                    part,
                    start=part.start + start,
                    stop=part.stop + start,
                    prefix_start=part.prefix_start + start,
                    prefix_stop=part.prefix_stop + start,
                )
                for pack, start in zip(packs, starts, strict=True)
                for part in pack.parts
            ),
            kept_U=torch.cat([p.kept_U + start for p, start in zip(packs, starts, strict=True)]),
            inverse_K=torch.cat(
                [p.inverse_K + first for p, first in zip(packs, firsts, strict=True)]
            ),
            targets_K=torch.cat([pack.targets_K for pack in packs]),
            weights_K=torch.cat([pack.weights_K for pack in packs]),
            rows_K=None,
            num_tokens=sum(pack.num_tokens for pack in packs),
            num_targets=sum(pack.num_targets for pack in packs),
        )
        return cls(
            packed=packed, lengths=lengths, entries=tuple(len(pack.targets_K) for pack in packs)
        )

    def pieces(self, per_client: Sequence[Sequence[Piece]]) -> list[Piece]:
        """Return the pieces of all clients, moved from their packs to the joint sequence."""
        return [
            replace(piece, start=piece.start + start, stop=piece.stop + start)
            for pieces, start in zip(per_client, _starts(self.lengths), strict=True)
            for piece in pieces
        ]

    def loss_sums(self, model: nn.Module, layout: str) -> list[Tensor]:
        """Return the sum of the losses of each client's targets, a scalar per client."""
        losses_K = target_losses(model, self.packed, layout) * self.packed.weights_K
        return [own_K.sum() for own_K in torch.split(losses_K, list(self.entries))]


def _starts(lengths: Sequence[int]) -> list[int]:
    """Return where each client begins in the sequence."""
    return list(accumulate(lengths[:-1], initial=0))
