"""Products of float32 matrices on CPUs that multiply bfloat16 ones many times as fast.

A float32 matrix is the sum of two bfloat16 ones but for some 2e-6 of its norm, and of the four
products of two such pairs the smallest is left out (Henry, Tang and Heinecke, ARITH 2019,
arXiv:1904.06376). The units add up in float32 but return bfloat16: the largest product is therefore
formed twice, the second time less its own rounded value.

Legend: O out, I in, R stacked rank.
"""

import math

import torch
from torch import Tensor

from fedllm.aggregation.devices import is_fast_at_bfloat16
from fedllm.aggregation.spares import SPARES

# of a product's squared norm, where its summands do not cancel: 6.4e-11 is seen
RESOLUTION = 1e-9

_SMALLEST_SIDE = 1024  # below it the pairs take as long to make as they save
_ROWS = 1400  # at most, of a product at a time
_CACHED_ROWS = 64
_LINE = 32  # numbers of bfloat16 in a line of the cache
_LEAST = 2.0**-40  # the units take numbers below 2**-126, where the lower halves end, for zero


def are_faster(device: torch.device, out: int, in_: int) -> bool:
    """Say whether products of this shape are formed of pairs: by shape and kind of device alone."""
    is_large = min(out, in_) >= _SMALLEST_SIDE
    return is_large and device.type == "cpu" and is_fast_at_bfloat16(device)


def hold(b_OR: Tensor, a_RI: Tensor, amounts_R1: Tensor) -> bool:
    """Say whether the factors have numbers so large that what their pairs lose is rounding.

    Of columns 2**-80 times as large as others pairs may lose more than that.
    """
    return _has_large(b_OR, torch.ones_like(b_OR[:, :1])) and _has_large(a_RI, amounts_R1)


def _has_large(x: Tensor, amounts: Tensor) -> bool:
    for rows in (slice(_CACHED_ROWS), slice(None)):  # the first ones mostly tell
        if bool(((x[rows] * amounts[rows]).abs() >= _LEAST).any()):
            return True
    return False


def multiply(b_OR: Tensor, a_RI: Tensor, amounts_R1: Tensor, w_OI: Tensor) -> None:
    """Write `b @ (amounts * a)` to `w_OI`, float32."""
    high_RI, low_RI = _pair(a_RI, _room(a_RI), amounts_R1)
    at_once = math.ceil(len(b_OR) / math.ceil(len(b_OR) / _ROWS))
    rooms = [_room(part) for part in (b_OR[:at_once], w_OI[:at_once])]
    for w, b in zip(torch.split(w_OI, at_once), torch.split(b_OR, at_once), strict=True):
        b_high, b_low = _pair(b, rooms[0])
        high, low = (part[: len(w)] for part in rooms[1])
        torch.mm(b_high, high_RI, out=high)
        torch.neg(high, out=low)
        low.addmm_(b_high, high_RI).addmm_(b_high, low_RI).addmm_(b_low, high_RI)
        for each in zip(*(torch.split(part, _CACHED_ROWS) for part in (w, high, low)), strict=True):
            torch.add(each[1].float(), each[2].float(), out=each[0])
    SPARES.keep(high_RI, *(room[0] for room in rooms))


def _room(x: Tensor) -> Tensor:
    rows, columns = x.shape
    # rows that begin an odd number of cache lines apart do not drive each other out
    lines = math.ceil(columns / _LINE) // 2 * 2 + 1
    whole = SPARES.empty((2, rows, lines * _LINE), dtype=torch.bfloat16)
    # the units read on to the end of a line, and zero times NaN is no zero
    whole[..., columns:] = 0
    return whole[..., :columns]


def _pair(x: Tensor, into: Tensor, amounts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return two matrices in bfloat16 whose sum is x, or the rows of x times their amounts."""
    high, low = into[:, : len(x)]
    cached = torch.empty(_CACHED_ROWS, x.shape[1])
    for begin in range(0, len(x), _CACHED_ROWS):
        rows = slice(begin, begin + _CACHED_ROWS)
        wide = x[rows]
        room = cached[: len(wide)]
        if amounts is not None:
            wide = torch.mul(wide, amounts[rows], out=room)
        high[rows].copy_(wide)
        low[rows].copy_(torch.sub(wide, high[rows], out=room))
    return high, low
