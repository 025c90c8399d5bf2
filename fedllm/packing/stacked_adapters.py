"""Adapters of several clients in one model at once, each for the client's own tokens.

The clients' packed rows follow each other in one sequence, in which no part sees another client's.
The base computes them together, and every adapted module multiplies them with stacked factors,
padded with zeros to the largest rank: one batched product with A, one with B. A batch entry has
the tokens of one client alone, so that what is not finite stays with its client.

Legend: C clients, T tokens, S tokens of the client that has most, O out, I in, R largest rank,
K targets.
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


class Seats:
    """How many tokens each client has, in turn, of the sequence that is now in the model."""

    def __init__(self) -> None:
        self.lengths: tuple[int, ...] = ()

    def enter(self, lengths: Sequence[int]) -> None:
        """Say how many tokens of each client the next forward pass computes."""
        self.lengths = tuple(lengths)

    def gather(self, x_1TI: Tensor) -> Tensor:
        """Return the tokens with a batch entry per client (C, S, I), zeros behind them."""
        assert sum(self.lengths) == x_1TI.shape[1], "Seats.enter before the forward pass"
        x_CSI: Tensor = _Gather.apply(x_1TI, self.lengths)  # type: ignore[no-untyped-call]
        return x_CSI

    def scatter(self, x_CSO: Tensor) -> Tensor:
        """Return what `gather` was made of (1, T, O)."""
        x_1TO: Tensor = _Scatter.apply(x_CSO, self.lengths)  # type: ignore[no-untyped-call]
        return x_1TO


class _Gather(torch.autograd.Function):
    """A copy each way: the gradients of slices would be a whole tensor for every client."""

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
        x_SI[len(own_SI) :] = 0.0  # whatever is there enters products
    return x_CSI


def _sequence(x_CSO: Tensor, lengths: Sequence[int]) -> Tensor:
    own = [x_SO[:length] for x_SO, length in zip(x_CSO, lengths, strict=True)]
    return torch.cat(own).unsqueeze(0)


class _Stacked(nn.Module):
    """One factor of every client for one module; PEFT takes it for the layer of an adapter."""

    def __init__(self, seats: Seats) -> None:
        super().__init__()
        self._seats = seats
        self.factors = nn.ParameterList()

    def fill(self, factors: Sequence[nn.Parameter]) -> None:
        """Compute with these factors from now on; they stay the clients' own parameters."""
        self.factors = nn.ParameterList(factors)

    @property
    def weight(self) -> Tensor:
        """A factor, whose precision is that of all."""
        factor: Tensor = self.factors[0]
        return factor


class StackedA(_Stacked):
    """Each client's tokens times its own A, (R, I) or less."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what `StackedB` takes: (C, S, R) of (1, T, I), and (C * S, R) of (T, I)."""
        rank = max(a_RI.shape[0] for a_RI in self.factors)
        padded = [nn.functional.pad(a, (0, 0, 0, rank - a.shape[0])) for a in self.factors]
        a_CRI = torch.stack(padded)
        flat = x.dim() == 2
        x_CSI = self._seats.gather(x.unsqueeze(0) if flat else x)
        with in_float32(x.device):
            h_CSR = torch.bmm(x_CSI, a_CRI.transpose(1, 2))
        return h_CSR.flatten(0, 1) if flat else h_CSR


class StackedB(_Stacked):
    """What `StackedA` gave times each client's own scale and B, (O, R) or less."""

    def __init__(self, seats: Seats) -> None:
        super().__init__(seats)
        self.scales: tuple[float, ...] = ()

    def forward(self, h: Tensor) -> Tensor:
        """Return (1, T, O) of (C, S, R), and (T, O) of (C * S, R)."""
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
        x_1TO = self._seats.scatter(x_CSO)
        return x_1TO.squeeze(0) if flat else x_1TO


@dataclass(frozen=True, kw_only=True)
class StackedPass:
    """Packed rows of several clients as one sequence.

    `lengths` says how many tokens each client has there, `entries` how many of the targets.
    """

    packed: Packed
    lengths: tuple[int, ...]
    entries: tuple[int, ...]

    @classmethod
    def of(cls, packs: Sequence[Packed]) -> "StackedPass":
        """Put the packs, one per client, behind each other."""
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
        """Return the clients' pieces, each of its own pack, where they are in the sequence."""
        return [
            replace(piece, start=piece.start + start, stop=piece.stop + start)
            for pieces, start in zip(per_client, _starts(self.lengths), strict=True)
            for piece in pieces
        ]

    def loss_sums(self, model: nn.Module, layout: str) -> list[Tensor]:
        """Return the sum of the losses of every client's targets, a scalar each."""
        losses_K = target_losses(model, self.packed, layout) * self.packed.weights_K
        return [own_K.sum() for own_K in torch.split(losses_K, list(self.entries))]


def _starts(lengths: Sequence[int]) -> list[int]:
    """Return where each begins, one behind the other."""
    return list(accumulate(lengths[:-1], initial=0))
