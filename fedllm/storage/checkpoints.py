"""What a checkpoint says of itself: whose training it is, and how far it went. No torch here."""

from fedllm.storage.records import Record


class CheckpointIdentity(Record):
    """What a client's training follows from; only the same training goes on from a checkpoint.

    `result_fingerprint` is that of the configuration, `state_sha256` that of the server state.
    `group` are the clients that are trained together, empty for one by itself.
    """

    run_id: str
    result_fingerprint: str
    round: int
    client: str
    base_fingerprint: str
    data_fingerprint: str
    state_sha256: str
    group: tuple[str, ...] = ()


class CheckpointRecord(Record):
    """A client's training before optimizer step `step`, counted from 0; its tensors lie beside.

    All but `identity`, `micro_batch_size` and `environments` is as in an update's record, so far.
    `environments` are the distinct ones that it was trained in, the latest last.
    """

    identity: CheckpointIdentity
    micro_batch_size: int
    step: int
    losses: list[float]
    tokens: int
    loss_tokens: int
    seconds: float
    step_seconds: float
    peak_memory_bytes: int
    resumed_at: list[int]
    environments: list[dict[str, str]]
