"""Groups of modules that are aggregated at once, and blocks of clients that are summed at once.

Both follow from shapes, ranks and configuration alone, never from arrived updates, devices or free
memory: a rerun on another machine forms the same groups and blocks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from fedllm.aggregation.route_types import Problem, RankPartition
from fedllm.aggregation.routes import route_for
from fedllm.lora.factors import ModuleShape

WORKING_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class ModuleRanks:
    """A module's shape, the rank of each client (0: none), and all ranks that anyone receives."""

    shape: ModuleShape
    clients: tuple[int, ...]
    received: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ModuleGroup:
    """Modules of one shape and equal ranks, aggregated side by side.

    Attributes:
        modules: their names.
        problem: the decomposition of each of them; its stacked rank is that of all clients.
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
    formed: bool = False,
    working_bytes: int = WORKING_BYTES,
) -> list[ModuleGroup]:
    """Return the groups of all modules, those that need most memory first.

    Args:
        modules: name -> shape and ranks; `clients` has the same length for all.
        block_clients: how many clients a block has.
        exact: see `Problem`.
        tolerance: see `Problem`.
        formed: whether the sum is formed, whatever the ranks: it gets a part of full rank.
        working_bytes: the memory of a group, unless one module alone needs more.
    """
    names_by_ranks: dict[ModuleRanks, list[str]] = {}
    for name, ranks in modules.items():
        names_by_ranks.setdefault(ranks, []).append(name)
    groups: list[tuple[int, ModuleGroup]] = []
    for ranks, names in names_by_ranks.items():
        problem = Problem(
            out=ranks.shape.out,
            in_=ranks.shape.in_,
            stacked_rank=sum(ranks.clients) + formed * ranks.shape.largest_rank,
            rank=max(ranks.received),
            exact=exact,
            tolerance=tolerance,
        )
        module_bytes = _bytes_of_module(problem, _largest_block(ranks.clients, block_clients))
        count = max(1, working_bytes // module_bytes)
        for begin in range(0, len(names), count):
            group = ModuleGroup(
                modules=tuple(names[begin : begin + count]),
                problem=problem,
                clients=ranks.clients,
                received=tuple(sorted(set(ranks.received))),
            )
            groups.append((len(group.modules) * module_bytes, group))
    # largest first: buffers have their final size at once, and devices end together
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

    The place in the cohort decides the block: leaving a client out makes its block smaller and
    changes no other. Clients are named by their places.

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
    return max((sum(ranks[begin : begin + block_clients]) for begin in begins), default=0)


def _bytes_of_module(problem: Problem, block_rank: int) -> int:
    """Return the peak memory of a module's aggregation, block by block.

    A block is in float32 memory three times: one is computed on, one filled, one copied to a GPU.
    """
    buffers = 4 * 3 * (problem.out + problem.in_) * block_rank
    return buffers + _PEAKS[route_for(problem)](problem, block_rank)


def _factored(problem: Problem, block_rank: int) -> int:
    """Return the bytes of all blocks side by side and of squares of the stacked rank, float64."""
    factors = (problem.out + problem.in_) * problem.stacked_rank
    copies = 1 if block_rank == problem.stacked_rank else 2
    # a triangle, a Gram matrix, their products, eigenvectors and LAPACK's workspace
    squares = 6 * problem.stacked_rank**2
    return 8 * (copies * factors + squares + _triplets(problem))


def _dense(problem: Problem, block_rank: int) -> int:
    """Return the larger peak: three products while summing, or one with its squares and Gram."""
    product, narrow = problem.out * problem.in_, min(problem.out, problem.in_)
    # one weighted copy of A
    folding = 3 * product + (problem.out + 2 * problem.in_) * block_rank
    # a Gram matrix, eigenvectors and LAPACK's workspace
    return 8 * max(folding, 2 * product + 3 * narrow**2 + _triplets(problem))


def _iterative(problem: Problem, block_rank: int) -> int:
    """Return the bytes of the sum, a block's product and factors, weighted A, and the search.

    All are in float32; the search has two copies of the sum in half of that.
    """
    product = problem.out * problem.in_
    folding = 3 * product + (problem.out + 2 * problem.in_) * block_rank
    return 4 * folding + 8 * _triplets(problem)


def _triplets(problem: Problem) -> int:
    """Return the count of numbers in a basis, in the matrix on it, and in the triplets of both."""
    return 3 * (problem.out + problem.in_ + problem.rank) * problem.rank


# by route, in bytes: counted here, checked against measured peaks in the tests
_PEAKS: Mapping[str, Callable[[Problem, int], int]] = {
    "factored": _factored,
    "dense": _dense,
    "iterative": _iterative,
}
