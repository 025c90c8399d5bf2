"""Publication of finished clients: files of the round, written while the next clients train."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch import Tensor

from fedllm.lora.factors import Adapter, adapter_bytes
from fedllm.storage.records import SentFactors, UpdateRecord
from fedllm.storage.tensors import publish_update
from fedllm.storage.update_reader import UpdateReader
from fedllm.storage.updates import Origin, read_update
from fedllm.worker.client_training import ClientRound, Trained


class Publisher:
    """A publisher that holds finished clients and writes them together, in a thread of its own.

    Args:
        opened: the round.
        attempt: the number of the attempt.
    """

    def __init__(self, opened: ClientRound, attempt: int) -> None:
        self._round, self._attempt = opened, attempt
        self._held: list[Trained] = []
        self._finished: list[str] = []
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    @property
    def is_full(self) -> bool:
        """Whether the held clients take so much memory that they should be published now."""
        held = sum(adapter_bytes(trained.adapter) for trained in self._held)
        return held >= self._round.session.held_bytes

    def hold(self, trained: Trained) -> None:
        """Keep a finished client until the next publication."""
        self._held.append(trained)
        self.discard_later(trained.record.client)

    def discard_later(self, client: str) -> None:
        """Remove a client's checkpoint after the next publication.

        If the worker dies before that, the group resumes from the checkpoints of all its members.
        """
        self._finished.append(client)

    def publish(self, bundle: int) -> None:
        """Begin to write the held clients as the next part of a bundle."""
        if not self._held:
            return
        self.wait()
        part = 0
        while (path := self._part_path(bundle, part)).exists():
            part += 1
        self._written = self._writer.submit(self._write, path, self._held, self._finished)
        self._held, self._finished = [], []

    def wait(self) -> None:
        """Wait for the file that is being written, and raise its error if it has one."""
        if self._written is not None:
            written, self._written = self._written, None
            written.result()

    def close(self) -> None:
        """Wait for the file that is being written, and end the thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _part_path(self, bundle: int, part: int) -> Path:
        return self._round.paths.update(attempt=self._attempt, bundle=bundle, part=part)

    def _write(self, path: Path, clients: Sequence[Trained], finished: Sequence[str]) -> None:
        for trained in clients:
            if trained.kept is not None:
                # before the update: whoever is published has kept what it keeps
                number = self._round.cohort.round
                self._round.store.publish(trained.record.client, number, trained.kept)
        write_clients(path, clients, self._round.cohort.sent, self._round.sign)
        for client in finished:
            # written by this start of the task, by an earlier one, or by another task
            self._round.discard_checkpoint(client)


def published_clients(opened: ClientRound) -> UpdateReader[UpdateRecord]:
    """Return the reader of a round's published clients, which need no training."""

    def read(path: Path) -> list[UpdateRecord]:
        # what the coordinator will refuse saves no training
        return [u.record for u in read_update(path) if opened.keys.problem(u) is None]

    return UpdateReader(opened.paths, Origin.of(opened.run, opened.cohort), read)


def write_clients(
    path: Path,
    clients: Sequence[Trained],
    sent: SentFactors,
    sign: Callable[[Sequence[str], str], str] | None = None,
) -> None:
    """Publish finished clients as one file, with the factors that are `sent`.

    `sign` returns the signatures of clients on the file's checksum.
    """
    names = [client.record.client for client in clients]
    publish_update(
        path,
        [client.record for client in clients],
        {client.record.client: _factor_pairs(client.adapter) for client in clients},
        sent,
        partial(sign, names) if sign else None,
    )


def _factor_pairs(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    return {module: (factors.a_RI, factors.b_OR) for module, factors in adapter.items()}
