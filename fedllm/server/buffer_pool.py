"""Buffers into which blocks of clients' factors are read, used over and over.

Legend: G modules, O out, I in, R stacked rank of a block, C clients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fedllm.aggregation.route_types import Problem

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """The layout of a block in memory: A of all modules, then B.

    `ranks` are those of the clients, 0 for a client without these modules.
    """

    modules: int
    problem: Problem
    ranks: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stacked_rank(self) -> int:
        """The sum of the clients' ranks."""
        return sum(self.ranks)

    @property
    def begin_of_b(self) -> int:
        """The offset of B, in bytes."""
        size = self.modules * self.stacked_rank * self.problem.in_ * self.dtype.itemsize
        return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES

    @property
    def size(self) -> int:
        """The size of the block, in bytes."""
        elements = self.modules * self.problem.out * self.stacked_rank
        return self.begin_of_b + elements * self.dtype.itemsize

    def all_a(self, memory: Tensor) -> Tensor:
        """Return A (G, R, I)."""
        return self._view(memory, 0, (self.modules, self.stacked_rank, self.problem.in_))

    def all_b(self, memory: Tensor) -> Tensor:
        """Return B (G, O, R), the clients' columns side by side."""
        shape = (self.modules, self.problem.out, self.stacked_rank)
        return self._view(memory, self.begin_of_b, shape)

    def b_of_each(self, memory: Tensor) -> list[Tensor]:
        """Return the B of each client (G, O, own rank); they lie one after the other."""
        tensors: list[Tensor] = []
        begin = self.begin_of_b
        for rank in self.ranks:
            shape = (self.modules, self.problem.out, rank)
            tensors.append(self._view(memory, begin, shape))
            begin += math.prod(shape) * self.dtype.itemsize
        return tensors

    def _view(self, memory: Tensor, begin: int, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape) * self.dtype.itemsize
        return memory[begin : begin + size].view(self.dtype).view(*shape)


class CpuBuffer:
    """A buffer for the CPU: each factor is copied to where the arithmetic reads it."""

    layout: BlockLayout

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def lay_out(self, layout: BlockLayout) -> list[tuple[Tensor, Tensor]]:
        """Make room for a block; return places for each client's A (G, R, I) and B (G, O, R)."""
        if self._memory.numel() < layout.size:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old memory first
            self._memory = torch.empty(layout.size, dtype=torch.uint8)
        self.layout = layout
        return self.targets()

    def targets(self) -> list[tuple[Tensor, Tensor]]:
        """Return the places for each client's A (G, R, I) and B (G, O, R)."""
        a = _split(self.layout, self.layout.all_a(self._memory), 1)
        b = _split(self.layout, self.layout.all_b(self._memory), 2)
        return list(zip(a, b, strict=True))

    def send(self) -> None:
        """Do nothing: the factors already lie where the arithmetic reads them."""

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return A (G, R, I) and B (G, O, R)."""
        return self.layout.all_a(self._memory), self.layout.all_b(self._memory)

    def release(self) -> None:
        """Do nothing: the arithmetic on the block has ended."""


class GpuBuffer:
    """A buffer for a GPU: pinned memory, and as much memory on the GPU.

    A row of a client's B has only a few floats. So each B is sent as it is, and the GPU puts the
    columns side by side, which it does faster.
    """

    layout: BlockLayout

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._grow(0)

    def lay_out(self, layout: BlockLayout) -> list[tuple[Tensor, Tensor]]:
        """Make room for a block; return places for each client's A (G, R, I) and B (G, O, R)."""
        if self._pinned.numel() < layout.size:
            self._grow(layout.size)
        self.layout = layout
        return self.targets()

    def targets(self) -> list[tuple[Tensor, Tensor]]:
        """Return the places for each client's A (G, R, I) and B (G, O, R)."""
        a = _split(self.layout, self.layout.all_a(self._pinned), 1)
        return list(zip(a, self.layout.b_of_each(self._pinned), strict=True))

    def send(self) -> None:
        """Begin to copy the block to the GPU."""
        size = self.layout.size
        with torch.cuda.stream(self._stream):
            self._on_gpu[:size].copy_(self._pinned[:size], non_blocking=True)
            self._arrived.record(self._stream)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return A (G, R, I) and B (G, O, R) once they have arrived."""
        torch.cuda.current_stream(self._device).wait_event(self._arrived)
        b_GOR = torch.cat(self.layout.b_of_each(self._on_gpu), dim=2)
        return self.layout.all_a(self._on_gpu), b_GOR

    def release(self) -> None:
        """Wait until the arithmetic on the block has ended."""
        torch.cuda.current_stream(self._device).synchronize()

    def _grow(self, size: int) -> None:
        # free the old memory first
        self._pinned = self._on_gpu = torch.empty(0, dtype=torch.uint8)
        self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        # allocated on the stream that fills it: no memory on which another stream still computes
        with torch.cuda.stream(self._stream):
            self._on_gpu = torch.empty(size, dtype=torch.uint8, device=self._device)


Buffer: TypeAlias = CpuBuffer | GpuBuffer


def buffer_for(device: torch.device) -> Buffer:
    """Return an empty buffer for blocks that are computed on `device`."""
    return GpuBuffer(device) if device.type == "cuda" else CpuBuffer()


def _split(layout: BlockLayout, stacked: Tensor, dim: int) -> list[Tensor]:
    """Return each client's share of a stacked tensor."""
    return list(torch.split(stacked, list(layout.ranks), dim=dim))
