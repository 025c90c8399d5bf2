"""Pipeline of an aggregation: groups of modules, block by block, on one device or several.

The groups go to the devices in turn. The result of a group does not depend on that: two CPU
devices give the same bits as one.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event

import torch
from torch import Tensor

from fedllm.aggregation.groups import ModuleGroup
from fedllm.aggregation.route_types import Partial
from fedllm.errors import AdapterError
from fedllm.lora.factors import FactorBlock
from fedllm.methods.base_terms import is_term
from fedllm.methods.protocol import Method, ModuleAggregate, ModuleState, ServerStep, StateNotes
from fedllm.server.prefetch import FactorSource, Portion, Prefetch

STAGES = ("read", "fold", "decompose", "write")


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The aggregation of groups of modules by one method.

    Attributes:
        method: the method that aggregates modules.
        source: the clients' factors; its client numbers are those of `ModuleGroup.clients`.
        blocks: the clients of each block.
        total: the sum of the clients' weights.
        before: returns a module's previous state.
        take: called with each module's name and result when it is ready, one at a time.
        devices: the devices that compute; a device that is named twice is used twice.
        round: the number of the round.
        notes: the JSON part of the new state.
        noise_std: see `ServerStep`.
        clients: the ids of clients by their numbers in the source; empty: they are no clients.
    """

    method: Method
    source: FactorSource
    blocks: Sequence[tuple[int, ...]]
    total: float
    before: Callable[[str], ModuleState]
    take: Callable[[str, ModuleAggregate], None]
    devices: Sequence[torch.device]
    round: int
    notes: StateNotes = field(default_factory=dict)
    noise_std: float = 0.0
    clients: Sequence[str] = ()

    def run(self, groups: Sequence[ModuleGroup]) -> dict[str, float]:
        """Aggregate all groups; return the seconds of each stage.

        Stages overlap, and each has a clock of its own, summed over the devices.

        Raises:
            AdapterError: an update that cannot be combined, by client and module.
        """
        stop = Event()
        threads = torch.get_num_threads()
        count = len(self.devices)
        with ThreadPoolExecutor(count) as pool, ThreadPoolExecutor(1) as writer:
            workers = [
                _Worker(pipeline=self, device=device, threads=threads, writer=writer, stop=stop)
                for device in self.devices
            ]
            running = [
                pool.submit(worker.work, groups[number::count])
                for number, worker in enumerate(workers)
            ]
            try:
                seconds = [future.result() for future in as_completed(running)]
            except BaseException:
                stop.set()  # whatever the error is: the other devices need not go on
                raise
        return {stage: sum(of_device[stage] for of_device in seconds) for stage in STAGES}

    def portions(self, group: ModuleGroup) -> list[Portion]:
        """Return the portions of a group: the blocks in which a client has it, in their order."""
        return [
            Portion(group=group, clients=block)
            for block in self.blocks
            if any(group.clients[client] for client in block)
        ]


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """The thread that computes on one device."""

    pipeline: Pipeline
    device: torch.device
    threads: int
    writer: ThreadPoolExecutor
    stop: Event

    def work(self, groups: Sequence[ModuleGroup]) -> Mapping[str, float]:
        """Aggregate some groups; return the seconds of each stage."""
        # both settings are per thread
        torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        seconds: defaultdict[str, float] = defaultdict(float)
        written: Future[None] | None = None
        portions = {group.modules: self.pipeline.portions(group) for group in groups}
        in_order = [portion for of_group in portions.values() for portion in of_group]
        with Prefetch(self.pipeline.source, in_order, self.device) as prefetch:
            for group in groups:
                self._raise_if_cancelled()
                results = self._aggregate(group, len(portions[group.modules]), prefetch, seconds)
                if written is not None:
                    written.result()
                written = self.writer.submit(self._write, group, results, seconds)
        if written is not None:
            written.result()
        seconds["read"] = prefetch.read_seconds
        return seconds

    def _aggregate(
        self,
        group: ModuleGroup,
        num_blocks: int,
        prefetch: Prefetch,
        seconds: "defaultdict[str, float]",
    ) -> list[ModuleAggregate]:
        step = self._step(group)
        started = time.perf_counter()
        # no name here holds a partial result while the next one is computed
        blocks = _Timed(self._next_partial(step, prefetch, seconds) for _ in range(num_blocks))
        with _naming_modules(group, blocks):
            results = self.pipeline.method.finish(blocks, step)
        self._synchronize()
        seconds["decompose"] += time.perf_counter() - started - blocks.seconds
        return results

    def _step(self, group: ModuleGroup) -> ServerStep:
        return ServerStep(
            modules=group.modules,
            problem=group.problem,
            total=self.pipeline.total,
            before=[_move_to(self.device, self.pipeline.before(m)) for m in group.modules],
            ranks=group.received,
            round=self.pipeline.round,
            notes=self.pipeline.notes,
            noise_std=self.pipeline.noise_std,
            clients=self.pipeline.clients,
        )

    def _next_partial(
        self, step: ServerStep, prefetch: Prefetch, seconds: "defaultdict[str, float]"
    ) -> Partial:
        with prefetch.block() as block:
            self._raise_if_cancelled()
            started = time.perf_counter()
            partial = _fold(self.pipeline.method, block, step)
            self._synchronize()
            seconds["fold"] += time.perf_counter() - started
        return partial

    def _write(
        self,
        group: ModuleGroup,
        results: Sequence[ModuleAggregate],
        seconds: "defaultdict[str, float]",
    ) -> None:
        started = time.perf_counter()
        for module, result in zip(group.modules, results, strict=True):
            self.pipeline.take(module, result)
        seconds["write"] += time.perf_counter() - started

    def _raise_if_cancelled(self) -> None:
        """Raise CancelledError if another device has failed."""
        if self.stop.is_set():
            raise CancelledError

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def _fold(method: Method, block: FactorBlock, step: ServerStep) -> Partial:
    try:
        return method.fold(block, step)
    except AdapterError as error:
        raise AdapterError(f"{step.modules[0]}: {error}") from error


def _move_to(device: torch.device, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state on the device; terms of the base's change stay where they are mapped."""
    return {n: tensor if is_term(n) else tensor.to(device) for n, tensor in tensors.items()}


@contextmanager
def _naming_modules(group: ModuleGroup, partials: "_Timed") -> Iterator[None]:
    """Put the modules of a group before the message of an error in their sum.

    The updates are read inside this block too; an error in one of them names its module already.
    """
    try:
        yield
    except AdapterError as error:
        first, *others = group.modules
        named = any(str(error).startswith(f"{module}: ") for module in group.modules)
        if named or partials.failed:
            raise
        place = f"{first} or one of {len(others)} like it" if others else first
        raise AdapterError(f"{place}: {error}") from error


class _Timed(Iterator[Partial]):
    """An iterator of partial results that counts their seconds, and notes whether one failed."""

    def __init__(self, partials: Iterator[Partial]) -> None:
        self._partials = partials
        self.seconds = 0.0
        self.failed = False

    def __next__(self) -> Partial:
        started = time.perf_counter()
        try:
            return next(self._partials)
        except AdapterError:
            self.failed = True
            raise
        finally:
            self.seconds += time.perf_counter() - started
