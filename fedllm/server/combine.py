"""Combination of PEFT adapter folders, of any ranks, into one: the aggregation of a round."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from fedllm.adapters.base_copies import check_copies
from fedllm.adapters.base_names import CommonBase, common_base
from fedllm.adapters.peft_config import CONFIG, AdapterConfig
from fedllm.adapters.peft_files import PeftAdapter, dtype_of, read_peft_adapter
from fedllm.adapters.peft_writer import (
    PeftDescription,
    PeftWriter,
    PlannedModule,
    writing_peft_adapter,
)
from fedllm.adapters.tensor_names import common_names
from fedllm.aggregation.groups import (
    WORKING_BYTES,
    ModuleRanks,
    blocks_of,
    group_modules,
    with_weights,
)
from fedllm.config.target_modules import pattern_problem
from fedllm.errors import AdapterError
from fedllm.lora.factors import ModuleShape
from fedllm.methods.catalog import build_method
from fedllm.methods.protocol import Method, ModuleAggregate, ModuleState
from fedllm.methods.weights import shares, total_of
from fedllm.model.device import resolve_devices
from fedllm.server.pipeline import Pipeline
from fedllm.storage.publishing.outputs import filling_folder

RequestedRank: TypeAlias = int | Literal["full"] | None
ReportProgress: TypeAlias = Callable[[int, int], None]  # modules that are done, all modules

_SEED = 0  # draws the directions in which nothing was trained
_BLOCK_ADAPTERS = 32
_ALL_LINEAR = "all-linear"  # PEFT's word
_RESTRICTIONS = ("exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True, kw_only=True)
class WeightedAdapter:
    """An adapter folder and its weight, not yet normalised."""

    folder: Path
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CombineRequest:
    """A request: what to combine, and what to write.

    `rank` is a number, `full` (the stacked ranks: nothing is lost), or None: the largest rank of
    any input, module by module. No module gets a rank above its smaller side. `options` are those
    of the method. `dtype` is one of
    `DTYPES`; `out` is a new or empty folder; `exact` and `tolerance` are as in
    `aggregation.decomposition.Problem`. `base` is the base model of all inputs, a folder or hub
    name, whatever name they give it; `allow_missing` accepts inputs with few common modules.
    `working_bytes` is the memory of the modules that are aggregated at once.
    """

    adapters: Sequence[WeightedAdapter]
    out: Path
    rank: RequestedRank = None
    method: str = "flexlora"
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "float32"
    exact: bool = False
    tolerance: float = 1e-4
    base: str | None = None
    allow_missing: bool = False
    working_bytes: int = WORKING_BYTES


@dataclass(frozen=True, kw_only=True)
class CombinedInput:
    """An input adapter: its share (all sum to 1) and the modules that it lacks."""

    folder: Path
    share: float
    largest_rank: int
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CombinedModule:
    """A module of the result: its rank and the energy that it keeps.

    `capped` says that the module's smaller side limits its rank. `energy_kept` is a share of
    `energy`, the squared Frobenius norm of the weighted mean. The lost energy exceeds the minimum
    by at most the share `relative_excess` of the minimum, except with probability
    `failure_probability`. `stacked_rank` is the sum of the inputs' ranks.
    """

    shape: ModuleShape
    stacked_rank: int
    rank: int
    capped: bool
    energy: float
    energy_kept: float
    route: str
    relative_excess: float
    failure_probability: float


@dataclass(frozen=True, kw_only=True)
class Combined:
    """The result of a combination: inputs, modules, and the seconds of each stage."""

    base_model: str | None
    inputs: tuple[CombinedInput, ...]
    modules: Mapping[str, CombinedModule]
    seconds: Mapping[str, float]

    @property
    def energy_kept(self) -> float:
        """The share of energy that all modules together keep."""
        total = math.fsum(module.energy for module in self.modules.values())
        kept = math.fsum(module.energy * module.energy_kept for module in self.modules.values())
        return kept / total if total else 1.0


def combine_adapters(request: CombineRequest, *, report: ReportProgress | None = None) -> Combined:
    """Write the weighted mean of the adapters' changes as one PEFT adapter.

    All headers are checked before anything is computed. Factors are read, and the result is
    written, a few modules at a time: all adapters together may be larger than the memory.

    Args:
        request: what to combine.
        report: called with the number of modules that are done (0 first), and of all modules.

    Raises:
        AdapterError: adapters that cannot be read or combined.
        ConfigError: a method or device that does not exist.
        DataError: weights that sum to zero.
        RunDirectoryError: `out` cannot be written.
    """
    dtype = dtype_of(request.dtype)
    _check_request(request)
    folders = [item.folder for item in request.adapters]
    adapters = _with_common_names([read_peft_adapter(folder) for folder in folders])
    base = common_base([adapter.config for adapter in adapters], folders, request.base)
    check_copies(adapters, base.folder)
    shapes = _shapes(adapters)
    if not request.allow_missing:
        _refuse_few_in_common(adapters, list(shapes))
    # alpha = 2r: a scale of 2 at every rank, which is the one that is written
    method = build_method(
        request.method,
        seed=_SEED,
        alpha=2.0,
        scaling="proportional",
        options=request.options,
    )
    if method.keeps_at_clients:
        raise AdapterError(
            f"--method {method.name}: clients keep a part of their adapters, so that there is no "
            "one mean; choose another method"
        )
    if method.changes_base:
        raise AdapterError(
            f"--method {method.name}: changes the base, not only adapters; choose another method"
        )
    weights = shares(method.weigh([item.weight for item in request.adapters]))
    source = AdapterSource(adapters=adapters, weights=weights)
    ranks = {module: source.ranks(module, shapes[module], request.rank) for module in shapes}
    devices = resolve_devices(request.device)
    about = _description([adapter.config for adapter in adapters], list(shapes), base)
    planned = {
        module: PlannedModule(shape=of_module.shape, rank=of_module.received[0])
        for module, of_module in ranks.items()
    }
    with (
        filling_folder(request.out, last=CONFIG) as folder,
        writing_peft_adapter(folder, planned, about=about, dtype=dtype) as writer,
    ):
        output = _Output(
            method=method,
            writer=writer,
            ranks=ranks,
            requested=request.rank,
            report=report,
            modules={},
        )
        output.report_progress()
        engine = Pipeline(
            method=method,
            source=source,
            blocks=blocks_of(range(len(adapters)), _BLOCK_ADAPTERS),
            total=total_of(weights),
            before=output.before,
            take=output.take,
            devices=devices,
            round=1,
            notes=method.start_notes(),
        )
        groups = group_modules(
            ranks,
            block_clients=_BLOCK_ADAPTERS,
            exact=request.exact,
            tolerance=request.tolerance,
            working_bytes=request.working_bytes,
        )
        of_adapters = dict(enumerate(weights))
        seconds = engine.run([with_weights(group, of_adapters) for group in groups])
    return Combined(
        base_model=about.base_model,
        inputs=tuple(
            _input(adapter, share, shapes) for adapter, share in zip(adapters, weights, strict=True)
        ),
        modules={module: output.modules[module] for module in shapes},
        seconds=seconds,
    )


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """Adapters as the source of factors for an aggregation."""

    adapters: Sequence[PeftAdapter]
    weights: Sequence[float]

    def ranks(self, module: str, shape: ModuleShape, requested: RequestedRank) -> ModuleRanks:
        """Return the ranks of a module: each adapter's (0 if it lacks it), and the result's."""
        ranks = [a.factors.rank(module) if module in a.factors else 0 for a in self.adapters]
        rank = min(_uncapped_rank(requested, ranks), shape.largest_rank)
        return ModuleRanks(shape=shape, clients=tuple(ranks), received=(rank,))

    def factors(self, client: int, module: str) -> tuple[Tensor, Tensor]:
        """Return A (R, I) and B (O, R) as they lie in the file."""
        return self.adapters[client].factors.views(module)

    def check(self, client: int, module: str, part: str, values: Tensor) -> None:
        """Do nothing: PEFT keeps no checksums and no norms."""

    def scale(self, client: int, module: str) -> float:
        """Return the scale that PEFT gives the product."""
        return self.adapters[client].factors.scale(module)

    def weight(self, client: int, module: str) -> float:
        """Return the adapter's weight, the same for all its modules."""
        del module
        return self.weights[client]

    def name(self, client: int, module: str, part: str) -> str:
        """Return the name of A or B for messages: folder and tensor."""
        return self.adapters[client].factors.name(module, part)


