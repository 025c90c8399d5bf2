"""Replay of a client: train it again outside its round, and compare it with its record."""

from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import Incomplete
from fedllm.planning.engines import engine_of
from fedllm.process.session import Session
from fedllm.storage.paths import AttemptPaths, encode_client
from fedllm.storage.records import SubmissionRecord, UpdateRecord
from fedllm.storage.updates import Origin, UpdateScanner
from fedllm.worker.client_training import ClientRound, Save
from fedllm.worker.publisher import write_clients
from fedllm.worker.task import WorkerTask


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A client trained again, beside the record of its round (None: it is not published)."""

    record: UpdateRecord
    recorded: UpdateRecord | None
    file: Path

    @property
    def agrees(self) -> bool:
        """Whether the losses equal the recorded ones, or none are recorded."""
        return self.recorded is None or self.recorded.losses == self.record.losses

    def lines(self) -> list[str]:
        """Return a line per step, then how the losses compare with the recorded ones."""
        lines = [f"step {n} loss {loss:.6f}" for n, loss in enumerate(self.record.losses, 1)]
        if self.record.status == "failed":
            lines.append(f"failed: {self.record.reason}")
        lines.append(f"update in {self.file}")
        if self.recorded is None:
            return [*lines, "no published update to compare with"]
        if self.agrees:
            return [*lines, "the losses equal the recorded ones"]
        was, now = self.recorded.environment, self.record.environment
        changed = [
            f"{key}: {was.get(key)} then, {now[key]} now" for key in now if was.get(key) != now[key]
        ]
        recorded = " ".join(f"{loss:.6f}" for loss in self.recorded.losses)
        return [*lines, f"the recorded losses differ: {recorded}", *changed]


def processes_of(attempt: AttemptPaths, client: str, session: Session) -> int:
    """Return the number of processes that train a client.

    Raises:
        UserError: the client is not in the attempt's round.
    """
    opened = ClientRound.open(attempt, session)
    return engine_of(opened.training_of(client)).processes


def replay(task: WorkerTask, attempt: AttemptPaths, client: str, scratch: Path) -> Replay:
    """Train a client again, with its group; write its update to `scratch` and compare its losses.

    The first process of a task calls this, and the others `follow`.

    Raises:
        Incomplete: a signal came.
        UserError: the client is not in the attempt's round.
        RunDirectoryError: the state it started from is gone or damaged.
    """
    opened = ClientRound.open(attempt, task.session)
    submission = SubmissionRecord.read(attempt.submission)
    bundles = [bundle.number for bundle in submission.bundles if client in bundle.clients]

    def before_step(step: int, save: Save) -> None:
        del save
        stop, _ = task.agree(due=False)
        if stop:
            raise Incomplete(f"client {client}: stopped by {task.signals.name} before step {step}")

    results = opened.train(
        opened.group_of(client),
        attempt=attempt.number,
        bundle=bundles[0] if bundles else 0,
        identity=task.identity,
        processes=task.processes,
        before_step=before_step,
        resume=False,
    )
    (trained,) = (result for result in results if result.record.client == client)
    file = scratch / f"{encode_client(client)}.safetensors"
    write_clients(file, [trained], opened.cohort.sent)
    scanner = UpdateScanner(
        round=opened.paths,
        origin=Origin.of(opened.run, opened.cohort),
    )
    published = scanner.scan().published.get(client)
    return Replay(
        record=trained.record, recorded=published.record if published else None, file=file
    )
