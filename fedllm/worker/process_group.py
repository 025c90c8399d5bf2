"""Processes of one worker: the first sends its orders to the others, and all stop together."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fedllm.errors import ProcessLost
from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.paths import AttemptPaths
from fedllm.worker.meeting import START_SECONDS, Met, call_first, listen, receive_others
from fedllm.worker.watching import Watch

# time to wait for the first process's next order: it may have nothing to do for long
_ORDER_TIMEOUT = timedelta(days=30)
# time for the others to read that they are dismissed
_DISMISSAL_TIMEOUT = timedelta(minutes=2)


@dataclass(frozen=True, kw_only=True)
class Order:
    """An order to all processes of a worker: train this group of clients next.

    Attributes:
        attempt: the folder of the attempt.
        number: the number of the attempt.
        clients: the group.
        steps: the number of optimizer steps in each client's checkpoint.
        micro_batch_size: rows in memory at once.
    """

    attempt: str
    number: int
    clients: tuple[str, ...]
    steps: tuple[int, ...]
    micro_batch_size: int

    @property
    def paths(self) -> AttemptPaths:
        """The attempt."""
        return AttemptPaths(root=Path(self.attempt), number=self.number)


class Processes(Protocol):
    """The processes of one task, seen from one of them."""

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return which flags are set in any process; all processes call this together."""

    def send_order(self, order: Order) -> None:
        """Send an order to the other processes; only the first process calls this."""

    def dismiss(self, exit_code: int) -> None:
        """End the other processes with an exit code; only the first process calls this."""

    def receive(self) -> Order | int:
        """Wait for the first process; return its order, or the exit code to end with."""


class OneProcess:
    """A task that is a single process."""

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return the flags."""
        return list(flags)

    def send_order(self, order: Order) -> None:
        """Do nothing: there is no other process."""

    def dismiss(self, exit_code: int) -> None:
        """Do nothing: there is no other process."""

    def receive(self) -> Order | int:
        """Raise AssertionError: the only process is the first one, which never waits."""
        raise AssertionError("a single process is the first one")


class SeveralProcesses:
    """Processes that are connected as the default group of `torch.distributed`.

    Orders go through its store: a process may wait long for one, but not for a collective.
    """

    def __init__(self, store: TCPStore) -> None:
        """Begin with the first order."""
        self._store = store
        self._orders = 0

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return which flags are set in any process."""
        combined = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(combined, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in combined.tolist()]

    def send_order(self, order: Order) -> None:
        """Send an order to the other processes."""
        self._send(asdict(order))

    def dismiss(self, exit_code: int) -> None:
        """Send an exit code to the other processes; return once they have it."""
        self._send(exit_code)
        # they read it from this process
        others = range(1, dist.get_world_size())
        self._store.wait([_seen_by(rank) for rank in others], _DISMISSAL_TIMEOUT)

    def receive(self) -> Order | int:
        """Receive the next order or the exit code from the first process."""
        key = self._next_key()
        self._store.wait([key], _ORDER_TIMEOUT)
        message = json.loads(self._store.get(key))
        if isinstance(message, int):
            self._store.set(_seen_by(dist.get_rank()), "")
            return message
        tuples = {name: tuple(message[name]) for name in ("clients", "steps")}
        return Order(**{**message, **tuples})

    def _send(self, message: object) -> None:
        self._store.set(self._next_key(), json.dumps(message))

    def _next_key(self) -> str:
        self._orders += 1
        return f"order/{self._orders}"


def _seen_by(rank: int) -> str:
    return f"dismissal/{rank}"


@contextmanager
def connected(
    identity: TaskIdentity,
    *,
    wait_minutes: float,
    start_seconds: float = START_SECONDS,
    tell: Callable[[ProcessLost], None] = lambda _loss: None,
) -> Iterator[Processes]:
    """Connect the processes of a task, and disconnect them at the end.

    Args:
        identity: this process.
        wait_minutes: how long it waits for the others in a step of the training.
        start_seconds: how long it waits for them to start.
        tell: called at once where another process is lost, from another thread.

    Raises:
        ProcessLost: another process did not start in time, ended before this one, or did not
            answer; it names the process that was lost first, and its log.
        UserError: the variables that name the place to meet are missing.
    """
    if identity.num_processes == 1:
        yield OneProcess()
        return
    met, store = _meet(identity, start_seconds)
    watch, joined, in_order = Watch(identity, met, tell), False, False
    try:
        _join(identity, store, wait_minutes)
        joined = True
        yield SeveralProcesses(store)
        in_order = True
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        said = str(error).splitlines()[0]
        # who does not come so far has the network to blame, not the others
        loss = watch.explain(timed_out="timed out" in str(error).lower()) if joined else None
        what = "lost another one" if joined else "does not reach the others"
        raise loss or ProcessLost(
            f"{identity.task}: process {identity.rank} of {identity.num_processes} {what} ({said})",
            log=identity.log,
        ) from error
    finally:
        watch.close(in_order=in_order)
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(identity: TaskIdentity, start_seconds: float) -> tuple[Met, TCPStore]:
    """Find the other processes; return them and their store, which the first one keeps."""
    timeout = timedelta(seconds=start_seconds)
    if not identity.is_first:
        met = call_first(identity, start_seconds)
        place = met.host, met.store_port
        return met, TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timeout)
    with listen(identity.rendezvous) as server:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        return receive_others(server, identity, store.port, start_seconds), store


def _join(identity: TaskIdentity, store: TCPStore, wait_minutes: float) -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        # orders and flags are tensors of the CPU, gradients are the GPU's
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(identity.local_rank % torch.cuda.device_count())
    dist.init_process_group(
        backend,
        store=store,
        rank=identity.rank,
        world_size=identity.num_processes,
        timeout=timedelta(minutes=wait_minutes),
    )


def _is_loss(error: RuntimeError) -> bool:
    """Return whether an error means that another process ended; gloo has no error type for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
