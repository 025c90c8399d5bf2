"""The aggregation job: it turns a frozen collection of updates into the next server state."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from fedllm.aggregation.groups import (
    ModuleGroup,
    ModuleRanks,
    blocks_of,
    group_modules,
    with_weights,
)
from fedllm.errors import ConfigError
from fedllm.lora.factors import BaseDelta, Factors, ModuleShape, terms_of
from fedllm.methods.base_terms import is_term
from fedllm.methods.catalog import private_space
from fedllm.methods.protocol import (
    Method,
    ModuleAggregate,
    ModuleState,
    StateNotes,
    UsedClients,
)
from fedllm.methods.weights import total_of
from fedllm.model.device import resolve_devices
from fedllm.planning.cohorts import cohort_size
from fedllm.planning.federation import Federation, plan_federation
from fedllm.process.run_method import method_of_run
from fedllm.process.server_state import StateFile, metadata_of_state, notes_of, open_own_state
from fedllm.scheduling.traits import traits_of
from fedllm.server.clipping import clip_factors
from fedllm.server.collected_updates import CollectedUpdates
from fedllm.server.epsilon import privacy_after
from fedllm.server.pipeline import Pipeline
from fedllm.server.starting_adapter import start_states, starting_ranks
from fedllm.storage.fingerprints import fingerprint_values
from fedllm.storage.frozen_config import frozen_config
from fedllm.storage.kept_records import Count, uncounted
from fedllm.storage.paths import RoundPaths
from fedllm.storage.publishing.publish import publish_link
from fedllm.storage.records import (
    AggregateRecord,
    CohortRecord,
    CollectionRecord,
    ModuleDiagnostics,
    PreparedRecord,
    PrivacyRecord,
)
from fedllm.storage.tensors import TensorSpec, TensorWriter, digest_of, writing_tensors


def aggregate_round(paths: RoundPaths, count: Count = uncounted) -> AggregateRecord:
    """Aggregate a round into its server state; publish the state, and its record last.

    Round 0 is the state before training: no change of the base, or that of `model.adapter`.

    Raises:
        AdapterError: an update cannot be read as it was collected, or is not finite; the message
            names client, module and file.
    """
    started = time.perf_counter()
    run = paths.run
    config = frozen_config(run)
    torch.set_num_threads(config.aggregation.threads)
    federation = plan_federation(config, PreparedRecord.read(run.prepared))
    method = method_of_run(run, config)
    devices = resolve_devices(config.aggregation.device)
    uniform = config.aggregation.weights == "uniform"
    collected = _Collected.open(paths, method, uniform=uniform) if paths.number else None
    planned = _planned_tensors(method, federation, collected)
    notes = collected.next_notes(method) if collected else method.start_notes()
    earlier, own = collected.keep(planned) if collected else ({}, planned)
    metadata = metadata_of_state(config.method.name, notes, earlier)
    with writing_tensors(paths.global_state, own, metadata) as writer:
        total = len(federation.prepared.modules)
        output = _Output(
            method=method,
            writer=writer,
            earlier=earlier,
            modules={},
            changes={},
            total=total,
            count=count,
        )
        if collected:
            done = _aggregate(collected, federation, method, devices, output, notes)
        else:
            done = _AggregationResult(stages={}, clients=0)
            start_states(method, federation, devices, output.write)
    record = AggregateRecord(
        round=paths.number,
        method=config.method.name,
        rank=federation.largest_ranks,
        sha256=writer.sha256,
        base_change=output.base_change,
        earlier=earlier,
        assigned=_assigned(method, federation, notes),
        sent_next=method.sent_factors(paths.number + 1),
        seconds=time.perf_counter() - started,
        clients=done.clients,
        device=", ".join(map(str, devices)),
        stages=done.stages,
        privacy=_privacy(federation, paths.number),
        modules={m: output.modules[m] for m in federation.prepared.modules if m in output.modules},
    )
    record.publish(paths.aggregate_record)
    return record


def groups_of(federation: Federation, cohort: CohortRecord) -> list[ModuleGroup]:
    """Return the groups in which a cohort's modules are aggregated.

    They follow from the whole cohort: a client that is left out changes no group.
    """
    section = federation.config.aggregation
    is_formed = private_space(federation.config) == "products"
    modules = {
        module: ModuleRanks(
            shape=_shape(federation, module),
            clients=tuple(cohort.ranks_of(client)[module] for client in cohort.clients),
            received=tuple(sorted({ranks[module] for ranks in cohort.ranks.values()})),
        )
        for module in federation.prepared.modules
    }
    return group_modules(
        modules,
        block_clients=section.block_clients,
        exact=section.exact,
        tolerance=section.tolerance,
        formed=is_formed,
    )


@dataclass(frozen=True, kw_only=True)
class _Output:
    """The state that is being written, and each module's diagnostics and change of the base.

    `earlier` are the earlier states, by their round, whose terms of the change it takes over.
    """

    method: Method
    writer: TensorWriter
    earlier: Mapping[int, str]
    modules: dict[str, ModuleDiagnostics]
    changes: dict[str, str]
    total: int
    count: Count

    def take(self, module: str, result: ModuleAggregate) -> None:
        self.write(module, result.state)
        self.modules[module] = result.diagnostics
        self.count("modules aggregated", len(self.modules), self.total)

    def write(self, module: str, state: ModuleState) -> None:
        terms = []
        for part, tensor in state.items():
            name = f"{module}.{part}"
            if is_term(part) and name not in self.writer.planned:
                continue  # a file of an earlier round has it
            self.writer.write(name, tensor)
            terms += [tensor] if is_term(part) else []
        change = terms or self.method.base_delta(state)
        if change is not None:
            if not self.method.changes_base:
                raise ConfigError(
                    f"method.name: {self.method.name} has a base_delta, but its class does not say "
                    "so; set changes_base = True there, or let base_delta return None"
                )
            self.changes[module] = _digest_of(change)

    @property
    def base_change(self) -> str | None:
        """The SHA-256 of all modules' changes of the base; None if there are none."""
        if not self.changes:
            return None
        files = [self.earlier] if self.earlier else []
        return fingerprint_values(self.changes, *files)


