"""Dropout whose masks belong to a row and a position, not to how rows were batched.

Legend: N rows, T positions, I features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedllm.errors import ModelError
from fedllm.packing.attention import FLEX_BLOCK
from fedllm.planning.seeding import seed_of

_LEVELS = 1 << 16  # a draw is a 16-bit integer: four of them per 64-bit random number
_DRAWS_PER_NUMBER = 4


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens [start, stop) of a batch entry whose masks are drawn from one seed."""

    entry: int
    start: int
    stop: int
    seed: int


class RowSeeds:
    """Whose tokens are now in the model: the pieces of the forward pass and their seeds."""

    def __init__(self) -> None:
        self.pieces: Sequence[Piece] | None = None

    def enter(self, pieces: Sequence[Piece]) -> None:
        """Say what the next forward pass computes; for tokens of no piece, padding, none drawn."""
        self.pieces = pieces


class RowDropout(nn.Module):
    """Dropout as a function of (seed of the piece, module, position in it).

    Micro-batches, accumulation and padding change nothing, and neither does a second forward
    pass (gradient checkpointing). It also draws a quarter of the random numbers that
    `nn.Dropout` draws. `rate` is met to 1 / 65,536.

    Some classes (OPT, shared experts) give a module the tokens of all rows as one list: the masks
    are those of the rows.
    """

    def __init__(self, rate: float, *, module: str, rows: RowSeeds) -> None:
        super().__init__()
        self._dropped = round(rate * _LEVELS)
        self._gain = _LEVELS / (_LEVELS - self._dropped)
        self._module = module
        self._module_seed = seed_of("dropout", module)
        self._rows = rows
        self._draws: dict[torch.device, torch.Generator] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with dropped entries zero and the others scaled up; `x` itself in `eval`.

        Args:
            x: the inputs of all tokens of the forward pass, (N, T, I) or flattened (N * T, I).

        Raises:
            ModelError: tokens of which the pieces do not tell whose they are.
        """
        return x * self.gains(self.kept(x), x.dtype) if self.training else x

    def gains(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what entries are multiplied with: 0 where dropped, the same for all others."""
        return kept.to(dtype).mul_(self._gain)

    def kept(self, x: Tensor) -> Tensor:
        """Return which entries of `x` are kept, in its shape, as booleans.

        Raises:
            ModelError: as `forward`.
        """
        pieces = self._rows.pieces
        assert pieces is not None, "RowSeeds.enter before the forward pass"
        levels = torch.zeros(x.shape, dtype=torch.int16, device=x.device)
        if pieces:
            levels_NTI = self._by_entry(levels, pieces)
            for piece in pieces:
                self._fill(levels_NTI[piece.entry, piece.start : piece.stop], piece.seed)
        return levels >= self._dropped - _LEVELS // 2

    def _by_entry(self, levels: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Return a view (N, T, I); several entries end with a piece each, one may with padding."""
        entries = 1 + max(piece.entry for piece in pieces)
        width = max(piece.stop for piece in pieces)
        found = levels.numel() // levels.shape[-1]
        padding = found - entries * width
        if padding and not (entries == 1 and 0 < padding < FLEX_BLOCK):
            raise ModelError(
                f"lora.dropout: {self._module} gets {found} of the {entries * width} tokens of a "
                "pass, so rows cannot have masks of their own; need lora.dropout: 0, or "
                "lora.target_modules without it"
            )
        return levels.view(entries, -1, levels.shape[-1])

    def _fill(self, levels_TI: Tensor, seed: int) -> None:
        draws = self._draws.setdefault(levels_TI.device, torch.Generator(levels_TI.device))
        draws.manual_seed(seed ^ self._module_seed)
        numbers = torch.empty(
            -(-levels_TI.numel() // _DRAWS_PER_NUMBER), dtype=torch.int64, device=levels_TI.device
        )
        numbers.random_(-(1 << 63), None, generator=draws)
        levels_TI.copy_(numbers.view(torch.int16)[: levels_TI.numel()].view(levels_TI.shape))
