"""Leading singular triplets of the weighted sum of clients' factors.

Each block of clients is folded by itself. Then all blocks are decomposed together, by the route
that fits their shapes, for all modules of one shape at once. All values must be finite: the code
that reads updates checks that.

Legend: G modules, O out, I in, R stacked rank, C clients, K wanted rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedllm.aggregation.dense_route import DENSE
from fedllm.aggregation.factored_route import FACTORED
from fedllm.aggregation.iterative_route import ITERATIVE
from fedllm.aggregation.route_types import (
    Decomposition,
    Partial,
    Problem,
    Route,
    Start,
    scaled,
)
from fedllm.aggregation.subspace import width
from fedllm.lora.factors import FactorBlock, Stacked
from fedllm.lora.spectral import with_fixed_signs

ROUTES: Mapping[str, Route] = {"factored": FACTORED, "iterative": ITERATIVE, "dense": DENSE}

# shares of the narrow side where, as measured, the next route becomes the faster one
_MANY_RANKS, _MANY_WANTED = 0.4, 0.4
_LARGE_SIDE = 512
_FLOAT32_TOLERANCE = 1e-6  # the smallest relative excess that float32 can certify


def route_for(problem: Problem) -> str:
    """Return the name of the route, from shapes and configuration alone: a rerun takes the same."""
    narrow = min(problem.out, problem.in_)
    precise = problem.exact or problem.share or problem.tolerance < _FLOAT32_TOLERANCE
    large = narrow >= _LARGE_SIDE and problem.stacked_rank > _MANY_RANKS * narrow
    if large and not precise and width(problem.rank, narrow) <= _MANY_WANTED * narrow:
        return "iterative"
    return "factored" if problem.stacked_rank < narrow else "dense"


def fold(block: FactorBlock, problem: Problem) -> Partial:
    """Return the partial result of a block: its weighted sum of products in the route's form."""
    coefficients_GC = block.weights_GC * block.scales_GC
    coefficients_GR = coefficients_GC.repeat_interleave(torch.tensor(block.ranks), dim=1)
    return fold_columns(block.b_GOR, block.a_GRI, coefficients_GR, problem)


def fold_columns(
    b_GOR: Tensor, a_GRI: Tensor, coefficients_GR: Tensor, problem: Problem
) -> Partial:
    """Return the partial result of `sum_r c_r b_r a_r`, c the coefficient of each column."""
    route = ROUTES[route_for(problem)]
    return route.fold(b_GOR, a_GRI, coefficients_GR.to(a_GRI.device))


def formed(problem: Problem) -> Problem:
    """Return the problem of a sum that has no factors of fewer columns than the narrow side."""
    return replace(problem, stacked_rank=max(problem.stacked_rank, problem.out, problem.in_))


def fold_formed(w_GOI: Tensor, problem: Problem) -> Partial:
    """Return a sum that is formed as a partial result; `problem` is as `formed` returns it."""
    return {"W": w_GOI.float() if route_for(problem) == "iterative" else w_GOI.double()}


def decompose(
    partials: Iterable[Partial], problem: Problem, *, total: float, start: Start | None = None
) -> list[Decomposition]:
    """Return the leading triplets of the sum of `partials` over `total`, module by module.

    There are at most min(rank, O, I, R) triplets, sorted, with fixed signs, and orthonormal even
    where singular values are zero. The total energy is that of the whole sum. The same partials,
    thread count and kind of device give the same bits.

    Args:
        partials: the result of `fold` for each block, in the clients' order; consumed.
        problem: the one given to `fold`.
        total: the sum of the weights of all blocks.
        start: the start of an iterative route.
    """
    route = ROUTES[route_for(problem)]
    decompositions = route.decompose(partials, problem, start or Start())
    return [
        scaled(replace(item, spectral=with_fixed_signs(item.spectral)), 1 / total)
        for item in decompositions
    ]


def truncated_svd(stacked: Stacked, *, rank: int) -> Decomposition:
    """Return the leading `rank` singular triplets of `b_OR @ a_RI`, by a direct route in float64.

    Singular values and the truncated product agree with a dense float64 SVD to 1e-7 of the largest
    singular value where the summands do not cancel.
    """
    return truncated_svds([stacked], rank=rank)[0]


def truncated_svds(stacks: Sequence[Stacked], *, rank: int) -> list[Decomposition]:
    """Return the same of products of one shape and stacked rank, side by side."""
    assert rank >= 1, f"rank {rank}"
    b_GOR = torch.stack([stacked.b_OR for stacked in stacks])
    a_GRI = torch.stack([stacked.a_RI for stacked in stacks])
    problem = Problem(
        out=b_GOR.shape[1], in_=a_GRI.shape[2], stacked_rank=a_GRI.shape[1], rank=rank, exact=True
    )
    block = FactorBlock(
        a_GRI=a_GRI,
        b_GOR=b_GOR,
        ranks=(problem.stacked_rank,),
        scales_GC=torch.ones(len(stacks), 1, dtype=torch.float64),
        weights_GC=torch.ones(len(stacks), 1, dtype=torch.float64),
    )
    return decompose([fold(block, problem)], problem, total=1.0)
