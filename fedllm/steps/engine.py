"""Groups of modules through a method, block by block, on one device or several.

Groups are dealt to the devices in turn. What a group comes to depends on neither: two CPU devices
give the bits of one.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import Event

import torch

from fedllm.aggregation.decomposition import Partial
from fedllm.aggregation.groups import Group
from fedllm.errors import AdapterError
from fedllm.methods.protocol import Method, ModuleAggregate, ModuleState
from fedllm.steps.feeding import Feed, Portion, Source

STAGES = ("read", "fold", "decompose", "write")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A method, what it is given, and who takes what it makes.

    Attributes:
        method: how modules are aggregated.
        source: where factors are read; its clients have the numbers that `Group.clients` has.
        blocks: the clients of each block.
        total: what the clients' weights sum to.
        before: returns a module's state before.
        take: is given each module's name and result as soon as it is there, one at a time.
        devices: on which to compute; a device that is named twice is used twice.
    """

    method: Method
    source: Source
    blocks: Sequence[tuple[int, ...]]
    total: float
    before: Callable[[str], ModuleState]
    take: Callable[[str, ModuleAggregate], None]
    devices: Sequence[torch.device]

    def run(self, groups: Sequence[Group]) -> dict[str, float]:
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
                _Worker(engine=self, device=device, threads=threads, writer=writer, stop=stop)
                for device in self.devices
            ]
            running = [
                pool.submit(worker.work, groups[number::count])
                for number, worker in enumerate(workers)
            ]
            try:
                seconds = [future.result() for future in as_completed(running)]
            except BaseException:
                stop.set()  # whatever it was: the others need not go on
                raise
        return {stage: sum(each[stage] for each in seconds) for stage in STAGES}


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """One device at work."""

    engine: Engine
    device: torch.device
    threads: int
    writer: ThreadPoolExecutor
    stop: Event

    def work(self, groups: Sequence[Group]) -> Mapping[str, float]:
        """Aggregate some groups; return the seconds of each stage."""
        # a thread begins with its own numbers of both
        torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        seconds: defaultdict[str, float] = defaultdict(float)
        written: Future[None] | None = None
        with Feed(self.engine.source, self._portions(groups), self.device) as feed:
            for group in groups:
                found = self._aggregate(group, feed, seconds)
                if written is not None:
                    written.result()
                written = self.writer.submit(self._hand_on, group, found, seconds)
        if written is not None:
            written.result()
        seconds["read"] = feed.read_seconds
        return seconds

    def _aggregate(
        self, group: Group, feed: Feed, seconds: "defaultdict[str, float]"
    ) -> list[ModuleAggregate]:
        before = [
            {part: tensor.to(self.device) for part, tensor in self.engine.before(module).items()}
            for module in group.modules
        ]
        started = time.perf_counter()
        blocks = _Timed(self._partials(group, feed, seconds))
        found = self.engine.method.finish(
            group.modules,
            problem=group.problem,
            partials=blocks,
            total=self.engine.total,
            before=before,
            ranks=group.received,
        )
        self._synchronize()
        seconds["decompose"] += time.perf_counter() - started - blocks.seconds
        return found

    def _partials(
        self, group: Group, feed: Feed, seconds: "defaultdict[str, float]"
    ) -> Iterator[Partial]:
        for _ in self._blocks(group):
            # without a name for it: what is summed up must not wait here for the next one
            yield self._fold(group, feed, seconds)

    def _fold(self, group: Group, feed: Feed, seconds: "defaultdict[str, float]") -> Partial:
        with feed.block() as block:
            if self.stop.is_set():
                raise CancelledError
            started = time.perf_counter()
            try:
                partial = self.engine.method.fold(block, group.problem)
            except AdapterError as error:
                raise AdapterError(f"{group.modules[0]}: {error}") from error
            self._synchronize()
            seconds["fold"] += time.perf_counter() - started
        return partial

    def _portions(self, groups: Iterable[Group]) -> list[Portion]:
        return [
            Portion(group=group, clients=clients)
            for group in groups
            for clients in self._blocks(group)
        ]

    def _blocks(self, group: Group) -> list[tuple[int, ...]]:
        """Return the blocks that have anything of a group."""
        return [b for b in self.engine.blocks if any(group.clients[client] for client in b)]

    def _hand_on(
        self, group: Group, found: Sequence[ModuleAggregate], seconds: "defaultdict[str, float]"
    ) -> None:
        started = time.perf_counter()
        for module, result in zip(group.modules, found, strict=True):
            self.engine.take(module, result)
        seconds["write"] += time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


class _Timed(Iterator[Partial]):
    """Partial results, and the seconds that were spent in making them."""

    def __init__(self, partials: Iterator[Partial]) -> None:
        self._partials = partials
        self.seconds = 0.0

    def __next__(self) -> Partial:
        started = time.perf_counter()
        try:
            return next(self._partials)
        finally:
            self.seconds += time.perf_counter() - started
