"""Everything that configuration and data fix before the first round."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.config.models import Config
from fedllm.planning.bundles import training_cost
from fedllm.planning.classes import classes_of
from fedllm.planning.cohorts import cohort_size, draw_cohort
from fedllm.planning.roles import Roles, split_roles
from fedllm.planning.tiers import assign_tiers, resolve_ranks
from fedllm.storage.records import ClientRecord, CohortClient, PreparedRecord


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Clients with their roles and tiers, tiers with their ranks and classes."""

    config: Config
    prepared: PreparedRecord
    clients: Mapping[str, ClientRecord]
    roles: Roles
    tiers: Mapping[str, str]
    ranks: Mapping[str, Mapping[str, int]]
    classes: Mapping[str, str]

    def cohort(self, round_number: int) -> list[CohortClient]:
        """Draw a round's clients, in canonical order, with their expected cost in tokens."""
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

    @property
    def largest_ranks(self) -> dict[str, int]:
        """The largest rank that any tier has, per module."""
        return {
            module: max(ranks[module] for ranks in self.ranks.values())
            for module in self.prepared.modules
        }


def plan_federation(config: Config, prepared: PreparedRecord) -> Federation:
    """Resolve a configuration against its data and base model.

    Raises:
        ConfigError: they do not fit together.
    """
    clients = {client.id: client for client in prepared.clients}
    roles = split_roles(config.clients, prepared.clients)
    cohort_size(config.clients, len(roles.train))
    return Federation(
        config=config,
        prepared=prepared,
        clients=clients,
        roles=roles,
        tiers=assign_tiers(config.clients, config.seed, list(clients)),
        ranks=resolve_ranks(config, prepared.modules),
        classes=classes_of(config.scheduler.sbatch, config.clients.tiers),
    )
