"""The store of what clients keep between their rounds: it lies in the run directory.

A client writes before its update is published, and reads what it wrote in the last round before
the present one. So a client that trains a round again begins from the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedllm.errors import RunDirectoryError
from fedllm.methods.protocol import ModuleState, StateNotes
from fedllm.storage.checked import DamagedUpdateError
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import KeptRecord, RunRecord
from fedllm.storage.tensors import publish_kept, read_kept


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a client keeps: tensors by module and name, and what JSON holds."""

    tensors: Mapping[str, ModuleState] = field(default_factory=dict)
    notes: StateNotes = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ClientStore:
    """The store of a run."""

    paths: RunPaths
    run: RunRecord

    def read(self, client: str, before: int) -> Kept:
        """Return what a client kept of its last round before `before`; nothing at first.

        Raises:
            RunDirectoryError: it is damaged, or of another run.
        """
        files = [
            (number, path)
            for of_client in self.paths.client_store_files(client).values()
            for number, path in of_client.items()
            if number < before
        ]
        if not files:
            return Kept()
        _, path = max(files)
        try:
            record, tensors = read_kept(path)
        except (DamagedUpdateError, OSError) as error:
            raise RunDirectoryError(
                f"{path}: cannot be read ({error}); restore it: client {client} trains on with it"
            ) from error
        is_own = record.run_id in (self.run.run_id, *self.run.earlier_ids)
        if not is_own or record.client != client:
            raise RunDirectoryError(f"{path}: of another run or client; restore that of {client}")
        kept: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            module, _, part = name.rpartition("|")
            kept.setdefault(module, {})[part] = tensor
        return Kept(tensors=kept, notes=record.notes)

    def publish(self, client: str, round_number: int, kept: Kept) -> None:
        """Write what a client keeps of a round."""
        named = {
            f"{module}|{part}": tensor
            for module, parts in kept.tensors.items()
            for part, tensor in parts.items()
        }
        path = self.paths.client_store(client, round_number)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = KeptRecord(
            run_id=self.run.run_id, client=client, round=round_number, notes=dict(kept.notes)
        )
        publish_kept(path, record, named)
