"""The aggregation job: a frozen collection of updates to the next server state."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fedllm.config.loading import read_config
from fedllm.config.models import Config
from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors, ModuleShape
from fedllm.methods.protocol import Method, ModuleAggregate, ModuleState
from fedllm.methods.table import build_method
from fedllm.model.device import resolve_device
from fedllm.planning.federation import Federation, plan_federation
from fedllm.steps.state import read_state
from fedllm.storage.checked import DamagedUpdateError
from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.records import (
    AggregateRecord,
    CollectedUpdate,
    CollectionRecord,
    ModuleDiagnostics,
    PreparedRecord,
    RankQuality,
    UpdateRecord,
)
from fedllm.storage.tensors import TensorFile, write_tensors
from fedllm.storage.updates import read_update, tensor_name


def method_of(config: Config) -> Method:
    """Return the configured method."""
    return build_method(
        config.method.name,
        seed=config.seed,
        alpha=config.lora.alpha,
        scaling=config.lora.scaling,
    )


def aggregate_round(paths: RoundPaths) -> AggregateRecord:
    """Make the server state of a round and publish it, its record last.

    Round 0 is the state before training.

    Raises:
        AdapterError: an update cannot be read as it was collected, or is not finite; the message
            names client, module and file.
    """
    started = time.perf_counter()
    run = RunPaths(root=paths.root.parent.parent)
    config = read_config(run.config)
    torch.set_num_threads(config.aggregation.threads)
    federation = plan_federation(config, PreparedRecord.read(run.prepared))
    method = method_of(config)
    device = resolve_device(config.aggregation.device)
    num_clients = 0
    if paths.number:
        collection = CollectionRecord.read(paths.collection)
        updates = CollectedUpdates.open(paths, collection, device)
        before = read_state(run.round(paths.number - 1))
        results = dict(_aggregate(method, federation, before, updates))
        states = {module: result.state for module, result in results.items()}
        num_clients = len(collection.updates)
    else:
        results = {}
        states = dict(_start(method, federation))
    tensors = {
        f"{module}.{part}": tensor.cpu()
        for module, state in states.items()
        for part, tensor in state.items()
    }
    record = AggregateRecord(
        round=paths.number,
        method=config.method.name,
        rank=federation.largest_ranks,
        sha256=write_tensors(paths.global_state, tensors, {"method": config.method.name}),
        seconds=time.perf_counter() - started,
        clients=num_clients,
        device=str(device),
        modules={module: _recorded(result) for module, result in results.items()},
    )
    record.publish(paths.aggregate_record)
    return record


@dataclass(frozen=True, kw_only=True)
class CollectedUpdates:
    """The updates of a collection, read module by module by memory map, in its order."""

    updates: list[CollectedUpdate]
    files: Mapping[str, TensorFile]
    records: Mapping[str, UpdateRecord]
    device: torch.device

    @classmethod
    def open(
        cls, paths: RoundPaths, collection: CollectionRecord, device: torch.device
    ) -> "CollectedUpdates":
        """Open the files of a collection and check that they are those that were frozen."""
        records: dict[str, UpdateRecord] = {}
        files: dict[str, TensorFile] = {}
        for name, sha256 in {u.file: u.sha256 for u in collection.updates}.items():
            path = paths.updates / name
            try:
                found = read_update(path)
            except (DamagedUpdateError, FileNotFoundError) as error:
                raise AdapterError(f"{path}: damaged update ({error})") from error
            if found[0].sha256 != sha256:
                raise AdapterError(f"{path}: not the file that was collected")
            records |= {update.record.client: update.record for update in found}
            files[name] = TensorFile(path)
        return cls(updates=collection.updates, files=files, records=records, device=device)

    def of(self, module: str) -> "UpdatesOfModule":
        """Return the cohort's factors of one module."""
        return UpdatesOfModule(source=self, module=module)

    def factors(self, update: CollectedUpdate, module: str) -> Factors:
        """Read one client's factors of one module.

        Raises:
            AdapterError: a value is not finite.
        """
        file = self.files[update.file]
        pair = [file.get(tensor_name(update.client, module, part)) for part in "AB"]
        for part, tensor in zip("AB", pair, strict=True):
            if not torch.isfinite(tensor).all():
                raise AdapterError(
                    f"{file.path}: client {update.client} sent a non-finite value in "
                    f"{module} {part}"
                )
        return Factors(
            a_RI=pair[0].to(self.device),
            b_OR=pair[1].to(self.device),
            scale=self.records[update.client].scales[module],
        )


@dataclass(frozen=True, kw_only=True)
class UpdatesOfModule:
    """One module's factors of every client, read when iterated."""

    source: CollectedUpdates
    module: str

    def __len__(self) -> int:
        """How many clients there are."""
        return len(self.source.updates)

    def __iter__(self) -> Iterator[Factors]:
        """Read the clients' factors in canonical order."""
        return (self.source.factors(update, self.module) for update in self.source.updates)


def _aggregate(
    method: Method, federation: Federation, before: TensorFile, updates: CollectedUpdates
) -> Iterator[tuple[str, ModuleAggregate]]:
    weights = method.weigh([update.weight for update in updates.updates])
    for module in federation.prepared.modules:
        result = method.aggregate_module(
            module=module,
            state=before.module(module),
            updates=updates.of(module),
            weights=weights,
            ranks=sorted({ranks[module] for ranks in federation.ranks.values()}),
        )
        yield module, result


def _start(method: Method, federation: Federation) -> Iterator[tuple[str, ModuleState]]:
    for module, rank in federation.largest_ranks.items():
        record = federation.prepared.modules[module]
        shape = ModuleShape(out=record.out_features, in_=record.in_features)
        yield module, method.start_module(module=module, shape=shape, rank=rank)


def _recorded(result: ModuleAggregate) -> ModuleDiagnostics:
    found = result.diagnostics
    return ModuleDiagnostics(
        route=found.route,
        stacked_rank=found.stacked_rank,
        total_energy=found.total_energy,
        spectrum=list(found.spectrum),
        ranks=[
            RankQuality(
                rank=quality.rank,
                energy_kept=quality.energy_kept,
                truncation_error=quality.relative_error,
            )
            for quality in found.ranks
        ],
    )
