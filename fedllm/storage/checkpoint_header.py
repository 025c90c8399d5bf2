"""Header of a checkpoint: the identity and the progress of a client's training. No torch here."""

from pydantic import AliasChoices, Field

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