@dataclass(frozen=True, kw_only=True)
class _AggregationResult:
    """The seconds of each stage, and the number of clients."""

    stages: dict[str, float]
    clients: int


@dataclass(frozen=True, kw_only=True)
class _Collected:
    """What a round aggregates: the frozen collection, its weights, and the state before."""

    paths: RoundPaths
    collection: CollectionRecord
    cohort: CohortRecord
    weights: list[float]
    before: StateFile

    @classmethod
    def open(cls, paths: RoundPaths, method: Method, *, uniform: bool) -> "_Collected":
        collection = CollectionRecord.read(paths.collection)
        rows = [1.0 if uniform else update.weight for update in collection.updates]
        return cls(
            paths=paths,
            collection=collection,
            cohort=CohortRecord.read(paths.cohort),
            weights=method.weigh(rows),
            before=open_own_state(paths.run.round(paths.number - 1)),
        )

    def keep(
        self, planned: Mapping[str, TensorSpec]
    ) -> tuple[dict[int, str], dict[str, TensorSpec]]:
        """Link the earlier states whose terms of the base's change the next state takes over.

        Returns:
            their checksums by round, and the tensors that are to be written.

        Raises:
            RunDirectoryError: terms are to be multiplied, and a file that has them is damaged.
        """
        before = self.before
        kept = [name for name in before.terms if name in planned]
        if len(kept) < len(before.terms):
            before.check_earlier()
        files = {**before.earlier, before.round: before.sha256}
        earlier = {number: files[number] for number in sorted(map(before.round_of, kept))}
        for number in earlier:
            publish_link(self.paths.earlier_state(number), before.path_of(number))
        return earlier, {name: spec for name, spec in planned.items() if name not in kept}

    def next_notes(self, method: Method) -> StateNotes:
        clients = [update.client for update in self.collection.updates]
        ranks = {client.id: self.cohort.ranks_of(client) for client in self.cohort.clients}
        used = UsedClients(
            round=self.paths.number,
            clients=clients,
            weights=self.weights,
            ranks=[ranks[client] for client in clients],
            notes=[update.notes for update in self.collection.updates],
        )
        return method.next_notes(notes_of(self.before), used)


