"""The training job: a worker claims bundle after bundle of an attempt and trains their clients."""

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fedllm.errors import UserError
from fedllm.lora.factors import Adapter
from fedllm.steps.client import ClientRound, Save, Trained
from fedllm.steps.identity import TaskIdentity, task_identity
from fedllm.steps.session import Session
from fedllm.steps.signals import StopSignals
from fedllm.storage.paths import AttemptPaths, encode_client
from fedllm.storage.records import (
    BundleRecord,
    ClaimRecord,
    SubmissionRecord,
    TaskRecord,
    UpdateRecord,
)
from fedllm.storage.tensors import publish_update
from fedllm.storage.updates import UpdateScanner

STOPPED = 3  # the exit code of a worker that was told to end: another attempt goes on
_PROGRESS_SECONDS = 60.0


class StopRequested(Exception):
    """A signal came while a client was in training; that client trains anew."""


def work(
    attempt: AttemptPaths, worker_class: str | None, identity: TaskIdentity, session: Session
) -> int:
    """Be a worker of an attempt until no bundle of its class is left, or a signal comes.

    Every client that was finished is published, whatever ends the worker.

    Returns:
        The exit code: 0, or `STOPPED` after a signal.

    Raises:
        FedllmError: the attempt cannot be worked on, for example a damaged server state.
    """
    opened = ClientRound.open(attempt, session)
    with (
        StopSignals() as signals,
        closing(
            Worker(attempt=attempt, round=opened, identity=identity, signals=signals)
        ) as worker,
    ):
        for bundle in worker.claimable(worker_class):
            if worker.claim(bundle):
                worker.train_bundle(bundle)
            if signals.came:
                break
    if signals.came:
        _say(f"{identity.task}: stopped by {signals.name}; finished clients are published")
        return STOPPED
    return 0


