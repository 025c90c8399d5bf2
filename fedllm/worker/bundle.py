"""The groups of a bundle trained one after the other, saved and published on the way.

A group is the clients that train together, a single one by default.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from fedllm.model.memory import give_back_freed
from fedllm.process.log import say
from fedllm.storage.paths import AttemptPaths
from fedllm.storage.records import BundleRecord, UpdateRecord
from fedllm.storage.update_reader import UpdateReader
from fedllm.worker.claims import Claimed
from fedllm.worker.client_training import ClientRound, Save
from fedllm.worker.heartbeat import Heartbeat
from fedllm.worker.publisher import Publisher, published_clients
from fedllm.worker.task import WorkerTask


class StopRequested(Exception):
    """A signal came while clients were in training; their checkpoints are written."""


@dataclass(kw_only=True)
class BundleTraining:
    """What trains the bundles of one attempt in one task."""

    task: WorkerTask
    attempt: AttemptPaths
    round: ClientRound
    heartbeat: Heartbeat
    publisher: Publisher
    published: UpdateReader[UpdateRecord]
    _saved_at: float = field(default_factory=time.monotonic)

    @classmethod
    def open(
        cls, task: WorkerTask, attempt: AttemptPaths, heartbeat: Heartbeat
    ) -> "BundleTraining":
        """Load all that clients train from: the first of them is not to wait for it.

        Raises:
            RunDirectoryError: a record or the server state is missing or damaged.
        """
        opened = open_round(task, attempt)
        # a signal that came meanwhile leaves nothing to load for
        if not task.signals.came:
            _ = opened.trainer
        return cls(
            task=task,
            attempt=attempt,
            round=opened,
            heartbeat=heartbeat,
            publisher=Publisher(opened, attempt.number),
            published=published_clients(opened),
        )

    def train(self, claimed: Claimed) -> bool:
        """Train what is not yet published of a bundle; publish what was finished in any case.

        Returns:
            Whether the bundle is through; False: a signal came first.
        """
        bundle, published = claimed.bundle, self._published(claimed)
        try:
            for group in dict.fromkeys(map(self.round.group_of, bundle.clients)):
                missing = [c for c in group if c in bundle.clients and c not in published]
                if not missing:
                    continue
                if self.task.signals.came:
                    return False
                if is_over(self.attempt):
                    break
                self._train(group, missing, bundle)
                if self.publisher.is_full:
                    self._write_out(bundle)
        except StopRequested:
            return False
        finally:
            self.publisher.publish(bundle.number)
        return True

    def close(self) -> None:
        """Return when everything that was to be published is."""
        self.publisher.close()

    def _train(self, group: Sequence[str], missing: Collection[str], bundle: BundleRecord) -> None:
        """Train a group, whole, and hold the updates of those that miss one."""
        first: int | None = None

        def before_step(step: int, save: Save) -> None:
            nonlocal first
            first = step if first is None else first
            self.task.stepped |= step > first
            self.heartbeat.step(step)
            stop, due = self.task.agree(due=self._is_due())
            if stop or due:
                self._save(bundle, save)
            if stop:
                raise StopRequested

        with self.heartbeat.clients(group, len(missing)):
            results = self.round.train(
                group,
                attempt=self.attempt.number,
                bundle=bundle.number,
                identity=self.task.identity,
                processes=self.task.processes,
                before_step=before_step,
            )
        self.task.stepped = True
        for trained in results:
            if trained.record.client in missing:
                say(_told(trained.record))
                self.publisher.hold(trained)
            else:
                self.publisher.discard_later(trained.record.client)
        if self._is_due():
            self.publisher.publish(bundle.number)
            self._saved_at = time.monotonic()

    def _write_out(self, bundle: BundleRecord) -> None:
        """Publish what is held and free its memory, before the next client needs as much."""
        self.publisher.publish(bundle.number)
        self.publisher.wait()
        give_back_freed()
        self._saved_at = time.monotonic()

    def _is_due(self) -> bool:
        minutes = self.round.config.training.checkpoint_every_minutes
        return time.monotonic() - self._saved_at >= 60.0 * minutes

    def _save(self, bundle: BundleRecord, save: Save) -> None:
        """Publish finished clients, and write the state of those in training meanwhile."""
        self.publisher.publish(bundle.number)
        save()
        self._saved_at = time.monotonic()

    def _published(self, claimed: Claimed) -> set[str]:
        """Return the clients that need no training.

        A bundle that was just claimed in the first attempt was never anybody's.
        """
        if self.attempt.number == 1 and not claimed.begun_before:
            return set()
        return {record.client for record in self.published.look()}


def open_round(task: WorkerTask, attempt: AttemptPaths) -> ClientRound:
    """Open the round of an attempt, from copies on this node's own disk where the run has them.

    Raises:
        RunDirectoryError: a record or the server state is missing or damaged.
    """
    opened = ClientRound.open(attempt, task.session)
    folder = opened.config.storage.node_local
    if folder is not None:
        task.session.stage(folder, opened.prepared)
    return opened


def is_over(attempt: AttemptPaths) -> bool:
    """Say whether nobody waits for an attempt: its round is collected, or a later one trains."""
    paths = attempt.round
    return (
        paths.collection.exists()
        or paths.record.exists()
        or paths.attempt(attempt.number + 1).submission.exists()
    )


def _told(record: UpdateRecord) -> str:
    if record.status == "failed":
        return f"client {record.client}: failed: {record.reason}"
    losses = f", loss {record.losses[0]:.3f} -> {record.losses[-1]:.3f}" if record.losses else ""
    return (
        f"round {record.round}, client {record.client}: {record.rows} rows, {record.steps} steps"
        f"{losses}, {record.seconds:.1f} s"
    )