def _aggregate(
    collected: _Collected,
    federation: Federation,
    method: Method,
    devices: tuple[torch.device, ...],
    output: _Output,
    notes: StateNotes,
) -> _AggregationResult:
    """Aggregate a collection."""
    section = federation.config.aggregation
    updates = CollectedUpdates.open(
        collected.paths,
        collected.collection,
        collected.cohort,
        collected.weights,
        traits_of(federation.config).visibility_seconds,
    )
    updates = replace(updates, received=_received(method, collected))
    with collected.before as before:
        private = _private_round(collected, federation, method, updates)
        weights = private.weights if private else updates.weights
        updates = replace(updates, weights=weights)
        engine = Pipeline(
            method=method,
            source=updates,
            blocks=blocks_of(list(updates.updates), section.block_clients),
            total=private.total if private else total_of(collected.weights),
            before=before.module,
            take=output.take,
            devices=devices,
            round=collected.paths.number,
            notes=notes,
            noise_std=private.noise_std if private else 0.0,
            clients=[client.id for client in collected.cohort.clients],
        )
        groups = groups_of(federation, collected.cohort)
        stages = engine.run([with_weights(group, weights) for group in groups])
    return _AggregationResult(stages=stages, clients=len(collected.weights))


@dataclass(frozen=True, kw_only=True)
class _PrivateRound:
    """What private clients' clipped changes count, by their places; the divisor, and the noise."""

    weights: dict[int, float]
    total: float
    noise_std: float


def _private_round(
    collected: _Collected, federation: Federation, method: Method, updates: CollectedUpdates
) -> _PrivateRound | None:
    config, clip_norm = federation.config, federation.config.privacy.clip_norm
    space = private_space(config)
    if space is None or clip_norm is None:
        return None
    before = collected.before.module
    return _PrivateRound(
        weights=clip_factors(method, space, updates, collected.cohort, before, clip_norm),
        # not how many took part: that would tell of a client who did
        total=float(cohort_size(config.clients, len(federation.trainable))),
        noise_std=config.privacy.noise_multiplier * clip_norm,
    )


def _received(method: Method, collected: _Collected) -> Callable[[int, str], Factors]:
    """Return what gives a client's adapter before its training, by its place and the module."""

    @lru_cache(maxsize=64)
    def adapter(module: str, rank: int) -> Factors:
        return method.module_adapter(
            module=module, state=collected.before.module(module), rank=rank
        )

    cohort = collected.cohort
    ranks = [cohort.ranks_of(client) for client in cohort.clients]
    return lambda place, module: adapter(module, ranks[place][module])


def _assigned(
    method: Method, federation: Federation, notes: StateNotes
) -> dict[str, dict[str, int]]:
    """Return the ranks of the clients whose method gives them others than their tier has."""
    found: dict[str, dict[str, int]] = {}
    for client in federation.clients:
        of_tier = federation.ranks[federation.tiers[client]]
        ranks = method.assign(notes=notes, client=client, ranks=of_tier)
        if ranks != of_tier:
            found[client] = dict(ranks)
    return found


def _planned_tensors(
    method: Method, federation: Federation, collected: _Collected | None
) -> dict[str, TensorSpec]:
    planned: dict[str, TensorSpec] = {}
    added = _added_ranks(federation, collected)
    for module, rank in federation.largest_ranks.items():
        shape = _shape(federation, module)
        parts = method.parts(shape, rank)
        if module in added:
            first = {name: part.shape for name, part in parts.items()}
            before = collected.before.shapes(module) if collected else first
            parts = method.next_parts(shape, rank, before=before, stacked_rank=added[module])
        planned |= {
            f"{module}.{name}": TensorSpec(shape=part.shape, dtype=part.dtype)
            for name, part in parts.items()
        }
    return planned


def _added_ranks(federation: Federation, collected: _Collected | None) -> dict[str, int]:
    """Return the stacked rank of what is aggregated, by module."""
    if collected is None:
        return starting_ranks(federation.prepared)
    groups = groups_of(federation, collected.cohort)
    return {module: group.problem.stacked_rank for group in groups for module in group.modules}


def _digest_of(change: BaseDelta) -> str:
    """Return the SHA-256 of all tensors of a module's change of the base, as the state has it."""
    return "".join(
        digest_of(tensor)
        for term in terms_of(change)
        for tensor in ([term.b_OR, term.a_RI] if isinstance(term, Factors) else [term])
    )


def _privacy(federation: Federation, rounds: int) -> PrivacyRecord | None:
    if not rounds or federation.config.privacy.clip_norm is None:
        return None
    return privacy_after(federation.config, len(federation.trainable), rounds)


def _shape(federation: Federation, module: str) -> ModuleShape:
    record = federation.prepared.modules[module]
    return ModuleShape(out=record.out_features, in_=record.in_features)
