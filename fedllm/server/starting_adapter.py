"""The starting adapter of a run: prepare checks it, and the method makes the first state of it.

The method aggregates the adapter as if it were the only update. So every method that can aggregate
it can start from it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fedllm.adapters.base_copies import check_copies
from fedllm.adapters.base_names import fingerprint_of, folder_of
from fedllm.adapters.peft_config import CONFIG
from fedllm.adapters.peft_files import TENSORS, PeftAdapter, read_peft_adapter
from fedllm.adapters.tensor_names import names_in
from fedllm.aggregation.groups import ModuleRanks, blocks_of, group_modules, with_weights
from fedllm.config.models import AggregationSection, Config
from fedllm.errors import AdapterError
from fedllm.lora.factors import ModuleShape
from fedllm.methods.protocol import Method, ModuleAggregate, ModuleState
from fedllm.planning.federation import Federation
from fedllm.process.log import say
from fedllm.server.combine import AdapterSource
from fedllm.server.pipeline import Pipeline
from fedllm.storage.fingerprints import fingerprint_files
from fedllm.storage.records import ModuleRecord, PreparedRecord, StartRecord

_MIN_ENERGY_KEPT = 0.9999  # a smaller share is logged
_CPU = (torch.device("cpu"),)


def describe_start(config: Config, base: Path, prepared: PreparedRecord) -> StartRecord | None:
    """Return the record of `model.adapter`; None for a run that starts without an adapter.

    Raises:
        AdapterError: it cannot be read, or is for another base or for other modules.
    """
    if config.model.adapter is None:
        return None
    folder = Path(config.model.adapter).expanduser().resolve()
    adapter = _open_adapter(folder, prepared.modules)
    _refuse_other_base(adapter, base, prepared.model_fingerprint, config)
    check_copies([adapter], base)
    return StartRecord(path=str(folder), fingerprint=_fingerprint(folder))


def refuse_ranks(
    method: Method,
    prepared: PreparedRecord,
    tier_ranks: Sequence[Mapping[str, int]],
    section: AggregationSection,
) -> None:
    """Refuse an adapter that the method cannot aggregate with the ranks of the tiers.

    Args:
        method: the run's method.
        prepared: names the adapter.
        tier_ranks: one mapping, module -> rank, per tier.
        section: how it would be aggregated.

    Raises:
        AdapterError: it has other ranks than the method takes, or than the state has room for.
    """
    start = prepared.start
    if start is None:
        return
    # prepare has just taken its fingerprint
    adapter = _open_adapter(Path(start.path), prepared.modules)
    ranks = {module: adapter.factors.rank(module) for module in adapter.factors}
    beyond = [m for m, rank in ranks.items() if rank > max(tier[m] for tier in tier_ranks)]
    fits = not method.refuse([*tier_ranks, ranks])
    if fits and beyond:
        # a method tells by trying; one module is enough
        of_module = {beyond[0]: _ranks_of(adapter, beyond[0], tier_ranks)}
        try:
            _aggregate_alone(method, adapter, of_module, section, _CPU, lambda _name, _result: None)
        except AdapterError:
            fits = False
    if not fits:
        adapter_ranks = ", ".join(map(str, sorted(set(ranks.values()))))
        raise AdapterError(
            f"model.adapter: {adapter.folder} has rank {adapter_ranks}, from which {method.name} "
            "cannot start with these clients.tiers; give the tiers its rank, or use flexlora"
        )


def starting_ranks(prepared: PreparedRecord) -> dict[str, int]:
    """Return the rank of the starting adapter by module; empty for a run without one."""
    adapter = _open_prepared_adapter(prepared)
    if adapter is None:
        return {}
    return {module: adapter.factors.rank(module) for module in adapter.factors}


def start_states(
    method: Method,
    federation: Federation,
    devices: tuple[torch.device, ...],
    write: Callable[[str, ModuleState], None],
) -> None:
    """Write the state before training, module by module; log how much of the adapter it keeps.

    Raises:
        AdapterError: the adapter is not the one that was prepared, or the method cannot hold it.
    """
    shapes = {
        module: ModuleShape(out=record.out_features, in_=record.in_features)
        for module, record in federation.prepared.modules.items()
    }
    adapter = _open_prepared_adapter(federation.prepared)
    for module, rank in federation.largest_ranks.items():
        if adapter is None or module not in adapter.factors:
            write(module, method.start_module(module=module, shape=shapes[module], rank=rank))
    if adapter is None:
        return
    tiers = list(federation.ranks.values())
    ranks = {module: _ranks_of(adapter, module, tiers) for module in adapter.factors}
    energies: list[tuple[float, float]] = []  # of each module: all, and the part that is kept

    def take(module: str, result: ModuleAggregate) -> None:
        energy, share = result.diagnostics.total_energy, result.diagnostics.ranks[-1].energy_kept
        energies.append((energy, energy * share))
        write(module, result.state)

    _aggregate_alone(method, adapter, ranks, federation.config.aggregation, devices, take)
    energy, kept = (math.fsum(column) for column in zip(*energies, strict=True))
    if energy and kept < _MIN_ENERGY_KEPT * energy:
        say(
            f"model.adapter: {adapter.folder}: the largest ranks of clients.tiers keep "
            f"{kept / energy:.2%} of its energy; larger ranks keep more"
        )


def _ranks_of(
    adapter: PeftAdapter, module: str, tier_ranks: Sequence[Mapping[str, int]]
) -> ModuleRanks:
    return ModuleRanks(
        shape=adapter.factors.shape(module),
        clients=(adapter.factors.rank(module),),
        received=tuple(sorted({tier[module] for tier in tier_ranks})),
    )


def _aggregate_alone(
    method: Method,
    adapter: PeftAdapter,
    ranks: Mapping[str, ModuleRanks],
    section: AggregationSection,
    devices: tuple[torch.device, ...],
    take: Callable[[str, ModuleAggregate], None],
) -> None:
    def before(module: str) -> ModuleState:
        of_module = ranks[module]
        rank = max(of_module.received)
        return method.start_module(module=module, shape=of_module.shape, rank=rank)

    engine = Pipeline(
        method=method,
        source=AdapterSource(adapters=[adapter], weights=[1.0]),
        blocks=blocks_of(range(1), 1),
        total=1.0,
        before=before,
        take=take,
        devices=devices,
        round=0,
        notes=method.start_notes(),
    )
    groups = group_modules(ranks, block_clients=1, exact=section.exact, tolerance=section.tolerance)
    try:
        engine.run([with_weights(group, {0: 1.0}) for group in groups])
    except AdapterError as error:
        raise AdapterError(f"model.adapter: {adapter.folder}: {error}") from error


def _open_adapter(folder: Path, modules: Mapping[str, ModuleRecord]) -> PeftAdapter:
    """Open an adapter under the base's module names; refuse modules that are not in `modules`."""
    try:
        adapter = read_peft_adapter(folder)
    except AdapterError as error:
        raise AdapterError(f"model.adapter: {error}") from error
    factors = adapter.factors.named(names_in(adapter.factors, modules))
    for module in factors:
        record = modules.get(module)
        if record is None:
            raise AdapterError(
                f"model.adapter: {folder} adapts {module}, which is not among the run's modules; "
                "add it to lora.target_modules, or start from another adapter"
            )
        shape = factors.shape(module)
        if (shape.out, shape.in_) != (record.out_features, record.in_features):
            raise AdapterError(
                f"model.adapter: {folder}: {module} is for a weight of {shape.out}x{shape.in_}, "
                f"the base has {record.out_features}x{record.in_features}: it belongs to another "
                "model"
            )
    return replace(adapter, factors=factors)


