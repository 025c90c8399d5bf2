"""PEFT adapters of any ranks into one: what a round aggregates, from folders that users have."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors, ModuleShape
from fedllm.methods.protocol import Method
from fedllm.methods.table import build_method
from fedllm.model.adapter_config import CONFIG, AdapterConfig
from fedllm.model.adapter_files import (
    DTYPES,
    PeftAdapter,
    PeftDescription,
    read_peft_adapter,
    write_peft_adapter,
)
from fedllm.model.device import resolve_device
from fedllm.storage.outputs import filling

RankWish: TypeAlias = int | Literal["full"] | None
Watch: TypeAlias = Callable[[Sequence[str]], Iterable[str]]

_SEED = 0  # of directions in which nothing was trained
_RESTRICTIONS = ("exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True, kw_only=True)
class WeightedAdapter:
    """An adapter folder and its weight, not yet normalised."""

    folder: Path
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CombineRequest:
    """What to combine, and what to write.

    `rank` is a number, `full` (the stacked ranks: nothing is lost), or None: the largest that an
    input has, module by module. No module gets more than its smaller side. `dtype` is one of
    `DTYPES`; `out` is a new or empty folder.
    """

    adapters: Sequence[WeightedAdapter]
    out: Path
    rank: RankWish = None
    method: str = "flexlora"
    device: str = "auto"
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class CombinedInput:
    """An adapter as it entered: its share (all sum to 1) and the modules that it lacks."""

    folder: Path
    share: float
    largest_rank: int
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CombinedModule:
    """A module of the result: its rank, whether its smaller side set it, and what it keeps.

    `energy_kept` is a share of `energy`, the squared Frobenius norm of the weighted mean.
    """

    rank: int
    capped: bool
    energy: float
    energy_kept: float


@dataclass(frozen=True, kw_only=True)
class Combined:
    """What was combined into which modules."""

    base_model: str | None
    inputs: tuple[CombinedInput, ...]
    modules: Mapping[str, CombinedModule]

    @property
    def energy_kept(self) -> float:
        """The share of the squared norm of all modules together."""
        total = math.fsum(module.energy for module in self.modules.values())
        kept = math.fsum(module.energy * module.energy_kept for module in self.modules.values())
        return kept / total if total else 1.0


def combine_adapters(request: CombineRequest, *, watch: Watch = iter) -> Combined:
    """Write the weighted mean of the adapters' changes as one PEFT adapter.

    All headers are checked before anything is computed; factors are read module by module, so
    that never more than one module of all adapters is in memory.

    Args:
        request: what to combine.
        watch: is given the modules and yields them (a progress bar).

    Raises:
        AdapterError: adapters that cannot be read or combined.
        ConfigError: a method or device that does not exist.
        DataError: weights that sum to zero.
        RunDirectoryError: `out` cannot be written.
    """
    dtype = _dtype(request.dtype)
    _check_numbers(request)
    adapters = [read_peft_adapter(item.folder) for item in request.adapters]
    _refuse_other_bases(adapters)
    shapes = _shapes(adapters)
    # alpha = 2r: a scale of 2 at every rank, which PEFT gets exactly from alpha and rank
    method = build_method(request.method, seed=_SEED, alpha=2.0, scaling="proportional")
    shares = method.weigh([item.weight for item in request.adapters])
    mean = _Mean(
        adapters=adapters, shares=shares, method=method, device=resolve_device(request.device)
    )
    factors: dict[str, Factors] = {}
    modules: dict[str, CombinedModule] = {}
    with filling(request.out, last=CONFIG) as folder:
        for module in watch(list(shapes)):
            factors[module], modules[module] = mean.of(module, shapes[module], request.rank)
        about = _description([adapter.config for adapter in adapters], list(shapes))
        write_peft_adapter(folder, factors, about=about, dtype=dtype)
    return Combined(
        base_model=about.base_model,
        inputs=tuple(_input(*pair, shapes) for pair in zip(adapters, shares, strict=True)),
        modules=modules,
    )


@dataclass(frozen=True, kw_only=True)
class _Mean:
    """The weighted mean, module by module."""

    adapters: Sequence[PeftAdapter]
    shares: Sequence[float]
    method: Method
    device: torch.device

    def of(self, module: str, shape: ModuleShape, wish: RankWish) -> tuple[Factors, CombinedModule]:
        """Return one module of the result; an adapter without it counts as zero."""
        having = [
            (adapter, share)
            for adapter, share in zip(self.adapters, self.shares, strict=True)
            if module in adapter.factors
        ]
        held = [adapter.factors.rank(module) for adapter, _ in having]
        rank = min(wanted := _wanted(wish, held), shape.largest_rank)
        result = self.method.aggregate_module(
            module=module,
            state=self.method.start_module(module=module, shape=shape, rank=rank),
            updates=_OnDevice([adapter for adapter, _ in having], module, self.device),
            weights=[share for _, share in having],
            ranks=[rank],
        )
        if self.method.base_delta(result.state) is not None:
            raise AdapterError(f"--method {self.method.name}: changes the base, not only adapters")
        return (
            self.method.module_adapter(module=module, state=result.state, rank=rank),
            CombinedModule(
                rank=rank,
                capped=wanted > rank,
                energy=result.diagnostics.total_energy,
                energy_kept=result.diagnostics.ranks[0].energy_kept,
            ),
        )


@dataclass(frozen=True)
class _OnDevice:
    """One module's factors of the adapters that have it, read when iterated."""

    adapters: Sequence[PeftAdapter]
    module: str
    device: torch.device

    def __len__(self) -> int:
        return len(self.adapters)

    def __iter__(self) -> Iterator[Factors]:
        for adapter in self.adapters:
            factors = adapter.factors[self.module]
            yield Factors(
                a_RI=factors.a_RI.to(self.device),
                b_OR=factors.b_OR.to(self.device),
                scale=factors.scale,
            )


