"""Products of float32 matrices on CPUs that multiply bfloat16 ones many times as fast.

A float32 number is the sum of two bfloat16 ones but for at most 2**-17 of it. Of the four products
of two such pairs the smallest, at most 2**-16 of the whole, is left out (Henry, Tang and Heinecke,
ARITH 2019, arXiv:1904.06376); the others are added up in float32.

Legend: O out, I in, R stacked rank.
"""

import math

import torch
from torch import Tensor

from fedllm.aggregation import onemkl
from fedllm.aggregation.devices import is_fast_at_bfloat16
from fedllm.aggregation.spares import SPARES

# of a product's squared norm, where its summands do not cancel: each loses at most 2**-15 of itself
# (of the whole norm 4.4e-6 is seen where digits are random)
RESOLUTION = 1e-9

_SMALLEST_SIDE = 1024  # below it the pairs take as long to make as they save
_ROWS = 2800  # of B, at most, that are in pairs at a time
_CACHED_ROWS = 64
_LEAST = 2.0**-40  # the units take numbers below 2**-126, where the lower halves end, for zero


def are_faster(device: torch.device, out: int, in_: int) -> bool:
    """Say whether products of this shape are formed of pairs: by shape and kind of device alone."""
    is_large = min(out, in_) >= _SMALLEST_SIDE
    return is_large and device.type == "cpu" and is_fast_at_bfloat16(device) and onemkl.is_there()


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
    a_high, a_low = pair_of_a = _pair(a_RI, amounts_R1)
    at_once = math.ceil(len(b_OR) / math.ceil(len(b_OR) / _ROWS))
    for w, b in zip(torch.split(w_OI, at_once), torch.split(b_OR, at_once), strict=True):
        pair_of_b = None if b.dtype == torch.bfloat16 else _pair(b)
        b_high = b.contiguous() if pair_of_b is None else pair_of_b[0]
        onemkl.add_product(w, b_high, a_high, keep=False)
        onemkl.add_product(w, b_high, a_low)
        if pair_of_b is not None:
            onemkl.add_product(w, pair_of_b[1], a_high)
            SPARES.keep(pair_of_b)
    SPARES.keep(pair_of_a)


def _pair(x: Tensor, amounts: Tensor | None = None) -> Tensor:
    """Return two matrices in bfloat16 whose sum is x, or the rows of x times their amounts."""
    pair = SPARES.empty((2, *x.shape), dtype=torch.bfloat16)
    cached = torch.empty(_CACHED_ROWS, x.shape[1])
    for begin in range(0, len(x), _CACHED_ROWS):
        rows = slice(begin, begin + _CACHED_ROWS)
        wide = x[rows]
        room = cached[: len(wide)]
        if amounts is not None:
            wide = torch.mul(wide, amounts[rows], out=room)
        high, low = pair[:, rows]
        high.copy_(wide)
        low.copy_(torch.sub(wide, high, out=room))
    return pair