@dataclass(frozen=True, kw_only=True)
class _Output:
    """The result that is being written, and the report of its progress."""

    method: Method
    writer: PeftWriter
    ranks: Mapping[str, ModuleRanks]
    requested: RequestedRank
    report: ReportProgress | None
    modules: dict[str, CombinedModule]

    def before(self, module: str) -> ModuleState:
        """Return a module's first state: nothing was aggregated before."""
        ranks = self.ranks[module]
        return self.method.start_module(module=module, shape=ranks.shape, rank=ranks.received[0])

    def take(self, module: str, result: ModuleAggregate) -> None:
        if self.method.base_delta(result.state) is not None:
            raise AdapterError(
                f"--method {self.method.name}: changes the base, not only adapters; choose another "
                "method"
            )
        ranks, diagnostics = self.ranks[module], result.diagnostics
        rank = ranks.received[0]
        factors = self.method.module_adapter(module=module, state=result.state, rank=rank)
        self.writer.write(module, factors)
        self.modules[module] = CombinedModule(
            shape=ranks.shape,
            stacked_rank=sum(ranks.clients),
            rank=rank,
            capped=_uncapped_rank(self.requested, ranks.clients) > rank,
            energy=diagnostics.total_energy,
            energy_kept=diagnostics.ranks[0].energy_kept,
            route=diagnostics.route,
            relative_excess=diagnostics.relative_excess,
            failure_probability=diagnostics.failure_probability,
        )
        self.report_progress()

    def report_progress(self) -> None:
        if self.report:
            self.report(len(self.modules), len(self.ranks))


