"""A record of a client's update."""

from fedllm.storage.records import UpdateRecord

RANKS = {"layers.0.q_proj": 2, "layers.0.up_proj": 3}


def record_of(client: str, **changes: object) -> UpdateRecord:
    record = UpdateRecord(
        run_id="run",
        round=3,
        client=client,
        attempt=1,
        bundle=0,
        base_fingerprint="base",
        rows=7,
        steps=2,
        tokens=20,
        loss_tokens=10,
        losses=[1.5, 1.25],
        seconds=0.5,
        step_seconds=0.25,
        peak_memory_bytes=1,
        norms=dict.fromkeys(RANKS, (1.0, 2.0)),
        scales=dict.fromkeys(RANKS, 2.0),
    )
    return UpdateRecord.model_validate({**record.model_dump(), **changes})
