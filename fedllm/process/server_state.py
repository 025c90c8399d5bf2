"""The server state of a round, checked against its record."""

from fedllm.errors import RunDirectoryError
from fedllm.storage.fingerprints import sha256_of
from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import AggregateRecord
from fedllm.storage.tensors import TensorFile


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
