"""Bundles: a task trains their groups one after the other, saves and publishes them.

A group is the clients that train together; by default it is one client.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from fedllm.errors import counted
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
    """A signal came while clients were training; their checkpoints are written."""


@dataclass(kw_only=True)
class BundleTraining:
    """The training of an attempt's bundles in one task."""

    task: WorkerTask
    attempt: AttemptPaths
    round: ClientRound
    heartbeat: Heartbeat
    publisher: Publisher
    published: UpdateReader[UpdateRecord]
    _saved_at: float = field(default_factory=time.monotonic)

    @classmethod
    def open(
        cls, task: WorkerTask, attempt: AttemptPaths, heartbeat: Heartbeat, claimed: Claimed
    ) -> "BundleTraining":
        """Open the round and load the base model, before the first claimed client needs them.

        Raises:
            RunDirectoryError: a record or the server state is missing or damaged.
        """
        opened = open_round(task, attempt)
        # after a signal no client will train: do not load the base model
        if not task.signals.came:
            opened.trainer_of(claimed.bundle.clients[0])
        return cls(
            task=task,
            attempt=attempt,
            round=opened,
            heartbeat=heartbeat,
            publisher=Publisher(opened, attempt.number),
            published=published_clients(opened),
        )

    def train(self, claimed: Claimed) -> bool:
        """Train the clients of a bundle that are not published yet, and publish the finished ones.

        The finished clients are published even where an error ends the training.

        Returns:
            True if the bundle is done; False if a signal came first, or the processes are used up.
        """
        bundle, published = claimed.bundle, self._published_clients(claimed)
        try:
            for group in dict.fromkeys(map(self.round.group_of, bundle.clients)):
                missing = [c for c in group if c in bundle.clients and c not in published]
                if not missing:
                    continue
                if self.task.signals.came or self.task.is_used_up:
                    return False
                if is_over(self.attempt):
                    break
                self._train(group, missing, bundle)
                if self.publisher.is_full:
                    self._flush(bundle)
        except StopRequested:
            return False
        finally:
            self.publisher.publish(bundle.number)
        return True

    def close(self) -> None:
        """Wait until the finished clients are published."""
        self.publisher.close()

    def _train(self, group: Sequence[str], missing: Collection[str], bundle: BundleRecord) -> None:
        """Train the whole group, and hold the updates of its missing clients."""
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
        self.task.clients_trained += len(group)
        for trained in results:
            if trained.record.client in missing:
                say(_summary(trained.record))
                self.publisher.hold(trained)
            else:
                self.publisher.discard_later(trained.record.client)
        if self._is_due():
            self.publisher.publish(bundle.number)
            self._saved_at = time.monotonic()

    def _flush(self, bundle: BundleRecord) -> None:
        """Publish the held clients and free their memory before the next client trains."""
        self.publisher.publish(bundle.number)
        self.publisher.wait()
        give_back_freed()
        self._saved_at = time.monotonic()

    def _is_due(self) -> bool:
        minutes = self.round.config.training.checkpoint_every_minutes
        return time.monotonic() - self._saved_at >= 60.0 * minutes

    def _save(self, bundle: BundleRecord, save: Save) -> None:
        """Publish finished clients; meanwhile write checkpoints of those in training."""
        self.publisher.publish(bundle.number)
        save()
        self._saved_at = time.monotonic()

    def _published_clients(self, claimed: Claimed) -> set[str]:
        """Return the published clients, which need no training.

        A bundle of the first attempt has none, unless an earlier start of this task began it.
        """
        if self.attempt.number == 1 and not claimed.begun_before:
            return set()
        return {record.client for record in self.published.look()}


def open_round(task: WorkerTask, attempt: AttemptPaths) -> ClientRound:
    """Open the round of an attempt; with `storage.node_local` from copies on this node's disk.

    Raises:
        RunDirectoryError: a record or the server state is missing or damaged.
    """
    opened = ClientRound.open(attempt, task.session)
    folder = opened.config.storage.node_local
    if folder is not None:
        task.session.stage(folder, opened.prepared)
    return opened


def is_over(attempt: AttemptPaths) -> bool:
    """Return whether an attempt is over: its round is collected, or a later attempt trains."""
    paths = attempt.round
    return (
        paths.collection.exists()
        or paths.record.exists()
        or paths.attempt(attempt.number + 1).submission.exists()
    )


def _summary(record: UpdateRecord) -> str:
    if record.status == "failed":
        return f"client {record.client}: failed: {record.reason}"
    losses = f", loss {record.losses[0]:.3f} -> {record.losses[-1]:.3f}" if record.losses else ""
    return (
        f"round {record.round}, client {record.client}: {counted(record.rows, 'row')}, "
        f"{counted(record.steps, 'step')}{losses}, {record.seconds:.1f} s"
    )
