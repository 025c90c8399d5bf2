"""Processes of one worker: the first sends its orders to the others, and all stop together."""

import json
from collections.abc import Iterator, Sequence
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

# time for all processes to start; then time to wait for the first one's next order
_START_TIMEOUT = timedelta(minutes=10)
_ORDER_TIMEOUT = timedelta(days=30)


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
    """Processes that are connected as the default group of `torch.distributed`."""

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return which flags are set in any process."""
        combined = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(combined, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in combined.tolist()]

    def send_order(self, order: Order) -> None:
        """Send an order to the other processes."""
        self._send(asdict(order))

    def dismiss(self, exit_code: int) -> None:
        """Send an exit code to the other processes."""
        self._send(exit_code)

    def receive(self) -> Order | int:
        """Receive the next order or the exit code from the first process."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, 0)
        content = torch.empty(int(size.item()), dtype=torch.uint8)
        dist.broadcast(content, 0)
        message = json.loads(bytes(content.tolist()))
        if isinstance(message, int):
            return message
        tuples = {name: tuple(message[name]) for name in ("clients", "steps")}
        return Order(**{**message, **tuples})

    def _send(self, message: object) -> None:
        content = torch.tensor(list(json.dumps(message).encode()), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(content)]), 0)
        dist.broadcast(content, 0)


@contextmanager
def connected(identity: TaskIdentity) -> Iterator[Processes]:
    """Connect the processes of a task, and disconnect them at the end.

    Raises:
        ProcessLost: another process did not start in time, or ended before this one.
    """
    if identity.num_processes == 1:
        yield OneProcess()
        return
    try:
        _connect(identity)
        yield SeveralProcesses()
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise ProcessLost(
            f"{identity.task}: process {identity.rank} of {identity.num_processes} lost another "
            f"one, whose log says why ({str(error).splitlines()[0]})"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _connect(identity: TaskIdentity) -> None:
    host, _, port = identity.rendezvous.rpartition(":")
    store = TCPStore(
        host, int(port), identity.num_processes, is_master=identity.is_first, timeout=_START_TIMEOUT
    )
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
        timeout=_ORDER_TIMEOUT,
    )


def _is_loss(error: RuntimeError) -> bool:
    """Return whether an error means that another process ended; gloo has no error type for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
