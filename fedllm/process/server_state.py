"""The server state of a round, checked against its record."""

import json

from fedllm.errors import RunDirectoryError
from fedllm.methods.protocol import StateNotes
from fedllm.storage.fingerprints import sha256_of
from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import AggregateRecord
from fedllm.storage.tensors import TensorFile

_NOTES = "notes"  # in the metadata


def read_state(paths: RoundPaths) -> TensorFile:
    """Open a round's server state.

    Raises:
        RunDirectoryError: it is missing (pruned, or the round is not done) or damaged.
    """
    record = AggregateRecord.find(paths.aggregate_record)
    if record is None:
        raise RunDirectoryError(f"{paths.root}: the round has no server state yet; resume the run")
    if not paths.global_state.exists():
        raise RunDirectoryError(
            f"{paths.global_state}: pruned (storage.keep_states, storage.keep_every); "
            "take another --round"
        )
    if sha256_of(paths.global_state) != record.sha256:
        raise RunDirectoryError(
            f"{paths.global_state}: damaged, not the file that aggregate.json describes; "
            "`fedllm resume` makes the newest one again"
        )
    return TensorFile(paths.global_state)


def metadata_of_state(method: str, notes: StateNotes) -> dict[str, str]:
    """Return the metadata of a state file: the method's name, and the JSON part if there is any."""
    if not notes:
        return {"method": method}
    text = json.dumps(notes, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {"method": method, _NOTES: text}


def notes_of(state: TensorFile) -> StateNotes:
    """Return the JSON part of a server state."""
    notes: StateNotes = json.loads(state.metadata.get(_NOTES, "{}"))
    return notes
