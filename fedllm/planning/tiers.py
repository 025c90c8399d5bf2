"""Tiers of clients, and the rank of every module in a tier: given, or what fits into memory."""

import random
from collections.abc import Mapping, Sequence

from fedllm.config.models import ClientsSection, Config, RankSpec
from fedllm.errors import ConfigError
from fedllm.planning.costs import adapter_weights
from fedllm.planning.quotas import largest_remainder
from fedllm.planning.seeding import seed_of
from fedllm.storage.records import FittedRecord, ModuleRecord

_GIB = 1 << 30
_NUMBER_BYTES = 4
# of each number of an adapter at the peak: trained, and its gradient
_COPIES = 2
_MOMENTS = {"adamw": 2, "sgd": 0}
# FlexLoRA (arXiv 2402.11505), the resource distributions over types 1 to 4
DISTRIBUTIONS = {
    "uniform": (25.0, 25.0, 25.0, 25.0),
    "heavy_tail_light": (80.0, 5.0, 5.0, 10.0),
    "heavy_tail_strong": (5.0, 5.0, 10.0, 80.0),
    "normal": (5.7, 44.3, 44.3, 5.7),
}


def tier_shares(section: ClientsSection) -> dict[str, float]:
    """Return tier -> share: from `clients.distribution`, from the tiers, or equal shares."""
    if section.distribution:
        return dict(zip(section.tiers, DISTRIBUTIONS[section.distribution], strict=True))
    # either every tier has a share or none has
    return {name: 1.0 if tier.share is None else tier.share for name, tier in section.tiers.items()}


def assign_tiers(section: ClientsSection, seed: int, ids: Sequence[str]) -> dict[str, str]:
    """Assign a tier to every client: by `clients.assign`, the others by exact quota.

    The draw depends only on `clients.tier_seed` (else `seed`) and the sorted ids.

    Raises:
        ConfigError: `clients.assign` names clients that are not in the data; it lists them all.
    """
    known = set(ids)
    unknown = [client for client in section.assign if client not in known]
    if unknown:
        raise ConfigError(
            "\n".join(
                f"clients.assign.{client}: no such client in the data; remove it"
                for client in unknown
            )
        )
    free = sorted(known - set(section.assign))
    tier_seed = seed if section.tier_seed is None else section.tier_seed
    random.Random(seed_of("tiers", tier_seed)).shuffle(free)
    assigned = dict(section.assign)
    start = 0
    for tier, count in largest_remainder(tier_shares(section), len(free)).items():
        assigned.update(dict.fromkeys(free[start : start + count], tier))
        start += count
    return assigned


def resolve_ranks(
    config: Config, modules: Mapping[str, ModuleRecord], fitted: Mapping[str, int] | None = None
) -> dict[str, dict[str, int]]:
    """Return tier -> module -> rank.

    Args:
        config: the configuration.
        modules: the target modules.
        fitted: the ranks of the tiers that have none in the configuration.

    Raises:
        ConfigError: a tier leaves modules without a rank, names modules that do not exist, or
            asks for a rank above a module's smaller side; all such problems together.
    """
    problems: list[str] = []
    resolved: dict[str, dict[str, int]] = {}
    for name, tier in config.clients.tiers.items():
        key = f"clients.tiers.{name}.ranks"
        resolved[name] = {}
        spec = (fitted or {})[name] if tier.ranks is None else tier.ranks
        problems += _unused_names(key, spec, modules)
        for path, module in modules.items():
            rank = _rank_of(spec, path, module)
            if rank is None:
                problems.append(f"{key}: no rank for {path} ({module.kind}); add one")
                break
            side = min(module.out_features, module.in_features)
            if rank > side and config.clients.ranks_above_module == "error":
                problems.append(
                    f"{key}: got {rank}, {path} is {module.out_features}x{module.in_features} and "
                    f"takes at most {side}; lower it or set clients.ranks_above_module: cap"
                )
                break
            resolved[name][path] = min(rank, side)
    if problems:
        raise ConfigError("\n".join(problems))
    return resolved


def _rank_of(spec: RankSpec, path: str, module: ModuleRecord) -> int | None:
    if isinstance(spec, int):
        return spec
    return spec.get(path, spec.get(path.rpartition(".")[2], spec.get(module.kind)))


def _unused_names(key: str, spec: RankSpec, modules: Mapping[str, ModuleRecord]) -> list[str]:
    if isinstance(spec, int):
        return []
    leaves = {path.rpartition(".")[2] for path in modules}
    valid = leaves | {module.kind for module in modules.values()} | set(modules)
    shown = ", ".join(sorted(valid - set(modules)))
    return [
        f"{key}.{name}: no such module; need one of {shown}" for name in spec if name not in valid
    ]


def candidate_ranks(config: Config, modules: Mapping[str, ModuleRecord]) -> list[int]:
    """Return the ranks of `clients.fit_ranks` that all modules take, ascending.

    Raises:
        ConfigError: they take none of them.
    """
    ranks = sorted(set(config.clients.fit_ranks))
    side = min(min(module.out_features, module.in_features) for module in modules.values())
    found = [rank for rank in ranks if rank <= side or config.clients.ranks_above_module == "cap"]
    if not found:
        raise ConfigError(
            f"clients.fit_ranks: got {', '.join(map(str, ranks))}, but the smallest module takes "
            f"at most {side}; add smaller ranks, or set clients.ranks_above_module: cap"
        )
    return found


def predicted_bytes(
    measured_bytes: int,
    *,
    ranks: Sequence[int],
    modules: Mapping[str, ModuleRecord],
    optimizer: str,
) -> dict[int, int]:
    """Return the peak memory of a process that trains clients of a rank, by rank.

    Args:
        measured_bytes: the peak at the first of `ranks`.
        ranks: each for all modules, at most up to a module's smaller side.
        modules: the target modules.
        optimizer: of the clients.
    """
    each = _NUMBER_BYTES * (_COPIES + _MOMENTS[optimizer])
    numbers = [adapter_weights(_of_modules(rank, modules), modules) for rank in ranks]
    return {
        rank: measured_bytes + each * (number - numbers[0])
        for rank, number in zip(ranks, numbers, strict=True)
    }


def fitted(
    tier: str, memory_gib: float, measured: int, predicted: Mapping[int, int]
) -> FittedRecord:
    """Return the largest rank whose predicted peak fits.

    Args:
        tier: its name, for the message.
        memory_gib: what it has.
        measured: the peak at the smallest rank.
        predicted: the peak by rank, ascending.

    Raises:
        ConfigError: not even the smallest one fits.
    """
    fits = [rank for rank, peak in predicted.items() if peak <= memory_gib * _GIB]
    smallest = min(predicted)
    if not fits:
        raise ConfigError(
            f"clients.tiers.{tier}.memory_gib: got {memory_gib:g}, but a process that trains at "
            f"rank {smallest}, the smallest of clients.fit_ranks, needs "
            f"{predicted[smallest] / _GIB:.3g} GiB; need more memory, "
            "training.gradient_checkpointing: true, or a smaller training.micro_batch_size"
        )
    return FittedRecord(
        rank=max(fits),
        measured_rank=smallest,
        measured_bytes=measured,
        predicted_bytes=dict(predicted),
    )


def _of_modules(rank: int, modules: Mapping[str, ModuleRecord]) -> dict[str, int]:
    return {
        name: min(rank, module.out_features, module.in_features) for name, module in modules.items()
    }