def _uncapped_rank(requested: RequestedRank, ranks: Sequence[int]) -> int:
    if requested is None:
        return max(ranks)
    return sum(ranks) if requested == "full" else requested


def _check_request(request: CombineRequest) -> None:
    for item in request.adapters:
        if request.out.resolve().is_relative_to(item.folder.resolve()):
            raise AdapterError(
                f"--out {request.out}: lies in the adapter {item.folder}; choose another folder"
            )
    if isinstance(request.rank, int) and request.rank < 1:
        raise AdapterError(f"--rank: got {request.rank}, need >= 1, or full")
    if not (math.isfinite(request.tolerance) and request.tolerance > 0):
        raise AdapterError(f"--tolerance: got {request.tolerance:g}, need a number > 0")
    for item in request.adapters:
        if not (math.isfinite(item.weight) and item.weight >= 0):
            raise AdapterError(
                f"{item.folder}: its weight is {item.weight:g}, need a finite number >= 0"
            )


def _with_common_names(adapters: Sequence[PeftAdapter]) -> list[PeftAdapter]:
    """Return the adapters with common names for their modules."""
    names = common_names([list(adapter.factors) for adapter in adapters])
    return [replace(adapter, factors=adapter.factors.named(names)) for adapter in adapters]


def _refuse_few_in_common(adapters: Sequence[PeftAdapter], modules: Sequence[str]) -> None:
    partly = [m for m in modules if not all(m in adapter.factors for adapter in adapters)]
    if 2 * len(partly) > len(modules):
        lacking = next(a for a in adapters if partly[0] not in a.factors)
        raise AdapterError(
            f"{len(partly)} of {len(modules)} modules are not in all adapters ({partly[0]} is not "
            f"in {lacking.folder}): most would be averaged with zero; leave out what does not "
            "belong together, or give --allow-missing"
        )


def _shapes(adapters: Sequence[PeftAdapter]) -> dict[str, ModuleShape]:
    """Return the shapes of all modules of all adapters, sorted by name."""
    shapes: dict[str, tuple[ModuleShape, Path]] = {}
    for adapter in adapters:
        for module in adapter.factors:
            shape = adapter.factors.shape(module)
            known, folder = shapes.setdefault(module, (shape, adapter.folder))
            if known != shape:
                raise AdapterError(
                    f"{module}: its weight is {known.out}x{known.in_} in {folder} and "
                    f"{shape.out}x{shape.in_} in {adapter.folder}: they are for different models"
                )
    return {module: shapes[module][0] for module in sorted(shapes)}


def _input(adapter: PeftAdapter, share: float, modules: Iterable[str]) -> CombinedInput:
    return CombinedInput(
        folder=adapter.folder,
        share=share,
        largest_rank=max(adapter.factors.rank(module) for module in adapter.factors),
        missing=tuple(module for module in modules if module not in adapter.factors),
    )


def _description(
    configs: Sequence[AdapterConfig], modules: Sequence[str], base: CommonBase
) -> PeftDescription:
    """Return the result's description: fields on which all agree, and the modules of any."""
    first = configs[0]
    agreed = {
        name: getattr(first, name)
        for name in ("task_type", "auto_mapping", "lora_dropout")
        if all(getattr(config, name) == getattr(first, name) for config in configs)
    }
    return PeftDescription(
        base_model=base.name,
        revision=base.revision,
        targets=_targets(configs, modules),
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        task_type=agreed.get("task_type"),
        auto_mapping=agreed.get("auto_mapping"),
        dropout=agreed.get("lora_dropout", 0.0),
    )


def _targets(configs: Sequence[AdapterConfig], modules: Sequence[str]) -> dict[str, Any]:
    """Return PEFT's fields that select `modules`: those of the inputs if they select them all."""
    first = configs[0]
    restricted = {name: getattr(first, name) for name in _RESTRICTIONS}
    same = all(getattr(c, name) == restricted[name] for c in configs for name in restricted)
    if same and all(c.target_modules == first.target_modules for c in configs):
        if _selects(first.target_modules, modules):
            return {"target_modules": first.target_modules, **restricted}
    elif same and not any(restricted.values()):
        lists = [c.target_modules for c in configs if isinstance(c.target_modules, list)]
        joined = sorted(set().union(*lists))
        if len(lists) == len(configs) and _selects(joined, modules):
            return {"target_modules": joined}
    return {"target_modules": list(modules)}


def _selects(targets: list[str] | str | None, modules: Sequence[str]) -> bool:
    """Return whether PEFT selects all modules by these targets; their names may have changed."""
    if isinstance(targets, list):
        return all(any(f".{m}".endswith(f".{name}") for name in targets) for m in modules)
    if targets is None or targets == _ALL_LINEAR:
        return True
    # a pattern that could take for ever is replaced by the names
    return not pattern_problem(targets) and all(re.fullmatch(targets, m) for m in modules)
