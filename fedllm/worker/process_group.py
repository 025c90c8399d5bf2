"""The processes of a worker: what the first claims reaches all, and all of them stop together."""

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

# how long the others may take to start; then how long they wait for what the first one claims
_MEETING = timedelta(minutes=10)
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True, kw_only=True)
class Order:
    """A group of clients that the first process trains next, with all the others.

    Attributes:
        attempt: the folder of the attempt, and its number.
        clients: the group.
        steps: how many optimizer steps of each are taken; its checkpoint has them.
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
    """The processes of one task, as each of them sees them."""

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return which flags are up in any process; all call this together."""

    def tell(self, order: Order) -> None:
        """Have the others train a group too; the first process calls it."""

    def dismiss(self, exit_code: int) -> None:
        """Have the others end with an exit code; the first process calls it."""

    def hear(self) -> Order | int:
        """Wait for the first process; return what to train, or the exit code to end with."""


class OneProcess:
    """A task that is a single process."""

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return the flags."""
        return list(flags)

    def tell(self, order: Order) -> None:
        """There is nobody to tell."""

    def dismiss(self, exit_code: int) -> None:
        """There is nobody to dismiss."""

    def hear(self) -> Order | int:
        """Nobody waits: the only process is the first one."""
        raise AssertionError("a single process is the first one")


class SeveralProcesses:
    """Processes that have met in the default group of `torch.distributed`."""

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return which flags are up in any process."""
        found = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in found.tolist()]

    def tell(self, order: Order) -> None:
        """Send an order to the others."""
        self._send(asdict(order))

    def dismiss(self, exit_code: int) -> None:
        """Send an exit code to the others."""
        self._send(exit_code)

    def hear(self) -> Order | int:
        """Receive what the first process sends next."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, 0)
        content = torch.empty(int(size.item()), dtype=torch.uint8)
        dist.broadcast(content, 0)
        found = json.loads(bytes(content.tolist()))
        if isinstance(found, int):
            return found
        lists = {name: tuple(found[name]) for name in ("clients", "steps")}
        return Order(**{**found, **lists})

    def _send(self, message: object) -> None:
        content = torch.tensor(list(json.dumps(message).encode()), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(content)]), 0)
        dist.broadcast(content, 0)


@contextmanager
def meeting(identity: TaskIdentity) -> Iterator[Processes]:
    """Meet the other processes of a task, and part from them at the end.

    Raises:
        ProcessLost: another process did not come, or ended before this one.
    """
    if identity.num_processes == 1:
        yield OneProcess()
        return
    try:
        _meet(identity)
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


def _meet(identity: TaskIdentity) -> None:
    host, _, port = identity.rendezvous.rpartition(":")
    store = TCPStore(
        host, int(port), identity.num_processes, is_master=identity.is_first, timeout=_MEETING
    )
    dist.init_process_group(
        "gloo",
        store=store,
        rank=identity.rank,
        world_size=identity.num_processes,
        timeout=_PATIENCE,
    )


def _is_loss(error: RuntimeError) -> bool:
    """Say whether an error means that another process is gone; gloo has no type of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
