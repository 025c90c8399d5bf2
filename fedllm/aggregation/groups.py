"""Which modules are aggregated at once, and in which blocks clients are summed.

Both follow from shapes, ranks and configuration alone, never from what has arrived, from devices
or from memory that is free: a rerun on another machine forms the same groups and blocks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from fedllm.aggregation.decomposition import Problem, RankPartition
from fedllm.aggregation.routes import route_for
from fedllm.lora.factors import ModuleShape

WORKING_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class ModuleRanks:
    """A module's shape, each client's rank of it (0: none), and all ranks that anyone receives."""

    shape: ModuleShape
    clients: tuple[int, ...]
    received: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ModuleGroup:
    """Modules of one shape and equal ranks, aggregated side by side.

    Attributes:
        modules: their names.
        problem: what is to be decomposed for each; its stacked rank is that of all clients.
        clients: the rank of each client (0: it has no such modules).
        received: all ranks that anyone receives of them, ascending.
    """

    modules: tuple[str, ...]
    problem: Problem
    clients: tuple[int, ...]
    received: tuple[int, ...]


def group_modules(
    modules: Mapping[str, ModuleRanks],
    *,
    block_clients: int,
    exact: bool,
    tolerance: float,
    working_bytes: int = WORKING_BYTES,
) -> list[ModuleGroup]:
    """Return the groups of all modules, those that take most first.

    Args:
        modules: name -> shape and ranks; `clients` has the same length for all.
        block_clients: how many clients a block has.
        exact: see `Problem`.
        tolerance: see `Problem`.
        working_bytes: of a group, unless one module alone takes more.
    """
    alike: dict[ModuleRanks, list[str]] = {}
    for name, ranks in modules.items():
        alike.setdefault(ranks, []).append(name)
    groups: list[tuple[int, ModuleGroup]] = []
    for ranks, names in alike.items():
        problem = Problem(
            out=ranks.shape.out,
            in_=ranks.shape.in_,
            stacked_rank=sum(ranks.clients),
            rank=max(ranks.received),
            exact=exact,
            tolerance=tolerance,
        )
        each = _bytes_of_module(problem, _largest_block(ranks.clients, block_clients))
        count = max(1, working_bytes // each)
        for begin in range(0, len(names), count):
            group = ModuleGroup(
                modules=tuple(names[begin : begin + count]),
                problem=problem,
                clients=ranks.clients,
                received=tuple(sorted(set(ranks.received))),
            )
            groups.append((len(group.modules) * each, group))
    # buffers then have their size from the start, and devices end together
    return [group for _, group in sorted(groups, key=lambda pair: -pair[0])]


def with_weights(group: ModuleGroup, weights: Mapping[int, float]) -> ModuleGroup:
    """Return the group with the weight of every partition of its ranks in its problem.

    Args:
        group: modules of equal ranks.
        weights: the weight of each client that takes part, by its place in `group.clients`.
    """
    ranks = sorted({0, *group.clients, *group.received})
    partitions = tuple(
        RankPartition(
            begin=begin,
            end=end,
            weight=math.fsum(w for place, w in weights.items() if group.clients[place] >= end),
        )
        for begin, end in pairwise(ranks)
    )
    return replace(group, problem=replace(group.problem, partitions=partitions))


def blocks_of(places: Sequence[int], block_clients: int) -> list[tuple[int, ...]]:
    """Return the clients of each block that has any.

    Blocks are cut by the place in the cohort: where a client is left out its block gets smaller,
    and all others stay as they were. Clients are known by their places.

    Args:
        places: the clients' places in the cohort, ascending.
        block_clients: how many places a block has.
    """
    blocks: dict[int, list[int]] = {}
    for place in places:
        blocks.setdefault(place // block_clients, []).append(place)
    return [tuple(block) for block in blocks.values()]


def _largest_block(ranks: Sequence[int], block_clients: int) -> int:
    """Return the largest stacked rank of a block."""
    begins = range(0, len(ranks), block_clients)
    return max(sum(ranks[begin : begin + block_clients]) for begin in begins)


def _bytes_of_module(problem: Problem, block_rank: int) -> int:
    """Return what a module's aggregation takes at its peak, block by block.

    Blocks lie in float32 three times: one is computed on, one filled, one travels to a GPU.
    """
    buffers = 4 * 3 * (problem.out + problem.in_) * block_rank
    return buffers + _PEAKS[route_for(problem)](problem, block_rank)


def _factored(problem: Problem, block_rank: int) -> int:
    """All blocks, which are put side by side, and squares of the stacked rank, all in float64."""
    factors = (problem.out + problem.in_) * problem.stacked_rank
    copies = 1 if block_rank == problem.stacked_rank else 2
    # a triangle, a Gram matrix, their products, eigenvectors and what LAPACK works in
    squares = 6 * problem.stacked_rank**2
    return 8 * (copies * factors + squares + _triplets(problem))


def _dense(problem: Problem, block_rank: int) -> int:
    """Three products while blocks are summed; then one, its squares and those of its Gram."""
    product, narrow = problem.out * problem.in_, min(problem.out, problem.in_)
    # A once more as it is weighted
    folding = 3 * product + (problem.out + 2 * problem.in_) * block_rank
    # a Gram matrix, eigenvectors and what LAPACK works in
    return 8 * max(folding, 2 * product + 3 * narrow**2 + _triplets(problem))


def _iterative(problem: Problem, block_rank: int) -> int:
    """The sum, a block's product, its factors, A once more as it is weighted, and the search.

    All in float32; the search has two copies of the sum in half of that.
    """
    product = problem.out * problem.in_
    folding = 3 * product + (problem.out + 2 * problem.in_) * block_rank
    return 4 * folding + 8 * _triplets(problem)


def _triplets(problem: Problem) -> int:
    """Return the numbers of a basis, of the matrix on it, and of the triplets from both."""
    return 3 * (problem.out + problem.in_ + problem.rank) * problem.rank


# by route, in bytes: counted, and held against what is measured
_PEAKS: Mapping[str, Callable[[Problem, int], int]] = {
    "factored": _factored,
    "dense": _dense,
    "iterative": _iterative,
}
