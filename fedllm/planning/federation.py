"""Federation: what configuration and data determine before the first round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.config.models import Config
from fedllm.planning.classes import asks_for_gpus, classes_of, tier_options
from fedllm.planning.cohorts import cohort_size, draw_cohort
from fedllm.planning.costs import CostModel, seed_costs, training_cost
from fedllm.planning.engines import ClientGroup, Engine, engine_of, engines_of
from fedllm.planning.roles import Roles, split_roles
from fedllm.planning.tiers import assign_tiers, resolve_ranks
from fedllm.storage.records import ClientRecord, CohortClient, PreparedRecord

# sustained speed of a worker in 10^12 operations a second: with a GPU, without
TERAFLOPS = {True: 20.0, False: 0.03}


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Federation: clients with their roles and tiers, tiers with ranks, classes and engines."""

    config: Config
    prepared: PreparedRecord
    clients: Mapping[str, ClientRecord]
    roles: Roles
    tiers: Mapping[str, str]
    ranks: Mapping[str, Mapping[str, int]]
    classes: Mapping[str, str]
    engines: Mapping[str, Engine]

    def cohort(self, round_number: int) -> list[CohortClient]:
        """Draw a round's clients in canonical order, with their expected cost in tokens."""
        drawn = draw_cohort(
            self.config.clients,
            seed=self.config.seed,
            round_number=round_number,
            trainable=self.roles.train,
        )
        return [
            CohortClient(
                id=id_,
                tier=self.tiers[id_],
                cost=training_cost(self.clients[id_], self.config.training),
            )
            for id_ in drawn
        ]

    def groups(self, cohort: Sequence[CohortClient]) -> list[ClientGroup]:
        """Return the groups of clients of a whole cohort that train together."""
        return engine_of(self.config.training).groups(cohort, self.ranks)

    @property
    def enough(self) -> int | None:
        """The number of valid updates that complete a round; None: the whole cohort's."""
        if not self.config.clients.over_sample:
            return None
        return cohort_size(self.config.clients, len(self.roles.train))

    def seed_costs(self) -> CostModel:
        """Return the costs before any round was measured."""
        section = self.config.scheduler
        return seed_costs(
            model_parameters=self.prepared.model_parameters,
            modules=self.prepared.modules,
            ranks=self.ranks,
            teraflops={
                tier: self.engines[tier].processes
                * (
                    section.worker_teraflops
                    or TERAFLOPS[asks_for_gpus(tier_options(section.sbatch, tier))]
                )
                for tier in self.ranks
            },
        )

    @property
    def largest_ranks(self) -> dict[str, int]:
        """The largest rank that any tier has, per module."""
        return {
            module: max(ranks[module] for ranks in self.ranks.values())
            for module in self.prepared.modules
        }


def plan_federation(config: Config, prepared: PreparedRecord) -> Federation:
    """Plan a federation from a configuration and its prepared data and base.

    Raises:
        ConfigError: configuration, data and base do not fit together.
    """
    clients = {client.id: client for client in prepared.clients}
    roles = split_roles(config.clients, prepared.clients)
    cohort_size(config.clients, len(roles.train))
    engines = engines_of(config)
    return Federation(
        config=config,
        prepared=prepared,
        clients=clients,
        roles=roles,
        tiers=assign_tiers(config.clients, config.seed, list(clients)),
        ranks=resolve_ranks(config, prepared.modules),
        classes=classes_of(config.scheduler.sbatch, engines),
        engines=engines,
    )
