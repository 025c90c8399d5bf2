"""What a worker finished becomes files of the round, written while the next clients train."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from fedllm.lora.factors import Adapter, adapter_bytes
from fedllm.storage.records import UpdateRecord
from fedllm.storage.tensors import publish_update
from fedllm.storage.update_reader import UpdateReader
from fedllm.storage.updates import Origin, read_records
from fedllm.worker.client_training import ClientRound, Trained


class Publisher:
    """Holds finished clients and publishes them together; one thread writes.

    Args:
        opened: the round.
        attempt: the number of the attempt.
    """

    def __init__(self, opened: ClientRound, attempt: int) -> None:
        self._round, self._attempt = opened, attempt
        self._held: list[Trained] = []
        self._over: list[str] = []
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    @property
    def is_full(self) -> bool:
        """Whether what is held takes so much memory that it should be published now."""
        held = sum(adapter_bytes(trained.adapter) for trained in self._held)
        return held >= self._round.session.held_bytes

    def hold(self, trained: Trained) -> None:
        """Keep a finished client until the next publication."""
        self._held.append(trained)
        self.discard_later(trained.record.client)

    def discard_later(self, client: str) -> None:
        """Remove a client's checkpoint once what is held is published.

        Where that is lost before, its group goes on from the checkpoints of all its members.
        """
        self._over.append(client)

    def publish(self, bundle: int) -> None:
        """Begin to write what is held, as the next part of a bundle."""
        if not self._held:
            return
        self.wait()
        part = 0
        while (path := self._part(bundle, part)).exists():
            part += 1
        self._written = self._writer.submit(self._write, path, self._held, self._over)
        self._held, self._over = [], []

    def wait(self) -> None:
        """Wait for what is being written, and raise what went wrong."""
        if self._written is not None:
            written, self._written = self._written, None
            written.result()

    def close(self) -> None:
        """Return when everything that was to be published is."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _part(self, bundle: int, part: int) -> Path:
        return self._round.paths.update(attempt=self._attempt, bundle=bundle, part=part)

    def _write(self, path: Path, clients: Sequence[Trained], over: Sequence[str]) -> None:
        write_clients(path, clients)
        for client in over:
            # of this start of the task, of an earlier one, or of another's
            self._round.discard_checkpoint(client)


def published_clients(opened: ClientRound) -> UpdateReader[UpdateRecord]:
    """Return the reader of a round's published clients, who need no training."""
    return UpdateReader(opened.paths, Origin.of(opened.run_id, opened.cohort), read_records)


def write_clients(path: Path, clients: Sequence[Trained]) -> None:
    """Publish finished clients as one file."""
    publish_update(
        path,
        [client.record for client in clients],
        {client.record.client: _pairs(client.adapter) for client in clients},
    )


def _pairs(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    return {module: (factors.a_RI, factors.b_OR) for module, factors in adapter.items()}
