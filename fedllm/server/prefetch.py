"""Prefetch of clients' factors: from memory-mapped files to blocks, ahead of the arithmetic.

Each tensor is copied once, from the page cache into the buffer of its block. A thread fills the
buffer of the next block while the device computes on the present one.

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
from fedllm.methods.state import all_finite
from fedllm.server.buffer_pool import BlockLayout, Buffer, buffer_for

_MAX_READERS = 16
_READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FactorSource(Protocol):
    """The factors of clients, by client and module; a file is read when a tensor is copied."""

    def factors(self, client: int, module: str) -> tuple[Tensor, Tensor]:
        """Return A (R, I) and B (O, R) as they lie in the file."""

    def scale(self, client: int, module: str) -> float:
        """Return the scale of their product."""

    def weight(self, client: int, module: str) -> float:
        """Return the weight of the client's product, not normalised."""

    def check(self, client: int, module: str, part: str, values: Tensor) -> None:
        """Check that A or B, of which `values` is a copy, is as it was published.

        Raises:
            AdapterError: it was altered.
            BadUpdate: its client recorded what cannot be true of it.
        """

    def name(self, client: int, module: str, part: str) -> str:
        """Return the name of A or B for messages: file, client and module."""


@dataclass(frozen=True, kw_only=True)
class Portion:
    """A portion that is read at once: a block of clients, by their numbers in the source."""

    group: ModuleGroup
    clients: tuple[int, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The clients' ranks, 0 for a client without these modules."""
        return tuple(self.group.clients[client] for client in self.clients)


class Prefetch:
    """A reader that fills the blocks of portions ahead of their use, in order.

    Args:
        source: the clients' factors.
        portions: the portions, in the order of their use.
        device: the device that computes on the blocks.
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
        # one is filled, one is computed on, and for a GPU one is being copied
        for _ in range(3 if on_gpu else 2):
            self._free.put(buffer_for(device))
        # where the CPU computes, its cores are needed for that
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
        """Give the block of the next portion; its memory is used again afterwards.

        Raises:
            AdapterError: factors of another shape or type than announced.
            BadUpdate: a value is not finite.
        """
        filled = self._filled.get()
        if isinstance(filled, BaseException):
            raise filled
        a_GRI, b_GOR = filled.buffer.tensors()
        if not (all_finite(a_GRI) and all_finite(b_GOR)):
            raise self._not_finite(filled)
        yield FactorBlock(
            a_GRI=a_GRI,
            b_GOR=b_GOR,
            ranks=filled.portion.ranks,
            scales_GC=filled.scales_GC,
            weights_GC=filled.weights_GC,
            clients=filled.portion.clients,
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
        except BaseException as error:  # raised again by `block`
            self._filled.put(error)

    def _fill(self, buffer: Buffer, portion: Portion) -> "_Filled":
        modules, ranks = portion.group.modules, portion.ranks
        present = [c for c, rank in enumerate(ranks) if rank]
        pairs = {
            c: [self._checked_factors(portion, c, ranks[c], m) for m in modules] for c in present
        }
        factors = (pair for of_client in pairs.values() for pair in of_client)
        dtypes = {tensor.dtype for pair in factors for tensor in pair}
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
                    self._source.check(portion.clients[c], module, part, target[g])

        for _ in self._readers.map(copy, present) if self._readers else map(copy, present):
            pass
        buffer.send()
        return _Filled(
            portion=portion,
            buffer=buffer,
            scales_GC=self._numbers(portion, self._source.scale, default=1.0),
            weights_GC=self._numbers(portion, self._source.weight, default=0.0),
        )

    def _numbers(
        self, portion: Portion, number: Callable[[int, str], float], *, default: float
    ) -> Tensor:
        """Return the numbers of modules and clients (G, C); `default` for a client without them."""
        clients = list(zip(portion.clients, portion.ranks, strict=True))
        rows = [
            [number(client, module) if rank else default for client, rank in clients]
            for module in portion.group.modules
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def _checked_factors(
        self, portion: Portion, c: int, rank: int, module: str
    ) -> tuple[Tensor, Tensor]:
        """Return a client's factors of a module, after a check of their shapes and types."""
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
        """Return the error that names the first bad value of each client."""
        portion = filled.portion
        bad_values: dict[int, str] = {}
        for client, pair in zip(portion.clients, filled.buffer.targets(), strict=True):
            for g, module in enumerate(portion.group.modules):
                for part, factor_G in zip("AB", pair, strict=True):
                    # a client without these modules has empty factors
                    if client in bad_values or not factor_G.numel() or all_finite(factor_G[g]):
                        continue
                    row, column = (~torch.isfinite(factor_G[g])).nonzero()[0].tolist()
                    value = float(factor_G[g][row, column])
                    name = self._source.name(client, module, part)
                    bad_values[client] = f"{name} holds {value} at [{row}, {column}]"
        return BadUpdate(f"{next(iter(bad_values.values()))}; leave it out", bad_values)


@dataclass(frozen=True, kw_only=True)
class _Filled:
    """A portion in its buffer, with the scales and weights of its clients' products."""

    portion: Portion
    buffer: Buffer
    scales_GC: Tensor
    weights_GC: Tensor
