"""Run directories in every state, made of real records."""

from collections.abc import Sequence
from pathlib import Path

from fedllm.config.loading import dump_config
from fedllm.storage.frozen_config import new_run_record
from fedllm.storage.lease import Lease
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import (
    AggregateRecord,
    BundleRecord,
    ClaimRecord,
    ClientScores,
    CohortClient,
    CohortRecord,
    EvaluationRecord,
    ModuleDiagnostics,
    RankQuality,
    Scores,
    SubmissionRecord,
)
from tests.planning.federations import MODULES, client, config_of, prepared_of

CLIENTS = ("task/7 ü", "12", "13", "14")


def begin(root: Path, **changes: object) -> RunPaths:
    """Make a run directory with a configuration and a run record only."""
    paths = RunPaths(root=root)
    config = config_of(**changes)
    publish_bytes(paths.config, dump_config(config).encode())
    new_run_record(config, run_id="run", versions={}).publish(paths.run)
    return paths


def prepare(paths: RunPaths) -> None:
    prepared_of([client(id_) for id_ in CLIENTS]).publish(paths.prepared)


def draw(paths: RunPaths, number: int, ids: Sequence[str] = CLIENTS) -> None:
    """Make a round's cohort, and its plan of a bundle for each of the first clients."""
    CohortRecord(
        round=number,
        lease=1,
        base_fingerprint="base",
        data_fingerprint="data",
        state_sha256="",
        ranks={
            "small": dict.fromkeys(MODULES, 2),
            "large": dict(zip(MODULES, (2, 4, 8), strict=True)),
        },
        clients=[CohortClient(id=id_, tier="small", cost=1.0) for id_ in ids],
    ).publish(paths.round(number).cohort)
    attempt(paths, number, 1)


def attempt(paths: RunPaths, number: int, attempt_number: int, **changes: object) -> None:
    plan = SubmissionRecord(
        token="t",
        lease=1,
        kind="client",
        command=[],
        arrays=[],
        bundles=[
            BundleRecord(number=n, worker_class="small", clients=[id_], cost=1.0)
            for n, id_ in enumerate(CLIENTS)
        ],
    )
    place = paths.round(number).attempt(attempt_number).submission
    plan.model_copy(update=changes).publish(place)


def claim(
    paths: RunPaths,
    number: int,
    attempt_number: int,
    bundle: int,
    *,
    task: str = "t",
    log: str = "",
) -> None:
    record = ClaimRecord(bundle=bundle, task=task, node="n", log=log)
    record.publish(paths.round(number).attempt(attempt_number).claim(bundle))


def hold(paths: RunPaths) -> Lease:
    # the directory was made by hand: it has no leases yet
    return Lease.acquire(paths, take_over=True)


def evaluation(
    number: int, losses: dict[str, float], tiers: dict[str, str] | None = None
) -> EvaluationRecord:
    """Return the evaluation of a round; a client's group is train, of `d...` dev."""
    scores = {
        id_: Scores(rows=2, loss=loss, rouge_l=loss / 10, exact_match=0.5)
        for id_, loss in losses.items()
    }
    return EvaluationRecord(
        round=number,
        state_sha256="",
        complete=True,
        seconds=1.0,
        clients=[
            ClientScores(
                client=id_,
                group="dev" if id_.startswith("d") else "train",
                tier=(tiers or {}).get(id_, "small"),
                as_deployed=score,
                at_largest_rank=score,
            )
            for id_, score in scores.items()
        ],
    )


def module(energy: float, *, overlap: float | None = None, **kept: float) -> ModuleDiagnostics:
    """Return a module's numbers: `r2=0.75` is the share that rank 2 keeps."""
    return ModuleDiagnostics(
        route="gram",
        stacked_rank=8,
        total_energy=energy,
        spectrum=[1.0],
        ranks=[
            RankQuality(rank=int(rank[1:]), energy_kept=share, truncation_error=0.0)
            for rank, share in kept.items()
        ],
        residual_energy=energy / 8,
        relative_excess=energy / 1000,
        effective_rank=1.5 * energy,
        beyond_smallest_rank=1.0 - next(iter(kept.values())),
        overlap=overlap,
    )


def aggregated(number: int, *modules: ModuleDiagnostics) -> AggregateRecord:
    return AggregateRecord(
        round=number,
        method="flexlora",
        rank={},
        sha256="",
        seconds=2.0,
        clients=4,
        device="cpu",
        modules={str(n): m for n, m in enumerate(modules)},
    )
