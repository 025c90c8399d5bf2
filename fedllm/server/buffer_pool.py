"""Memory that blocks of clients' factors are read into, used over and over.

Legend: G modules, O out, I in, R stacked rank of a block, C clients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fedllm.aggregation.decomposition import Problem

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """How a block lies in memory: A of all modules, then B.

    `ranks` are the clients' own, 0 where one has no such modules.
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
        """Where B begins, in bytes."""
        size = self.modules * self.stacked_rank * self.problem.in_ * self.dtype.itemsize
        return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES

    @property
    def size(self) -> int:
        """How many bytes the block takes."""
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
        """Return the B of each client (G, O, own rank), one after the other."""
        found: list[Tensor] = []
        begin = self.begin_of_b
        for rank in self.ranks:
            shape = (self.modules, self.problem.out, rank)
            found.append(self._view(memory, begin, shape))
            begin += math.prod(shape) * self.dtype.itemsize
        return found

    def _view(self, memory: Tensor, begin: int, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape) * self.dtype.itemsize
        return memory[begin : begin + size].view(self.dtype).view(*shape)


class CpuBuffer:
    """Memory of one block on the CPU: every factor is copied where the arithmetic reads it."""

    layout: BlockLayout

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def lay_out(self, layout: BlockLayout) -> list[tuple[Tensor, Tensor]]:
        """Make room for a block; return where each client's A (G, R, I) and B (G, O, R) belong."""
        if self._memory.numel() < layout.size:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self._memory = torch.empty(layout.size, dtype=torch.uint8)
        self.layout = layout
        return self.targets()

    def targets(self) -> list[tuple[Tensor, Tensor]]:
        """Return where each client's A (G, R, I) and B (G, O, R) belong."""
        a = _split(self.layout, self.layout.all_a(self._memory), 1)
        b = _split(self.layout, self.layout.all_b(self._memory), 2)
        return list(zip(a, b, strict=True))

    def send(self) -> None:
        """Say that all is copied: here it lies where it belongs."""

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return A (G, R, I) and B (G, O, R)."""
        return self.layout.all_a(self._memory), self.layout.all_b(self._memory)

    def release(self) -> None:
        """Say that the block is computed on."""


class GpuBuffer:
    """Memory of one block for a GPU: pinned, and its like there.

    A row of a client's B is a few floats long: each B travels as it is, and the GPU, which does
    it faster, puts their columns side by side.
    """

    layout: BlockLayout

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._grow(0)

    def lay_out(self, layout: BlockLayout) -> list[tuple[Tensor, Tensor]]:
        """Make room for a block; return where each client's A (G, R, I) and B (G, O, R) belong."""
        if self._pinned.numel() < layout.size:
            self._grow(layout.size)
        self.layout = layout
        return self.targets()

    def targets(self) -> list[tuple[Tensor, Tensor]]:
        """Return where each client's A (G, R, I) and B (G, O, R) belong."""
        a = _split(self.layout, self.layout.all_a(self._pinned), 1)
        return list(zip(a, self.layout.b_of_each(self._pinned), strict=True))

    def send(self) -> None:
        """Begin to copy the block to the GPU."""
        size = self.layout.size
        with torch.cuda.stream(self._stream):
            self._there[:size].copy_(self._pinned[:size], non_blocking=True)
            self._arrived.record(self._stream)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return A (G, R, I) and B (G, O, R) once they have arrived."""
        torch.cuda.current_stream(self._device).wait_event(self._arrived)
        b_GOR = torch.cat(self.layout.b_of_each(self._there), dim=2)
        return self.layout.all_a(self._there), b_GOR

    def release(self) -> None:
        """Wait until the block is computed on."""
        torch.cuda.current_stream(self._device).synchronize()

    def _grow(self, size: int) -> None:
        # the old ones go first
        self._pinned = self._there = torch.empty(0, dtype=torch.uint8)
        self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        # memory of the stream that fills it: none that other streams still compute on
        with torch.cuda.stream(self._stream):
            self._there = torch.empty(size, dtype=torch.uint8, device=self._device)


Buffer: TypeAlias = CpuBuffer | GpuBuffer


def buffer_for(device: torch.device) -> Buffer:
    """Return an empty buffer for blocks that are computed on `device`."""
    return GpuBuffer(device) if device.type == "cuda" else CpuBuffer()


def _split(layout: BlockLayout, stacked: Tensor, dim: int) -> list[Tensor]:
    """Return each client's share of a stacked tensor."""
    return list(torch.split(stacked, list(layout.ranks), dim=dim))
