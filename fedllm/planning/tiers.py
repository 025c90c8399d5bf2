"""Tiers of clients, and the rank of every module in a tier."""

import random
from collections.abc import Mapping, Sequence

from fedllm.config.models import ClientsSection, Config, RankSpec
from fedllm.errors import ConfigError
from fedllm.planning.quotas import largest_remainder
from fedllm.planning.seeding import seed_of
from fedllm.storage.records import ModuleRecord

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


def resolve_ranks(config: Config, modules: Mapping[str, ModuleRecord]) -> dict[str, dict[str, int]]:
    """Return tier -> module -> rank.

    Raises:
        ConfigError: a tier leaves modules without a rank, names modules that do not exist, or
            asks for a rank above a module's smaller side; all such problems together.
    """
    problems: list[str] = []
    resolved: dict[str, dict[str, int]] = {}
    for name, tier in config.clients.tiers.items():
        key = f"clients.tiers.{name}.ranks"
        resolved[name] = {}
        problems += _unused_names(key, tier.ranks, modules)
        for path, module in modules.items():
            rank = _rank_of(tier.ranks, path, module)
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
