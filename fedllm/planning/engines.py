"""Groups of clients that an engine trains together."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from fedllm.config.models import Config, TrainingSection
from fedllm.planning.capacity import ONE_PROCESS, TaskSize
from fedllm.planning.classes import JobKind
from fedllm.storage.records import CohortClient, LayoutRecord

GROUP_LAYOUT = "parts"
"""The layout in which rows of several clients are computed together, on every kind of device.

No part of a sequence is computed with a part of another client's, so values that are not finite
do not spread to other clients.
"""

# Factors are padded with zeros to the largest rank of a group; this limits the padding.
_MAX_RANK_RATIO = 2


@dataclass(frozen=True, kw_only=True)
class ClientGroup:
    """Clients that are trained together, sorted by rank.

    `missing` are the ids of members without an update. All members train even if only some are
    missing, since the rounding of each depends on the others.
    """

    members: tuple[CohortClient, ...]
    missing: tuple[str, ...]

    @property
    def clients(self) -> tuple[str, ...]:
        """The ids of all members."""
        return tuple(member.id for member in self.members)

    @property
    def tier(self) -> str:
        """The tier whose workers train the group: the one of the largest ranks."""
        return self.members[-1].tier

    def without(self, done: Collection[str]) -> "ClientGroup":
        """Return the group without the clients `done` among its missing members."""
        return replace(self, missing=tuple(id_ for id_ in self.missing if id_ not in done))


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The engine that trains the clients of a tier, as far as plans need it.

    Attributes:
        name: key of its trainer in `training.trainers.TRAINERS`.
        clients_at_once: number of clients that it trains together.
        processes: number of processes of a task that train a client.
        nodes: number of nodes over which they are spread evenly.
        stage: stage of ZeRO; None: nothing is divided.
        package: package that it needs beside the dependencies of fedllm; None: none.
        divides_base: whether each process holds only a part of the weights of the base.
        layout: the layout of rows that it needs; None: any.
    """

    name: str
    clients_at_once: int = 1
    processes: int = 1
    nodes: int = 1
    stage: int | None = None
    package: str | None = None
    divides_base: bool = False
    layout: str | None = None

    @property
    def size(self) -> TaskSize:
        """The processes and nodes of a task."""
        return TaskSize(processes=self.processes, nodes=self.nodes)

    def groups(
        self, clients: Sequence[CohortClient], ranks: Mapping[str, Mapping[str, int]]
    ) -> list[ClientGroup]:
        """Return the groups of a whole cohort; `ranks` are tier -> module -> rank."""
        return group_clients(clients, ranks, self.clients_at_once)

    def has_layout(self, layout: LayoutRecord | None) -> bool:
        """Return whether a base with this layout (None: padded) has the one that it needs."""
        return self.layout is None or (layout is not None and layout.cpu == self.layout)

    def refusal(self, layout: LayoutRecord | None) -> str | None:
        """Return why it cannot train a base with this layout and what to set; None if it can."""
        if self.has_layout(layout):
            return None
        rows = "rows are padded"
        if layout and layout.why:
            rows = f"rows are {layout.cpu} ({layout.why})"
        return (
            f"training.clients_per_batch: got {self.clients_at_once}, but with this base {rows}, "
            "in which clients cannot train together; need 1"
        )


def engines_of(config: Config) -> dict[str, Engine]:
    """Return tier -> engine."""
    return {tier: engine_of(config.training_of(tier)) for tier in config.clients.tiers}


def scoring_engine(engines: Mapping[str, Engine]) -> Engine:
    """Return the engine whose processes hold the base that the tests score; `engines` by tier.

    Where every tier divides the base, its smallest task scores too; else one process does.
    """
    smallest = min(engines.values(), key=lambda engine: (engine.divides_base, engine.processes))
    return smallest if smallest.divides_base else Engine(name="plain")


def job_size(kind: JobKind, engines: Mapping[str, Engine]) -> TaskSize:
    """Return the processes and nodes of a job of one task; `engines` by tier."""
    return scoring_engine(engines).size if kind == "evaluate" else ONE_PROCESS


def engine_of(training: TrainingSection) -> Engine:
    """Return the engine of clients that train so."""
    if training.engine == "zero":
        return Engine(
            name="zero",
            processes=training.processes,
            nodes=training.nodes,
            stage=training.zero.stage,
            package="deepspeed",
            # a single process would have every part
            divides_base=training.zero.stage == 3 and training.processes > 1,
        )
    if training.clients_per_batch == 1:
        return Engine(name="plain")
    return Engine(name="together", clients_at_once=training.clients_per_batch, layout=GROUP_LAYOUT)


def group_clients(
    clients: Sequence[CohortClient], ranks: Mapping[str, Mapping[str, int]], size: int
) -> list[ClientGroup]:
    """Cut a cohort into groups of at most `size` clients of similar ranks and costs.

    Clients are taken tier by tier, sorted by the tier's largest rank, then by the sum of its ranks;
    within a tier, costly clients come first. So a group has clients of two tiers only where one
    tier ends and the next begins, and its last member has the largest ranks. In no module is a
    member's rank more than twice that of another.

    The groups depend only on the arguments, not on bundles, on clients that are done or on workers.

    Args:
        clients: the whole cohort.
        ranks: tier -> module -> rank.
        size: `training.clients_per_batch`.
    """

    def place(client: CohortClient) -> tuple[int, int, str, float, str]:
        per_module = ranks[client.tier].values()
        return max(per_module), sum(per_module), client.tier, -client.cost, client.id

    cuts: list[list[CohortClient]] = []
    for client in sorted(clients, key=place):
        if cuts and len(cuts[-1]) < size and _are_similar([*cuts[-1], client], ranks):
            cuts[-1].append(client)
        else:
            cuts.append([client])
    return [ClientGroup(members=tuple(cut), missing=tuple(c.id for c in cut)) for cut in cuts]


def _are_similar(clients: Sequence[CohortClient], ranks: Mapping[str, Mapping[str, int]]) -> bool:
    per_tier = [ranks[tier] for tier in sorted({client.tier for client in clients})]
    modules = set(per_tier[0])
    if any(set(module_ranks) != modules for module_ranks in per_tier):
        return False
    per_module = ([module_ranks[module] for module_ranks in per_tier] for module in modules)
    return all(max(tiers) <= _MAX_RANK_RATIO * min(tiers) for tiers in per_module)