def _open_prepared_adapter(prepared: PreparedRecord) -> PeftAdapter | None:
    if prepared.start is None:
        return None
    folder = Path(prepared.start.path)
    adapter = _open_adapter(folder, prepared.modules)
    if _fingerprint(folder) != prepared.start.fingerprint:
        raise AdapterError(
            f"model.adapter: {folder}: not the adapter that was prepared; restore it, or begin "
            "another run with it"
        )
    return adapter


def _fingerprint(folder: Path) -> str:
    return fingerprint_files([folder / CONFIG, folder / TENSORS], folder)


def _refuse_other_base(adapter: PeftAdapter, base: Path, fingerprint: str, config: Config) -> None:
    """Refuse an adapter of another base; log it if its base is not here to compare."""
    named, revision = adapter.base_model, adapter.config.revision
    if named is None or folder_of(named) == base:
        return
    if named == config.model.path and revision == config.model.revision:
        return
    if named == config.model.path and None not in {revision, config.model.revision}:
        raise AdapterError(
            f"model.adapter: {adapter.folder} is for revision {revision} of {named}, the run's is "
            f"{config.model.revision}; start from an adapter of this base"
        )
    here = folder_of(named)
    fingerprint_here = None if here is None else fingerprint_of(here)
    if fingerprint_here is None:
        say(
            f"model.adapter: {adapter.folder} names the base {named}, which is not here to compare "
            "with; names and shapes of its modules fit"
        )
    elif fingerprint_here != fingerprint:
        raise AdapterError(
            f"model.adapter: {adapter.folder} is for {named}, whose files are not those of "
            "model.path; start from an adapter of this base"
        )
