"""Memory on a CPU that is used again.

The C library gives large blocks back to the system as soon as they are freed, and fresh pages take
longer to be written first than the sums that go there.
"""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_KEPT = 12  # of the last tensors that were no longer needed
_ROOMY = 2  # times what is needed


class Spares(threading.local):
    """The memory of the last few tensors that nobody needs any more, for each thread."""

    def __init__(self) -> None:
        self._count = 0
        self._kept: list[tuple[int, Tensor]] = []  # which tensor it was, and its memory

    def empty(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return a tensor, whatever it holds."""
        if torch.device(device).type != "cpu":
            return torch.empty(*shape, dtype=dtype, device=device)
        needed = math.prod(shape) * dtype.itemsize
        sizes = [(len(kept), place) for place, (_, kept) in enumerate(self._kept)]
        fitting = [each for each in sizes if needed <= each[0] <= _ROOMY * needed]
        if fitting:
            _, memory = self._kept.pop(min(fitting)[1])
        else:
            memory = torch.empty(needed, dtype=torch.uint8)
        return memory[:needed].view(dtype).view(*shape)

    def keep(self, *tensors: Tensor) -> None:
        """Keep the memory of tensors that nobody uses after this, for those that come soon."""
        for tensor in tensors:
            if tensor.device.type == "cpu":
                memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._count += 1
                self._kept.append((self._count, memory))
        self._kept = [each for each in self._kept if each[0] > self._count - _KEPT]


SPARES = Spares()
