"""Header of a checkpoint: the identity and the progress of a client's training. No torch here."""

from pathlib import Path

from pydantic import AliasChoices, Field, ValidationError

from fedllm.storage.checked import DamagedUpdateError, read_checked_header
from fedllm.storage.records import Record, TrainingStats


class CheckpointIdentity(Record):
    """Identity of a client's training: only the same training may continue a checkpoint.

    `result_fingerprint` is that of the configuration, `state_sha256` that of the server state.
    `group` are the clients trained together, empty for a client trained alone.
    """

    run_id: str
    result_fingerprint: str
    round: int
    client: str
    base_fingerprint: str
    data_fingerprint: str
    state_sha256: str
    group: tuple[str, ...] = ()


class CheckpointRecord(TrainingStats):
    """A client's training before optimizer step `steps`, counted from 0; its tensors lie beside.

    `environments` are the distinct environments of the training, the latest last.
    """

    identity: CheckpointIdentity
    micro_batch_size: int
    # `step` in version 0.1
    steps: int = Field(validation_alias=AliasChoices("steps", "step"))
    resumed_at: list[int]
    environments: list[dict[str, str]]


def steps_of_checkpoint(path: Path) -> int:
    """Return the optimizer steps of a checkpoint; 0 if it is gone, or not whole.

    Its tensors stay unread.
    """
    try:
        with path.open("rb") as file:
            header = read_checked_header(file)
        return CheckpointRecord.model_validate_json(header.records).steps
    except (FileNotFoundError, DamagedUpdateError, ValidationError):
        return 0