@dataclass(kw_only=True)
class Worker:
    """One task of an attempt: what it claimed, finished and has yet to publish.

    One thread writes while the next clients train: storage may be slow.
    """

    attempt: AttemptPaths
    round: ClientRound
    identity: TaskIdentity
    signals: StopSignals
    progress_seconds: float = _PROGRESS_SECONDS
    _held: list[Trained] = field(default_factory=list)
    _published_at: float = field(default_factory=time.monotonic)
    _noted_at: float = field(default_factory=time.monotonic)
    _num_done: int = 0
    _begun_before: set[int] = field(default_factory=set)
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _written: Future[None] | None = None

    def claimable(self, worker_class: str | None) -> Iterator[BundleRecord]:
        """Yield the bundles of a class, longest first."""
        submission = SubmissionRecord.read(self.attempt.submission)
        classes = {bundle.worker_class for bundle in submission.bundles}
        if worker_class is not None and worker_class not in classes:
            raise UserError(
                f"{self.attempt.submission}: no bundle of class {worker_class}; "
                f"need one of {', '.join(sorted(classes))}"
            )
        for bundle in sorted(submission.bundles, key=lambda b: (-b.cost, b.number)):
            if worker_class in {None, bundle.worker_class}:
                yield bundle

    def claim(self, bundle: BundleRecord) -> bool:
        """Take a bundle; one that this task took before it was requeued is still its own."""
        path = self.attempt.claim(bundle.number)
        mine = ClaimRecord(
            bundle=bundle.number,
            task=self.identity.task,
            node=self.identity.node,
            log=self.identity.log,
        )
        if not path.exists() and mine.publish_once(path):
            return True
        if ClaimRecord.read(path).task != self.identity.task:
            return False
        self._begun_before.add(bundle.number)
        return True

    def train_bundle(self, bundle: BundleRecord) -> None:
        """Train what is not yet published of a bundle; publish what was finished in any case."""
        published = self._published(bundle)
        try:
            for client in bundle.clients:
                if self.signals.came:
                    break
                if client not in published:
                    self._train(client, bundle)
        except StopRequested:
            pass
        finally:
            self._publish(bundle)

    def _train(self, client: str, bundle: BundleRecord) -> None:
        def before_step(step: int, _save: Save) -> None:
            if self.signals.came:
                raise StopRequested
            self._note(client, step)

        trained = self.round.train(
            client,
            attempt=self.attempt.number,
            bundle=bundle.number,
            identity=self.identity,
            before_step=before_step,
        )
        if trained.record.status == "failed":
            _say(f"client {client}: failed: {trained.record.reason}")
        else:
            _say(_told(trained.record))
        self._held.append(trained)
        self._num_done += 1
        minutes = self.round.config.training.checkpoint_every_minutes
        if time.monotonic() - self._published_at >= 60.0 * minutes:
            self._publish(bundle)

    def close(self) -> None:
        """Return when everything that was to be published is."""
        try:
            self._wait()
        finally:
            self._writer.shutdown()

    def _publish(self, bundle: BundleRecord) -> None:
        if not self._held:
            return
        self._wait()
        part = 0
        while (path := self._part(bundle, part)).exists():
            part += 1
        self._written = self._writer.submit(_write, path, self._held)
        self._held = []
        self._published_at = time.monotonic()

    def _wait(self) -> None:
        """Wait for what is being written, and raise what went wrong."""
        if self._written is not None:
            written, self._written = self._written, None
            written.result()

    def _part(self, bundle: BundleRecord, part: int) -> Path:
        return self.round.paths.update(attempt=self.attempt.number, bundle=bundle.number, part=part)

    def _published(self, bundle: BundleRecord) -> set[str]:
        """Return the clients that need no training.

        A bundle that was just claimed in the first attempt was never anybody's.
        """
        if self.attempt.number == 1 and bundle.number not in self._begun_before:
            return set()
        scanner = UpdateScanner(
            round=self.round.paths,
            run_id=self.round.run_id,
            base_fingerprint=self.round.cohort.base_fingerprint,
        )
        return set(scanner.scan().published)

    def _note(self, client: str, step: int) -> None:
        """Record progress, at most once a minute: a few small files, whatever the clients."""
        now = time.monotonic()
        if now - self._noted_at < self.progress_seconds:
            return
        self._noted_at = now
        TaskRecord(
            task=self.identity.task,
            node=self.identity.node,
            clients_done=self._num_done,
            client=client,
            step=step,
        ).publish(self.attempt.task(self.identity.task))


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A client that was trained again, and what the round recorded of it."""

    record: UpdateRecord
    recorded: UpdateRecord | None
    file: Path

    @property
    def agrees(self) -> bool:
        """Whether there is nothing that differs from the record."""
        return self.recorded is None or self.recorded.losses == self.record.losses

    def lines(self) -> list[str]:
        """Return one line per step, and how it compares."""
        lines = [f"step {n} loss {loss:.6f}" for n, loss in enumerate(self.record.losses, 1)]
        if self.record.status == "failed":
            lines.append(f"failed: {self.record.reason}")
        lines.append(f"update in {self.file}")
        if self.recorded is None:
            return [*lines, "no published update to compare with"]
        if self.agrees:
            return [*lines, "the losses are the recorded ones"]
        was, now = self.recorded.environment, self.record.environment
        changed = [
            f"{key}: {was.get(key)} then, {now[key]} now" for key in now if was.get(key) != now[key]
        ]
        recorded = " ".join(f"{loss:.6f}" for loss in self.recorded.losses)
        return [*lines, f"the recorded losses differ: {recorded}", *changed]


def replay(attempt: AttemptPaths, client: str, scratch: Path, session: Session) -> Replay:
    """Train one client of an attempt by itself, publish its update in `scratch`, and compare.

    Raises:
        UserError: the client is not in the attempt's round.
        RunDirectoryError: the state it started from is gone or damaged.
    """
    opened = ClientRound.open(attempt, session)
    submission = SubmissionRecord.read(attempt.submission)
    bundles = [bundle.number for bundle in submission.bundles if client in bundle.clients]
    trained = opened.train(
        client,
        attempt=attempt.number,
        bundle=bundles[0] if bundles else 0,
        identity=task_identity(),
    )
    file = scratch / f"{encode_client(client)}.safetensors"
    _write(file, [trained])
    scanner = UpdateScanner(
        round=opened.paths,
        run_id=opened.run_id,
        base_fingerprint=opened.cohort.base_fingerprint,
    )
    published = scanner.scan().published.get(client)
    return Replay(
        record=trained.record, recorded=published.record if published else None, file=file
    )


def _write(path: Path, clients: Sequence[Trained]) -> None:
    publish_update(
        path,
        [client.record for client in clients],
        {client.record.client: _pairs(client.adapter) for client in clients},
    )


def _pairs(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    return {module: (factors.a_RI, factors.b_OR) for module, factors in adapter.items()}


def _told(record: UpdateRecord) -> str:
    losses = f", loss {record.losses[0]:.3f} -> {record.losses[-1]:.3f}" if record.losses else ""
    return (
        f"round {record.round}, client {record.client}: {record.rows} rows, {record.steps} steps"
        f"{losses}, {record.seconds:.1f} s"
    )


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
