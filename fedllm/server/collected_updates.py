"""Updates of a frozen collection, as the aggregation reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

from torch import Tensor

from fedllm.process.late_files import read_late_file
from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import CohortRecord, CollectedUpdate, CollectionRecord
from fedllm.storage.tensors import UpdateFile


@dataclass(frozen=True, kw_only=True)
class CollectedUpdates:
    """The updates of a collection and their weights, by the clients' places in the cohort."""

    updates: Mapping[int, CollectedUpdate]
    weights: Mapping[int, float]
    files: Mapping[str, UpdateFile]

    @classmethod
    def open(
        cls,
        paths: RoundPaths,
        collection: CollectionRecord,
        cohort: CohortRecord,
        weights: list[float],
        visibility_seconds: float = 0.0,
    ) -> Self:
        """Open the files of a collection, and check their headers against the frozen digests.

        A file of another node may become visible late: only after `visibility_seconds` it counts
        as missing or damaged.

        Raises:
            AdapterError: a file is missing, damaged, or not the frozen one.
        """
        files = {
            name: read_late_file(
                partial(UpdateFile, paths.updates / name, sha256), visibility_seconds
            )
            for name, sha256 in {u.file: u.sha256 for u in collection.updates}.items()
        }
        places = {client.id: place for place, client in enumerate(cohort.clients)}
        mine = [places[update.client] for update in collection.updates]
        return cls(
            updates=dict(zip(mine, collection.updates, strict=True)),
            weights=dict(zip(mine, weights, strict=True)),
            files=files,
        )

    def factors(self, client: int, module: str) -> tuple[Tensor, Tensor]:
        """Return A (R, I) and B (O, R) as they lie in the file."""
        update, file = self._locate(client)
        return file.view(update.client, module, "A"), file.view(update.client, module, "B")

    def check(self, client: int, module: str, part: str) -> None:
        """Check A or B against its digest.

        Raises:
            AdapterError: it was altered.
        """
        update, file = self._locate(client)
        file.check(update.client, module, part)

    def scale(self, client: int, module: str) -> float:
        """Return the scale that the client trained with, times the clip factor of its change.

        Clipping does not change the weight: a factor mean weighs A and B alike with it, and the
        weights sum to the total.
        """
        update, file = self._locate(client)
        return file.scale(update.client, module) * update.clipped.get(module, 1.0)

    def weight(self, client: int, module: str) -> float:
        """Return the client's weight, the same for all modules."""
        del module
        return self.weights[client]

    def name(self, client: int, module: str, part: str) -> str:
        """Return the name of A or B for messages: file, client, module and factor."""
        update, file = self._locate(client)
        return f"{file.path}: client {update.client}: {module} {part}"

    def _locate(self, client: int) -> tuple[CollectedUpdate, UpdateFile]:
        update = self.updates[client]
        return update, self.files[update.file]
