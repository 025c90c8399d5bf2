"""Memory of the processes that train a client, by tier and stage of ZeRO."""

from collections.abc import Iterator
from dataclasses import dataclass

from fedllm.planning.federation import Federation, memory_of_process

_STAGES = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a process of a tier needs at least, in bytes; `chosen`: it is configured so.

    `stage` None: the engine divides nothing. `memory_gib` is what the tier says it has; None: it
    does not say. `peak` is the predicted peak at the rank that was chosen for it; None: the
    configuration gives the rank.
    """

    tier: str
    engine: str
    nodes: int
    processes: int
    stage: int | None
    chosen: bool
    weights: float
    adapter: float
    gradients: float
    optimizer: float
    total: float
    memory_gib: float | None
    peak: float | None = None


def plan_memory(federation: Federation) -> tuple[MemoryPlan, ...]:
    """Return the memory of every tier's processes; with ZeRO, at every stage."""
    return tuple(row for tier in federation.engines for row in _rows(federation, tier))


def _rows(federation: Federation, tier: str) -> Iterator[MemoryPlan]:
    engine, config = federation.engines[tier], federation.config
    fitted = federation.prepared.fitted.get(tier)
    peak = fitted.predicted_bytes.get(fitted.rank) if fitted else None
    for stage in _STAGES if engine.stage else (None,):
        memory = memory_of_process(config, federation.prepared, federation.ranks, tier, stage)
        yield MemoryPlan(
            tier=tier,
            engine=engine.name,
            nodes=engine.nodes,
            processes=engine.processes,
            stage=stage,
            chosen=stage == engine.stage,
            weights=memory.weights,
            adapter=memory.adapter,
            gradients=memory.gradients,
            optimizer=memory.optimizer,
            total=memory.total,
            memory_gib=config.clients.tiers[tier].memory_gib,
            peak=peak,
        )
