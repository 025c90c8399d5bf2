"""Heartbeat of a worker: its progress record, one for every attempt that it works on."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.paths import AttemptPaths
from fedllm.storage.records import TaskRecord

State = Literal["starting", "training", "lingering", "ended"]
_EVERY_SECONDS = 60.0


@dataclass(kw_only=True)
class Heartbeat:
    """Progress of a worker on one attempt; moments are of `time.monotonic`.

    Args:
        attempt: the attempt.
        identity: the task of the worker.
        worker_class: the class whose bundles it takes, empty for all.
        began: when its time for this attempt began to count, idle time included.
        startup_began: when it took up this attempt; later than `began` if it was idle before.
        every_seconds: how often it writes while it trains.
        earlier: the record of the task's earlier start, or of the processes that these replace.
    """

    attempt: AttemptPaths
    identity: TaskIdentity
    worker_class: str
    began: float
    startup_began: float
    every_seconds: float = _EVERY_SECONDS
    earlier: TaskRecord | None = None
    _goes_on: bool = False  # in the start of the task of which `earlier` tells
    _clients_done: int = 0
    _clients: list[str] = field(default_factory=list)
    _step: int = 0
    _startup_seconds: float | None = None
    _busy_seconds: float = 0.0
    _busy_since: float | None = None
    _written_at: float = field(default_factory=time.monotonic)

    @classmethod
    def open(
        cls,
        attempt: AttemptPaths,
        identity: TaskIdentity,
        worker_class: str,
        *,
        began: float,
        first: float,
    ) -> "Heartbeat":
        """Open the record of a task, and continue that of an earlier start if there is one.

        `first` is when the task began its first attempt: a task that was idle took this one up now.
        """
        opened = cls(
            attempt=attempt,
            identity=identity,
            worker_class=worker_class,
            began=began,
            startup_began=began if began == first else time.monotonic(),
            earlier=TaskRecord.glance(attempt.task(identity.task)),
        )
        if opened.earlier is not None and identity.renewed_at is not None:
            opened._go_on(opened.earlier, identity.renewed_at)
        return opened

    def _go_on(self, earlier: TaskRecord, since: float) -> None:
        """Go on with a record of this start of the task, whose processes new ones replaced."""
        self.began = since - earlier.allocated_seconds
        self._startup_seconds = earlier.startup_seconds
        self._busy_seconds = earlier.busy_seconds
        self._goes_on = True

    @contextmanager
    def clients(self, names: Sequence[str], count: int) -> Iterator[None]:
        """Count the time of this block as training, and `count` clients as done at its end."""
        self._clients, self._step = list(names), 0
        self._busy_since = time.monotonic()
        if self._startup_seconds is None:
            self._startup_seconds = self._busy_since - self.startup_began
        try:
            yield
            self._clients_done += count
        finally:
            self._busy_seconds, self._busy_since = self._busy_now(), None

    def step(self, number: int) -> None:
        """Note a step, and write the record if the last one is `every_seconds` old."""
        self._step = number
        if time.monotonic() - self._written_at >= self.every_seconds:
            self.write("training")

    def write(self, state: State) -> None:
        """Publish the record; every record differs from the one before, if only in its seconds."""
        now = self._written_at = time.monotonic()
        before, is_start = self.earlier, not self._goes_on
        clients = self._clients if state == "training" else []
        startup = (
            now - self.startup_began if self._startup_seconds is None else self._startup_seconds
        )
        TaskRecord(
            task=self.identity.task,
            node=self.identity.node,
            clients_done=self._clients_done + (before.clients_done if before else 0),
            client=clients[0] if clients else None,
            clients=clients,
            step=self._step,
            state=state,
            worker_class=self.worker_class,
            startup_seconds=round(startup, 3),
            busy_seconds=round(self._busy_now(), 3),
            allocated_seconds=round(now - self.began, 3),
            starts=(before.starts if before else 0) + is_start,
            earlier_busy_seconds=_seconds_before(before, "busy_seconds", with_own=is_start),
            earlier_allocated_seconds=_seconds_before(
                before, "allocated_seconds", with_own=is_start
            ),
        ).publish(self.attempt.task(self.identity.task))

    def _busy_now(self) -> float:
        running = 0.0 if self._busy_since is None else time.monotonic() - self._busy_since
        return self._busy_seconds + running


def _seconds_before(record: TaskRecord | None, name: str, *, with_own: bool) -> float:
    """Return the seconds of all starts of the task before that of `record`, or up to it."""
    if record is None:
        return 0.0
    own: float = getattr(record, name) if with_own else 0.0
    earlier: float = getattr(record, f"earlier_{name}")
    return round(own + earlier, 3)
