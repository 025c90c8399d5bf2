"""Clients' factors from memory-mapped files to blocks on a device, ahead of the arithmetic.

Each tensor is copied once, from the page cache into the buffer of its block; a thread fills the
next block's buffer while one is computed on.

Legend: G modules, O out, I in, R rank, C clients.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Protocol, Self

import torch
from torch import Tensor

from fedllm.aggregation.groups import ModuleGroup
from fedllm.errors import AdapterError, BadUpdate
from fedllm.lora.factors import FactorBlock
from fedllm.server.buffer_pool import BlockLayout, Buffer, buffer_for

_MAX_READERS = 16
_READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FactorSource(Protocol):
    """Clients' factors by client and module; what is read is read when it is copied."""

    def factors(self, client: int, module: str) -> tuple[Tensor, Tensor]:
        """Return A (R, I) and B (O, R) as they lie in the file."""

    def scale(self, client: int, module: str) -> float:
        """Return the scale of their product."""

    def weight(self, client: int, module: str) -> float:
        """Return what the client's product counts, not normalised."""

    def check(self, client: int, module: str, part: str) -> None:
        """Check that A or B is what was published.

        Raises:
            AdapterError: it was altered.
        """

    def name(self, client: int, module: str, part: str) -> str:
        """Return how a message names A or B: the file, the client, the module."""


@dataclass(frozen=True, kw_only=True)
class Portion:
    """What is read at once: a block of a group's clients, by their numbers in the source."""

    group: ModuleGroup
    clients: tuple[int, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The clients' ranks, 0 where one has no such modules."""
        return tuple(self.group.clients[client] for client in self.clients)


class Prefetch:
    """The blocks of some portions, one after the other.

    Args:
        source: where factors are read.
        portions: in the order in which they are asked for.
        device: where the blocks are computed on.
    """

    def __init__(
        self, source: FactorSource, portions: Sequence[Portion], device: torch.device
    ) -> None:
        self.read_seconds = 0.0
        self._source, self._portions = source, portions
        self._stopped = False
        self._free: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[_Filled | BaseException] = queue.SimpleQueue()
        on_gpu = device.type == "cuda"
        # one is filled while one is computed on, and one travels
        for _ in range(3 if on_gpu else 2):
            self._free.put(buffer_for(device))
        # where the CPU does the arithmetic its cores are for that
        readers = min(_MAX_READERS, len(os.sched_getaffinity(0)))
        self._readers = ThreadPoolExecutor(readers) if on_gpu else None
        self._thread = threading.Thread(target=self._fill_all, daemon=True)

    def __enter__(self) -> Self:
        """Begin to read ahead."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading."""
        self._stopped = True
        self._free.put(None)  # wakes a thread that waits for a buffer
        self._thread.join()
        if self._readers:
            self._readers.shutdown()

    @contextmanager
    def block(self) -> Iterator[FactorBlock]:
        """Give the next portion's block; afterwards its memory is filled with another.

        Raises:
            AdapterError: factors that are not what was announced.
            BadUpdate: a value is not finite.
        """
        filled = self._filled.get()
        if isinstance(filled, BaseException):
            raise filled
        a_GRI, b_GOR = filled.buffer.tensors()
        if not (_is_finite(a_GRI) and _is_finite(b_GOR)):
            raise self._not_finite(filled)
        yield FactorBlock(
            a_GRI=a_GRI,
            b_GOR=b_GOR,
            ranks=filled.portion.ranks,
            scales_GC=filled.scales_GC,
            weights_GC=filled.weights_GC,
        )
        filled.buffer.release()
        self._free.put(filled.buffer)

    def _fill_all(self) -> None:
        try:
            for portion in self._portions:
                buffer = self._free.get()
                if buffer is None or self._stopped:
                    return
                started = time.perf_counter()
                self._filled.put(self._fill(buffer, portion))
                self.read_seconds += time.perf_counter() - started
        except BaseException as error:  # told where the block is asked for
            self._filled.put(error)

    def _fill(self, buffer: Buffer, portion: Portion) -> "_Filled":
        modules, ranks = portion.group.modules, portion.ranks
        having = [c for c, rank in enumerate(ranks) if rank]
        pairs = {c: [self._announced(portion, c, ranks[c], m) for m in modules] for c in having}
        dtypes = {tensor.dtype for each in pairs.values() for pair in each for tensor in pair}
        layout = BlockLayout(
            modules=len(modules),
            problem=portion.group.problem,
            ranks=ranks,
            dtype=reduce(torch.promote_types, dtypes),
        )
        targets = buffer.lay_out(layout)

        def copy(c: int) -> None:
            for g, module in enumerate(modules):
                for part, target, tensor in zip("AB", targets[c], pairs[c][g], strict=True):
                    target[g].copy_(tensor)
                    self._source.check(portion.clients[c], module, part)

        for _ in self._readers.map(copy, having) if self._readers else map(copy, having):
            pass
        buffer.send()
        return _Filled(
            portion=portion,
            buffer=buffer,
            scales_GC=self._of_each(portion, self._source.scale, without=1.0),
            weights_GC=self._of_each(portion, self._source.weight, without=0.0),
        )

    def _of_each(
        self, portion: Portion, number: Callable[[int, str], float], *, without: float
    ) -> Tensor:
        """Return a number of each module and client (G, C), `without` where one has none."""
        having = list(zip(portion.clients, portion.ranks, strict=True))
        rows = [
            [number(client, module) if rank else without for client, rank in having]
            for module in portion.group.modules
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def _announced(self, portion: Portion, c: int, rank: int, module: str) -> tuple[Tensor, Tensor]:
        """Return a client's factors of a module, which have the shapes that they should."""
        problem, client = portion.group.problem, portion.clients[c]
        pair = self._source.factors(client, module)
        shapes = ((rank, problem.in_), (problem.out, rank))
        for part, tensor, shape in zip("AB", pair, shapes, strict=True):
            if tuple(tensor.shape) != shape or tensor.dtype not in _READABLE:
                raise AdapterError(
                    f"{self._source.name(client, module, part)} is "
                    f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}, "
                    f"need floating-point numbers {shape}"
                )
        return pair

    def _not_finite(self, filled: "_Filled") -> BadUpdate:
        portion = filled.portion
        found: dict[int, str] = {}
        for client, pair in zip(portion.clients, filled.buffer.targets(), strict=True):
            for g, module in enumerate(portion.group.modules):
                for part, factor_G in zip("AB", pair, strict=True):
                    # a client without these modules has nothing there
                    if client in found or not factor_G.numel() or _is_finite(factor_G[g]):
                        continue
                    row, column = (~torch.isfinite(factor_G[g])).nonzero()[0].tolist()
                    value = float(factor_G[g][row, column])
                    name = self._source.name(client, module, part)
                    found[client] = f"{name} holds {value} at [{row}, {column}]"
        return BadUpdate(f"{next(iter(found.values()))}; leave it out", found)


@dataclass(frozen=True, kw_only=True)
class _Filled:
    """A portion in its buffer, with what each client's product counts."""

    portion: Portion
    buffer: Buffer
    scales_GC: Tensor
    weights_GC: Tensor


def _is_finite(values: Tensor) -> bool:
    """Say whether all are finite, in one pass and without memory."""
    least, most = torch.aminmax(values)
    return bool(torch.isfinite(least) & torch.isfinite(most))
