"""A round as it is before its updates arrive, made without a model, data or training."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedllm.config.loading import dump_config
from fedllm.config.models import Config
from fedllm.planning.federation import plan_federation
from fedllm.server.aggregate import aggregate_round
from fedllm.storage.frozen_config import new_run_record
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import (
    ClientRecord,
    CohortClient,
    CohortRecord,
    ModuleRecord,
    PreparedRecord,
    UpdateRecord,
)

_RUN, _BASE, _DATA = "run", "base", "data"


def begin_round(
    run: RunPaths, config: Config, modules: Mapping[str, ModuleRecord], clients: Sequence[str]
) -> CohortRecord:
    """Make a run with its state before training, and draw the cohort of round 1."""
    publish_bytes(run.config, dump_config(config).encode())
    new_run_record(config, run_id=_RUN, versions={}).publish(run.run)
    prepared = PreparedRecord(
        model_fingerprint=_BASE,
        model_path="nowhere",
        data_fingerprint=_DATA,
        data_path="nowhere",
        model_parameters=1,
        modules=dict(modules),
        clients=[
            ClientRecord(id=client, category="", train_rows=10 + number, test_rows=0)
            for number, client in enumerate(clients)
        ],
    )
    prepared.publish(run.prepared)
    state = aggregate_round(run.round(0))
    federation = plan_federation(config, prepared)
    cohort = CohortRecord(
        round=1,
        lease=1,
        base_fingerprint=_BASE,
        data_fingerprint=_DATA,
        state_sha256=state.sha256,
        ranks={tier: dict(each) for tier, each in federation.ranks.items()},
        clients=federation.cohort(1),
    )
    cohort.publish(run.round(1).cohort)
    return cohort


def update_of(
    client: CohortClient,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    rows: int,
    scale: float,
) -> UpdateRecord:
    """Return the record of an update of round 1."""
    return UpdateRecord(
        run_id=_RUN,
        round=1,
        client=client.id,
        attempt=1,
        bundle=0,
        base_fingerprint=_BASE,
        rows=rows,
        steps=1,
        tokens=1,
        loss_tokens=1,
        losses=[1.0],
        seconds=0.0,
        step_seconds=0.0,
        peak_memory_bytes=0,
        scales=dict.fromkeys(factors, scale),
        norms={
            name: (float(a.double().norm()), float(b.double().norm()))
            for name, (a, b) in factors.items()
        },
    )
