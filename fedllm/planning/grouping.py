"""Which engine trains a run, and which clients of a cohort it trains together."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from fedllm.config.models import TrainingSection
from fedllm.storage.records import CohortClient, LayoutRecord

GROUP_LAYOUT = "parts"
"""The layout of rows of several clients that train together, on every kind of device.

No part of a sequence ever meets another client's, so that what is not finite stays where it is.
"""

# Factors are padded to the largest rank of a group: at most so much of a product is zeros.
_LARGEST_RATIO = 2


@dataclass(frozen=True, kw_only=True)
class ClientGroup:
    """Clients that are trained together, those of larger ranks later.

    `missing` are the members whose updates are wanted; all members train all the same, since the
    rounding of each depends on the others.
    """

    members: tuple[CohortClient, ...]
    missing: tuple[str, ...]

    @property
    def clients(self) -> tuple[str, ...]:
        """The ids of all members."""
        return tuple(member.id for member in self.members)

    @property
    def tier(self) -> str:
        """The tier on whose workers they train: that of the largest ranks."""
        return self.members[-1].tier

    def without(self, done: Collection[str]) -> "ClientGroup":
        """Return the group with fewer members missing."""
        return replace(self, missing=tuple(id_ for id_ in self.missing if id_ not in done))


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The engine that trains the clients of a run, as plans know it.

    Attributes:
        name: its trainer's key in `training.trainers.TRAINERS`.
        clients_at_once: how many clients it trains side by side.
        layout: the layout of rows that it needs; None: it takes any.
    """

    name: str
    clients_at_once: int = 1
    layout: str | None = None

    def groups(
        self, clients: Sequence[CohortClient], ranks: Mapping[str, Mapping[str, int]]
    ) -> list[ClientGroup]:
        """Return who of a whole cohort trains together; `ranks` are tier -> module -> rank."""
        return group_clients(clients, ranks, self.clients_at_once)

    def has_layout(self, layout: LayoutRecord | None) -> bool:
        """Say whether this layout of a base, None for padded rows, is the one that it needs."""
        return self.layout is None or (layout is not None and layout.cpu == self.layout)

    def refusal(self, layout: LayoutRecord | None) -> str | None:
        """Return why it cannot train on a base with this layout, and what to set instead."""
        if self.has_layout(layout):
            return None
        rows = "rows are padded"
        if layout and layout.why:
            rows = f"rows are {layout.cpu} ({layout.why})"
        return (
            f"training.clients_per_batch: got {self.clients_at_once}, but with this base {rows}, "
            "in which clients cannot train together; need 1"
        )


def engine_of(training: TrainingSection) -> Engine:
    """Return the engine that a configuration asks for."""
    if training.clients_per_batch == 1:
        return Engine(name="plain")
    return Engine(name="together", clients_at_once=training.clients_per_batch, layout=GROUP_LAYOUT)


def group_clients(
    clients: Sequence[CohortClient], ranks: Mapping[str, Mapping[str, int]], size: int
) -> list[ClientGroup]:
    """Cut a cohort into groups of at most `size` clients of similar ranks and costs.

    Clients are taken tier by tier, by the largest rank and then by the sum of all ranks; within a
    tier those of large cost come first. So tiers meet only where one ends and the next begins, and
    the last member is of the largest ranks.

    Nothing else decides the groups: neither how the cohort is bundled, nor who is done already, nor
    which workers there are. In no module has a member more than twice another's rank.

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
    if any(set(each) != modules for each in per_tier):
        return False
    found = ([each[module] for each in per_tier] for module in modules)
    return all(max(each) <= _LARGEST_RATIO * min(each) for each in found)
