"""The geometry of a round before anything is submitted."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedllm.config.models import Config
from fedllm.planning.bundles import cut_bundles
from fedllm.planning.classes import tier_options
from fedllm.planning.evaluation import choose
from fedllm.planning.federation import plan_federation
from fedllm.reporting.summary import update_bytes
from fedllm.reporting.tables import size, text_table
from fedllm.storage.records import PreparedRecord


@dataclass(frozen=True, kw_only=True)
class ArrayPlan:
    """One array of workers."""

    worker_class: str
    tiers: tuple[str, ...]
    tasks: int
    bundles: int
    clients: int
    options: dict[str, str | int | float | bool | None]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a round submits and writes; bytes and files are of round 1, whose cohort is drawn."""

    rounds: int
    trainable_clients: int
    cohort: int
    arrays: tuple[ArrayPlan, ...]
    tokens: float
    update_bytes: int
    update_files: int
    evaluated_clients: int
    evaluated_rows: int


def plan_geometry(config: Config, prepared: PreparedRecord) -> Geometry:
    """Plan the first round of a configuration."""
    federation = plan_federation(config, prepared)
    cohort = federation.cohort(1)
    slots = {"inline": 1, "local": config.scheduler.workers}.get(
        config.scheduler.kind, config.scheduler.max_parallel
    )
    work = cut_bundles(
        cohort,
        federation.classes,
        slots=slots,
        clients_per_bundle=config.scheduler.clients_per_bundle,
    )
    arrays = tuple(
        ArrayPlan(
            worker_class=name,
            tiers=tuple(t for t, c in federation.classes.items() if c == name),
            tasks=min(tasks, sum(b.worker_class == name for b in work.bundles)),
            bundles=sum(b.worker_class == name for b in work.bundles),
            clients=sum(len(b.clients) for b in work.bundles if b.worker_class == name),
            options=tier_options(config.scheduler.sbatch, name),
        )
        for name, tasks in work.workers.items()
    )
    targets = choose(config, prepared, 1) if config.evaluation.every else []
    return Geometry(
        rounds=config.rounds,
        trainable_clients=len(federation.roles.train),
        cohort=len(cohort),
        arrays=arrays,
        tokens=sum(client.cost for client in cohort),
        update_bytes=sum(
            update_bytes(federation.ranks[client.tier], prepared.modules) for client in cohort
        ),
        update_files=len(work.bundles),
        evaluated_clients=len(targets),
        evaluated_rows=sum(len(target.rows) for target in targets),
    )


def describe_plan(geometry: Geometry) -> str:
    """Return a plan as text."""
    rows = [
        [
            array.worker_class,
            ",".join(array.tiers),
            str(array.tasks),
            str(array.bundles),
            str(array.clients),
            " ".join(_flags(array.options)) or "(site defaults)",
        ]
        for array in geometry.arrays
    ]
    header = ["class", "tiers", "array tasks", "bundles", "clients", "sbatch options"]
    return "\n".join(
        [
            text_table("client arrays of a round", header, rows),
            "",
            f"{geometry.cohort} of {geometry.trainable_clients} clients a round, "
            f"{geometry.rounds} rounds, about {geometry.tokens:,.0f} training tokens a round",
            f"updates of a round: {size(geometry.update_bytes)} in {geometry.update_files} files",
            f"evaluation of a round: {geometry.evaluated_clients} clients, "
            f"{geometry.evaluated_rows} rows, each at its own and the largest rank",
            "beside the arrays: one aggregate and one evaluate job a round, one coordinator",
        ]
    )


def _flags(options: Mapping[str, str | int | float | bool | None]) -> Iterator[str]:
    for key, value in options.items():
        flag = f"--{key.removeprefix('--').replace('_', '-')}"
        if value is True:
            yield flag
        elif value is not None and value is not False:
            yield f"{flag}={value}"
