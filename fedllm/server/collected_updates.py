"""Updates of a frozen collection, as the aggregation reads them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from fedllm.errors import BadUpdate
from fedllm.lora.factors import Factors
from fedllm.process.late_files import read_late_file
from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import CohortRecord, CollectedUpdate, CollectionRecord
from fedllm.storage.tensors import UpdateFile

# norms are taken before tensors are rounded to the format in which they are sent
_NORM_TOLERANCE = 0.01


def _nothing(_client: int, module: str) -> Factors:
    raise AssertionError(f"{module}: a factor was not sent, and nobody says what was received")


@dataclass(frozen=True, kw_only=True)
class CollectedUpdates:
    """The updates of a collection and their weights, by the clients' places in the cohort.

    `received` returns the adapter with which a client began, by its place and the module.
    """

    updates: Mapping[int, CollectedUpdate]
    weights: Mapping[int, float]
    files: Mapping[str, UpdateFile]
    received: Callable[[int, str], Factors] = _nothing

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
        """Return A (R, I) and B (O, R) as they lie in the file.

        A factor that the client did not send is the one that it received.
        """
        update, file = self._locate(client)
        found = {
            part: file.view(update.client, module, part)
            for part in "AB"
            if file.has(update.client, module, part)
        }
        if len(found) < len("AB"):
            received = self.received(client, module)
            found = {"A": received.a_RI, "B": received.b_OR, **found}
        return found["A"], found["B"]

    def check(self, client: int, module: str, part: str, values: Tensor) -> None:
        """Check A or B against its digest, and a copy of it against its recorded norm.

        Raises:
            AdapterError: it was altered.
            BadUpdate: the client recorded another norm than that of its tensor.
        """
        update, file = self._locate(client)
        if not file.has(update.client, module, part):
            return
        file.check(update.client, module, part)
        recorded, norm = file.norm(update.client, module, part), _norm(values)
        # values that are not finite are found, and told, where the block is used
        if math.isfinite(norm) and not math.isclose(norm, recorded, rel_tol=_NORM_TOLERANCE):
            name = self.name(client, module, part)
            problem = f"{name}: its norm is {norm:.6g}, but the client recorded {recorded:.6g}"
            raise BadUpdate(f"{problem}; leave it out", {client: problem})

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


def _norm(values: Tensor) -> float:
    """Return the Frobenius norm; in float64 only if float32 cannot hold its square."""
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float32))
    if 0 < norm < math.inf:
        return norm
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
