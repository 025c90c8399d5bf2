"""Directions of a module, with the share of the clients that train them, by tier shares."""

from dataclasses import dataclass
from itertools import pairwise

from fedllm.planning.federation import Federation
from fedllm.planning.tiers import tier_shares


@dataclass(frozen=True, kw_only=True)
class DirectionsPlan:
    """Directions `first` to `last`, from 1, of the modules with these names.

    `share` is the share of the clients whose rank reaches `last`.
    """

    modules: tuple[str, ...]
    first: int
    last: int
    share: float


def plan_directions(federation: Federation) -> tuple[DirectionsPlan, ...]:
    """Return the ranges of directions between the ranks, for modules of equal ranks together."""
    shares = tier_shares(federation.config.clients)
    total = sum(shares.values())
    names_by_ranks: dict[tuple[int, ...], dict[str, None]] = {}
    for path in federation.prepared.modules:
        ranks = tuple(federation.ranks[tier][path] for tier in shares)
        names_by_ranks.setdefault(ranks, {})[path.rpartition(".")[2]] = None
    return tuple(
        DirectionsPlan(
            modules=tuple(names),
            first=begin + 1,
            last=end,
            share=sum(s for s, rank in zip(shares.values(), ranks, strict=True) if rank >= end)
            / total,
        )
        for ranks, names in names_by_ranks.items()
        for begin, end in pairwise(sorted({0, *ranks}))
    )
