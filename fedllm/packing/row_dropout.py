"""Row dropout: a mask depends on the row and the position, not on the batch.

Legend: N rows, T positions, I features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedllm.errors import ModelError
from fedllm.packing.attention import FLEX_BLOCK
from fedllm.planning.seeding import seed_of

_LEVELS = 1 << 16  # a draw is a 16-bit integer: one 64-bit random number gives four
_DRAWS_PER_NUMBER = 4


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens [start, stop) of a batch entry; their masks are drawn from one seed."""

    entry: int
    start: int
    stop: int
    seed: int


class RowSeeds:
    """The pieces of the current forward pass, with their seeds."""

    def __init__(self) -> None:
        self.pieces: Sequence[Piece] | None = None

    def enter(self, pieces: Sequence[Piece]) -> None:
        """Set the pieces of the next forward pass; for other tokens (padding) no mask is drawn."""
        self.pieces = pieces


class RowDropout(nn.Module):
    """Dropout whose mask is a function of (seed of the piece, module, position in the piece).

    Micro-batches, accumulation, padding and a second forward pass (gradient checkpointing) leave
    the masks unchanged. It draws a quarter of the random numbers that `nn.Dropout` draws. `rate`
    is exact to 1 / 65,536.

    Some classes (OPT, shared experts) give a module the tokens of all rows as one list: the masks
    stay those of the rows.
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
        """Return `x` with dropped entries zero and the others scaled up; in `eval` return `x`.

        Args:
            x: the inputs of all tokens of the forward pass, (N, T, I) or flattened (N * T, I).

        Raises:
            ModelError: the pieces do not say which row each token belongs to.
        """
        return x * self.gains(self.kept(x), x.dtype) if self.training else x

    def gains(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the factor per entry: 0 where dropped, one constant for the others."""
        return kept.to(dtype).mul_(self._gain)

    def kept(self, x: Tensor) -> Tensor:
        """Return a boolean per entry of `x`: whether it is kept.

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
        """Return a view (N, T, I). Several entries end with a piece each, one may with padding."""
        entries = 1 + max(piece.entry for piece in pieces)
        width = max(piece.stop for piece in pieces)
        num_tokens = levels.numel() // levels.shape[-1]
        padding = num_tokens - entries * width
        if padding and not (entries == 1 and 0 < padding < FLEX_BLOCK):
            raise ModelError(
                f"lora.dropout: {self._module} gets {num_tokens} of the {entries * width} tokens "
                "of a pass, so rows cannot have masks of their own; need lora.dropout: 0, or "
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
