"""Federation: what configuration and data determine before the first round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.config.models import Config, ModelSection
from fedllm.errors import ConfigError
from fedllm.planning.classes import asks_for_gpus, classes_of, tier_options
from fedllm.planning.cohorts import cohort_size, draw_cohort, refuse_empty_cohorts
from fedllm.planning.costs import (
    CostModel,
    ProcessMemory,
    process_memory,
    seed_costs,
    training_cost,
)
from fedllm.planning.engines import ClientGroup, Engine, engine_of, engines_of
from fedllm.planning.roles import Roles, split_roles
from fedllm.planning.tiers import assign_tiers, resolve_ranks
from fedllm.storage.records import ClientRecord, CohortClient, PreparedRecord

# sustained speed of a process in 10^12 operations a second: with a GPU, without
TERAFLOPS = {True: 20.0, False: 0.03}
_BYTES = {"float32": 4.0, "bfloat16": 2.0}
# of a weight of a quantised layer: 4 bits and, for each block of 64, a scale of 8 bits; or 8 bits
_QUANTISED_BYTES = {"nf4": 0.5 + 1 / 64, "int8": 1.0}
_GIB = 1 << 30


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

    @property
    def trainable(self) -> tuple[str, ...]:
        """The clients that a cohort is drawn from: those that train, of `clients.cohort.tiers`."""
        among = self.config.clients.cohort.tiers
        if among is None:
            return self.roles.train
        return tuple(client for client in self.roles.train if self.tiers[client] in among)

    def cohort(self, round_number: int) -> list[CohortClient]:
        """Draw a round's clients in canonical order, with their expected cost in tokens."""
        drawn = draw_cohort(
            self.config.clients,
            seed=self.config.seed,
            round_number=round_number,
            trainable=self.trainable,
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
        return cohort_size(self.config.clients, len(self.trainable))

    def seed_costs(self) -> CostModel:
        """Return the costs before any round was measured."""
        section = self.config.scheduler
        return seed_costs(
            model_parameters=self.prepared.model_parameters,
            modules=self.prepared.modules,
            ranks=self.ranks,
            teraflops={
                tier: section.worker_teraflops
                or self.engines[tier].processes
                * TERAFLOPS[asks_for_gpus(tier_options(section.sbatch, tier))]
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


def tier_ranks(config: Config, prepared: PreparedRecord) -> dict[str, dict[str, int]]:
    """Return tier -> module -> rank of a prepared run; the errors are those of `resolve_ranks`."""
    return resolve_ranks(config, prepared.modules, prepared.fitted_ranks)


def memory_of_process(
    config: Config,
    prepared: PreparedRecord,
    ranks: Mapping[str, Mapping[str, int]],
    tier: str,
    stage: int | None,
) -> ProcessMemory:
    """Return the memory of a process that trains clients of a tier, at a stage of ZeRO."""
    return process_memory(
        base_bytes=base_bytes(config.model, prepared),
        modules=prepared.modules,
        ranks=ranks[tier],
        processes=config.training_of(tier).processes,
        stage=stage,
    )


def base_bytes(section: ModelSection, prepared: PreparedRecord) -> float:
    """Return the bytes of a base's weights in the formats in which it is loaded."""
    own = _BYTES[section.dtype]
    quantised = _QUANTISED_BYTES.get(section.quantization, own)
    linear = prepared.linear_parameters
    return own * (prepared.model_parameters - linear) + quantised * linear


def _require_memory(
    config: Config, prepared: PreparedRecord, ranks: Mapping[str, Mapping[str, int]]
) -> None:
    """Refuse tiers whose processes have too little memory for the base and their adapter.

    Raises:
        ConfigError: one line for each of them.
    """
    lines = []
    for tier, engine in engines_of(config).items():
        given = config.clients.tiers[tier].memory_gib
        needed = memory_of_process(config, prepared, ranks, tier, engine.stage).total / _GIB
        if given is not None and needed > given:
            what = f"stage {engine.stage}" if engine.stage else "whole weights"
            lines.append(
                f"clients.tiers.{tier}.memory_gib: got {given:g}, but a process needs at least "
                f"{needed:.3g} GiB for a base of {prepared.model_parameters:,} weights (engine "
                f"{engine.name}, {what}, {engine.processes} in all); need more "
                "memory, training.zero.stage: 3 with more training.processes, model.dtype: "
                "bfloat16, or model.quantization: nf4"
            )
    if lines:
        raise ConfigError("\n".join(lines))


def plan_federation(config: Config, prepared: PreparedRecord) -> Federation:
    """Plan a federation from a configuration and its prepared data and base.

    Raises:
        ConfigError: configuration, data and base do not fit together.
    """
    clients = {client.id: client for client in prepared.clients}
    roles = split_roles(config.clients, prepared.clients)
    engines, ranks = engines_of(config), tier_ranks(config, prepared)
    _require_memory(config, prepared, ranks)
    federation = Federation(
        config=config,
        prepared=prepared,
        clients=clients,
        roles=roles,
        tiers=assign_tiers(config.clients, config.seed, list(clients)),
        ranks=ranks,
        classes=classes_of(config.scheduler.sbatch, engines),
        engines=engines,
    )
    refuse_empty_cohorts(config, cohort_size(config.clients, len(federation.trainable)))
    return federation
