"""Dropout whose masks belong to a row and a position, not to how rows were batched.

Legend: N rows, T positions, I features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedllm.planning.seeding import seed_of

_LEVELS = 1 << 16  # a draw is a 16-bit integer: four of them per 64-bit random number
_DRAWS_PER_NUMBER = 4


class RowSeeds:
    """The seed and the first real position of every row that is now in the model."""

    def __init__(self) -> None:
        self.seeds: Sequence[int] = ()
        self.starts: Sequence[int] = ()

    def enter(self, seeds: Sequence[int], starts: Sequence[int]) -> None:
        """Say which rows the next forward pass computes, and where each one starts."""
        self.seeds, self.starts = seeds, starts


class RowDropout(nn.Module):
    """Dropout as a function of (row seed, module, position).

    Micro-batches, accumulation and padding change nothing, and neither does a second forward
    pass (gradient checkpointing). It also draws a quarter of the random numbers that
    `nn.Dropout` draws. `rate` is met to 1 / 65,536.
    """

    def __init__(self, rate: float, *, module: str, rows: RowSeeds) -> None:
        super().__init__()
        self._dropped = round(rate * _LEVELS)
        self._gain = _LEVELS / (_LEVELS - self._dropped)
        self._module_seed = seed_of("dropout", module)
        self._rows = rows
        self._draws: dict[torch.device, torch.Generator] = {}

    def forward(self, x_NTI: Tensor) -> Tensor:
        """Return `x` with dropped entries zero and the others scaled up; `x` itself in `eval`."""
        if not self.training:
            return x_NTI
        assert len(self._rows.seeds) == x_NTI.shape[0], "RowSeeds.enter before the forward pass"
        levels_NTI = torch.zeros(x_NTI.shape, dtype=torch.int16, device=x_NTI.device)
        for row, (seed, start) in enumerate(zip(self._rows.seeds, self._rows.starts, strict=True)):
            self._fill(levels_NTI[row, start:], seed)
        kept_NTI = (levels_NTI >= self._dropped - _LEVELS // 2).to(x_NTI.dtype)
        return x_NTI * kept_NTI.mul_(self._gain)

    def _fill(self, levels_TI: Tensor, seed: int) -> None:
        draws = self._draws.setdefault(levels_TI.device, torch.Generator(levels_TI.device))
        draws.manual_seed(seed ^ self._module_seed)
        numbers = torch.empty(
            -(-levels_TI.numel() // _DRAWS_PER_NUMBER), dtype=torch.int64, device=levels_TI.device
        )
        numbers.random_(-(1 << 63), None, generator=draws)
        levels_TI.copy_(numbers.view(torch.int16)[: levels_TI.numel()].view(levels_TI.shape))