def _wanted(wish: RankWish, held: Sequence[int]) -> int:
    if wish is None:
        return max(held)
    return sum(held) if wish == "full" else wish


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise AdapterError(f"--dtype: got {name!r}, need one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_numbers(request: CombineRequest) -> None:
    if isinstance(request.rank, int) and request.rank < 1:
        raise AdapterError(f"--rank: got {request.rank}, need >= 1, or full")
    for item in request.adapters:
        if not (math.isfinite(item.weight) and item.weight >= 0):
            raise AdapterError(
                f"{item.folder}: its weight is {item.weight:g}, need a finite number >= 0"
            )


def _refuse_other_bases(adapters: Sequence[PeftAdapter]) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        if other.config.base != first.config.base:
            names = [a.config.base or "a base it does not name" for a in (first, other)]
            raise AdapterError(
                f"{first.folder} is for {names[0]} and {other.folder} for {names[1]}: "
                "adapters of different base models cannot be combined"
            )


def _shapes(adapters: Sequence[PeftAdapter]) -> dict[str, ModuleShape]:
    """Return every module that any adapter has, sorted."""
    found: dict[str, tuple[ModuleShape, Path]] = {}
    for adapter in adapters:
        for module in adapter.factors:
            shape = adapter.factors.shape(module)
            known, folder = found.setdefault(module, (shape, adapter.folder))
            if known != shape:
                raise AdapterError(
                    f"{module}: its weight is {known.out}x{known.in_} in {folder} and "
                    f"{shape.out}x{shape.in_} in {adapter.folder}: they are for different models"
                )
    return {module: found[module][0] for module in sorted(found)}


def _input(adapter: PeftAdapter, share: float, modules: Iterable[str]) -> CombinedInput:
    return CombinedInput(
        folder=adapter.folder,
        share=share,
        largest_rank=max(adapter.factors.rank(module) for module in adapter.factors),
        missing=tuple(module for module in modules if module not in adapter.factors),
    )


def _description(configs: Sequence[AdapterConfig], modules: Sequence[str]) -> PeftDescription:
    """Return what the result carries over: what all agree on, and the modules of any."""
    first = configs[0]
    agreed = {
        name: getattr(first, name)
        for name in ("task_type", "auto_mapping", "lora_dropout")
        if all(getattr(config, name) == getattr(first, name) for config in configs)
    }
    return PeftDescription(
        base_model=first.base_model_name_or_path,
        revision=first.revision,
        targets=_targets(configs, modules),
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        task_type=agreed.get("task_type"),
        auto_mapping=agreed.get("auto_mapping"),
        dropout=agreed.get("lora_dropout", 0.0),
    )


def _targets(configs: Sequence[AdapterConfig], modules: Sequence[str]) -> dict[str, Any]:
    """Return PEFT's fields that choose `modules`, in the words of the inputs where they can."""
    first = configs[0]
    restricted = {name: getattr(first, name) for name in _RESTRICTIONS}
    same = all(getattr(c, name) == restricted[name] for c in configs for name in restricted)
    if same and all(c.target_modules == first.target_modules for c in configs):
        return {"target_modules": first.target_modules, **restricted}
    if same and not any(restricted.values()):
        lists = [c.target_modules for c in configs if isinstance(c.target_modules, list)]
        if len(lists) == len(configs):
            return {"target_modules": sorted(set().union(*lists))}
    return {"target_modules": list(modules)}
