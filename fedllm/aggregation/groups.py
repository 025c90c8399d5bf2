"""Which modules are aggregated at once, and in which blocks clients are summed.

Both follow from shapes, ranks and configuration alone, never from what has arrived, from devices
or from memory that is free: a rerun on another machine forms the same groups and blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.aggregation.decomposition import Problem
from fedllm.aggregation.routes import is_summed, route_for
from fedllm.lora.factors import ModuleShape

WORKING_BYTES = 512 << 20  # of a group, unless one module alone takes more


@dataclass(frozen=True, kw_only=True)
class ModuleRanks:
    """A module's shape, each client's rank of it (0: none), and all ranks that anyone receives."""

    shape: ModuleShape
    clients: tuple[int, ...]
    received: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Group:
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
    modules: Mapping[str, ModuleRanks], *, block_clients: int, exact: bool, tolerance: float
) -> list[Group]:
    """Return the groups of all modules, those of the largest modules first.

    Args:
        modules: name -> shape and ranks; `clients` has the same length for all.
        block_clients: how many clients a block has.
        exact: see `Problem`.
        tolerance: see `Problem`.
    """
    alike: dict[ModuleRanks, list[str]] = {}
    for name, ranks in modules.items():
        alike.setdefault(ranks, []).append(name)
    groups: list[tuple[int, Group]] = []
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
        count = max(1, WORKING_BYTES // each)
        for begin in range(0, len(names), count):
            group = Group(
                modules=tuple(names[begin : begin + count]),
                problem=problem,
                clients=ranks.clients,
                received=tuple(sorted(set(ranks.received))),
            )
            groups.append((each, group))
    # buffers then have their size from the start, and devices end together
    return [group for _, group in sorted(groups, key=lambda pair: -pair[0])]


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
    """Return roughly what a module's aggregation takes at its peak, block by block."""
    sides = problem.out + problem.in_
    summed = is_summed(route_for(problem))
    held = problem.out * problem.in_ if summed else sides * problem.stacked_rank
    return 8 * held + 12 * sides * block_rank  # a block in float32, then in float64
