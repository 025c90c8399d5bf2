"""Watch over the processes of a task: which one ended first, or does not answer.

Every process keeps a connection to the first one. The kernel closes it when a process ends, however
it ends, so that the first end is known at once and in one place, which tells the others. A process
that ends in order says so before. A process whose wait for the others took too long says that too:
who does not say it is the one that the others wait for.
"""

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from fedllm.errors import ProcessLost
from fedllm.process.log import say
from fedllm.scheduling.environment import TaskIdentity
from fedllm.worker.meeting import Met, processes_text

_GOODBYE, _LATE, _LOST = b"goodbye", b"late", b"lost"
_LOOK_SECONDS = 0.25
# processes whose waits began together give up together, apart from what they did before
_LATE_SECONDS = 5.0
# time for this process to end by itself once another one is lost
_END_SECONDS = 30.0
_FAILED = 1


class Watch:
    """A thread that watches the connections of this process.

    Args:
        identity: this process.
        met: its connections.
        tell: called at once with the loss of another process, from the thread.
    """

    def __init__(
        self, identity: TaskIdentity, met: Met, tell: Callable[[ProcessLost], None]
    ) -> None:
        self._identity, self._met, self._tell = identity, met, tell
        self._loss: ProcessLost | None = None
        self._known, self._closed = threading.Event(), threading.Event()
        self._heard = dict.fromkeys(met.connections, b"")
        self._late: set[int] = set()
        self._late_since: float | None = None
        self._selector = selectors.DefaultSelector()
        for rank, connection in met.connections.items():
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, rank)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def explain(self, *, timed_out: bool) -> ProcessLost | None:
        """Return which process was lost, once it is known; None: nobody knows.

        Args:
            timed_out: whether this process gave up to wait for the others.
        """
        if timed_out:
            self._note_late(self._identity.rank)
            self._send(_LATE)
        # the others wait longer than the first one, which knows more
        factor = 2 if self._identity.is_first else 4
        self._known.wait(factor * _LATE_SECONDS)
        if self._loss is None and timed_out and not self._identity.is_first:
            self._lose_ranks([0], "does not answer")
        return self._loss

    def close(self, *, in_order: bool) -> None:
        """Stop to watch; `in_order`: the others need not care that this process ends."""
        if in_order:
            self._send(_GOODBYE)
        self._closed.set()
        self._thread.join()
        self._selector.close()
        for connection in self._met.connections.values():
            connection.close()

    def _watch(self) -> None:
        while not self._closed.is_set():
            for key, _ in self._selector.select(_LOOK_SECONDS):
                self._read(key.data, key.fileobj)  # type: ignore[arg-type]
            if self._late_since and time.monotonic() - self._late_since > _LATE_SECONDS:
                self._late_since = None
                waited_for = set(range(self._identity.num_processes)) - self._late
                if self._identity.is_first and waited_for:
                    self._lose_ranks(sorted(waited_for), "kept the others waiting")
            if self._loss is not None:
                self._end()
                return

    def _read(self, rank: int, connection: socket.socket) -> None:
        said = b""
        with suppress(OSError):
            said = connection.recv(8192)
        self._heard[rank] += said
        *lines, self._heard[rank] = self._heard[rank].split(b"\n")
        for line in lines:
            word, _, rest = line.partition(b" ")
            if word == _LATE:
                self._note_late(rank)
            elif word == _LOST:
                log, _, message = rest.decode().partition("\t")
                self._lose(message, log)
        if not said or _GOODBYE in lines:
            self._selector.unregister(connection)
        if not said:
            self._lose_ranks([rank], "ended first")

    def _note_late(self, rank: int) -> None:
        self._late.add(rank)
        self._late_since = self._late_since or time.monotonic()

    def _lose_ranks(self, ranks: list[int], what: str) -> None:
        names = processes_text(ranks, self._identity.num_processes)
        self._lose(f"{self._identity.task}: {names} {what}", self._met.logs.get(ranks[0], ""))

    def _lose(self, message: str, log: str) -> None:
        """Note the first loss and tell everybody."""
        if self._loss is not None:
            return
        self._loss = ProcessLost(message, log=log)
        if self._identity.is_first:
            self._send(_LOST, f"{log}\t{message}")
        self._tell(self._loss)
        self._known.set()

    def _end(self) -> None:
        """End this process if it does not end by itself: the others wait for it."""
        if not self._closed.wait(_END_SECONDS):
            say(f"{self._loss}; this process did not end by itself")
            os._exit(_FAILED)

    def _send(self, word: bytes, rest: str = "") -> None:
        line = b" ".join(filter(None, [word, rest.encode()])) + b"\n"
        for connection in self._met.connections.values():
            with suppress(OSError):
                connection.sendall(line)
