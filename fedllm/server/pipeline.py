"""Groups of modules through a method, block by block, on one device or several.

Groups are dealt to the devices in turn. What a group comes to depends on neither: two CPU devices
give the bits of one.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor

from fedllm.aggregation.decomposition import Partial
from fedllm.aggregation.groups import ModuleGroup
from fedllm.errors import AdapterError
from fedllm.lora.factors import FactorBlock
from fedllm.methods.protocol import Method, ModuleAggregate, ModuleState
from fedllm.server.prefetch import FactorSource, Portion, Prefetch

STAGES = ("read", "fold", "decompose", "write")


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A method, what it is given, and who takes what it makes.

    Attributes:
        method: how modules are aggregated.
        source: where factors are read; its clients have the numbers that `ModuleGroup.clients` has.
        blocks: the clients of each block.
        total: what the clients' weights sum to.
        before: returns a module's state before.
        take: is given each module's name and result as soon as it is there, one at a time.
        devices: on which to compute; a device that is named twice is used twice.
    """

    method: Method
    source: FactorSource
    blocks: Sequence[tuple[int, ...]]
    total: float
    before: Callable[[str], ModuleState]
    take: Callable[[str, ModuleAggregate], None]
    devices: Sequence[torch.device]

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

    def portions(self, group: ModuleGroup) -> list[Portion]:
        """Return what is read of a group: the blocks that have anything of it, in their order."""
        return [
            Portion(group=group, clients=block)
            for block in self.blocks
            if any(group.clients[client] for client in block)
        ]


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """One device at work."""

    engine: Pipeline
    device: torch.device
    threads: int
    writer: ThreadPoolExecutor
    stop: Event

    def work(self, groups: Sequence[ModuleGroup]) -> Mapping[str, float]:
        """Aggregate some groups; return the seconds of each stage."""
        # a thread begins with its own numbers of both
        torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        seconds: defaultdict[str, float] = defaultdict(float)
        written: Future[None] | None = None
        portions = {group.modules: self.engine.portions(group) for group in groups}
        every = [portion for each in portions.values() for portion in each]
        with Prefetch(self.engine.source, every, self.device) as prefetch:
            for group in groups:
                self._go_on()
                # without a name for each: what is summed up must not wait here for the next one
                blocks = (self._folded(group, prefetch, seconds) for _ in portions[group.modules])
                found = self._aggregate(group, blocks, seconds)
                if written is not None:
                    written.result()
                written = self.writer.submit(self._hand_on, group, found, seconds)
        if written is not None:
            written.result()
        seconds["read"] = prefetch.read_seconds
        return seconds

    def _aggregate(
        self, group: ModuleGroup, partials: Iterator[Partial], seconds: "defaultdict[str, float]"
    ) -> list[ModuleAggregate]:
        before = [_on(self.device, self.engine.before(module)) for module in group.modules]
        started = time.perf_counter()
        blocks = _Timed(partials)
        with _naming(group, blocks):
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

    def _folded(
        self, group: ModuleGroup, prefetch: Prefetch, seconds: "defaultdict[str, float]"
    ) -> Partial:
        with prefetch.block() as block:
            self._go_on()
            started = time.perf_counter()
            partial = _fold(self.engine.method, block, group)
            self._synchronize()
            seconds["fold"] += time.perf_counter() - started
        return partial

    def _hand_on(
        self,
        group: ModuleGroup,
        found: Sequence[ModuleAggregate],
        seconds: "defaultdict[str, float]",
    ) -> None:
        started = time.perf_counter()
        for module, result in zip(group.modules, found, strict=True):
            self.engine.take(module, result)
        seconds["write"] += time.perf_counter() - started

    def _go_on(self) -> None:
        """Do not, where another device failed."""
        if self.stop.is_set():
            raise CancelledError

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def _fold(method: Method, block: FactorBlock, group: ModuleGroup) -> Partial:
    try:
        return method.fold(block, group.problem)
    except AdapterError as error:
        raise AdapterError(f"{group.modules[0]}: {error}") from error


def _on(device: torch.device, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@contextmanager
def _naming(group: ModuleGroup, partials: "_Timed") -> Iterator[None]:
    """Have the message of a sum that cannot be carried begin with the modules it may be of.

    What was wrong with an update, which is read within the block, is named already.
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
    """Partial results, and the seconds that were spent in making them; whether one failed."""

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
