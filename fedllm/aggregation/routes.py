"""From blocks of clients' factors to the leading singular triplets of their weighted sum.

Blocks are folded one by one, each by itself, and then decomposed together, by the route that
their shapes ask for, for all modules of one shape at once. All values are finite: whoever reads
updates sees to that.

Legend: G modules, O out, I in, R stacked rank, C clients, K wanted rank.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedllm.aggregation.decomposition import (
    Decomposition,
    Partial,
    Problem,
    Route,
    Start,
    in_units,
)
from fedllm.aggregation.dense import DENSE
from fedllm.aggregation.factored import FACTORED
from fedllm.aggregation.iterative import ITERATIVE
from fedllm.aggregation.subspace import width
from fedllm.lora.factors import FactorBlock, Stacked
from fedllm.lora.spectral import with_fixed_signs

ROUTES: Mapping[str, Route] = {"factored": FACTORED, "iterative": ITERATIVE, "dense": DENSE}

# shares of the narrow side, where a route's time was measured to cross the next one's
_FEW_RANKS, _FEW_WANTED = 0.4, 0.4
_LARGE_SIDE = 512
_FLOAT32_TELLS = 1e-6  # relative excess of a residual


def route_for(problem: Problem) -> str:
    """Return the name of the route, from shapes and configuration alone: a rerun takes the same."""
    narrow = min(problem.out, problem.in_)
    precise = problem.exact or problem.tolerance < _FLOAT32_TELLS
    large = narrow >= _LARGE_SIDE and problem.stacked_rank > _FEW_RANKS * narrow
    if large and not precise and width(problem.rank, narrow) <= _FEW_WANTED * narrow:
        return "iterative"
    return "factored" if problem.stacked_rank < narrow else "dense"


def fold(block: FactorBlock, problem: Problem) -> Partial:
    """Return what a block's weighted sum of products comes to on the problem's route."""
    amounts_GC = block.weights_GC * block.scales_GC
    amounts_GR = amounts_GC.repeat_interleave(torch.tensor(block.ranks), dim=1)
    return fold_columns(block.b_GOR, block.a_GRI, amounts_GR, problem)


def fold_columns(b_GOR: Tensor, a_GRI: Tensor, amounts_GR: Tensor, problem: Problem) -> Partial:
    """Return the partial result of `sum_r amounts_r b_r a_r`, each column by its own amount."""
    route = ROUTES[route_for(problem)]
    return route.fold(b_GOR, a_GRI, amounts_GR.to(a_GRI.device))


def decompose(
    partials: Iterable[Partial], problem: Problem, *, total: float, start: Start | None = None
) -> list[Decomposition]:
    """Return the leading triplets of the sum of `partials` over `total`, module by module.

    At most min(rank, O, I, R) triplets, sorted, orthonormal also where singular values are zero,
    with fixed signs; the total energy is that of the whole sum. The same bits for the same
    partials, thread count and kind of device.

    Args:
        partials: of the blocks in the clients' order, each as `fold` returns it; used up.
        problem: the same as `fold` was given.
        total: what the weights of all blocks sum to.
        start: where an iterative route begins.
    """
    route = ROUTES[route_for(problem)]
    found = route.decompose(partials, problem, start or Start())
    return [
        in_units(replace(each, spectral=with_fixed_signs(each.spectral)), 1 / total)
        for each in found
    ]


def truncated_svd(stacked: Stacked, *, rank: int) -> Decomposition:
    """Return the leading `rank` singular triplets of `b_OR @ a_RI`, by a direct route in float64.

    Singular values and the truncated product agree with a dense float64 SVD to 1e-7 of the
    largest singular value where the summands do not cancel.
    """
    assert rank >= 1, f"rank {rank}"
    b_GOR, a_GRI = stacked.b_OR[None], stacked.a_RI[None]
    problem = Problem(
        out=b_GOR.shape[1], in_=a_GRI.shape[2], stacked_rank=stacked.rank, rank=rank, exact=True
    )
    block = FactorBlock(
        a_GRI=a_GRI,
        b_GOR=b_GOR,
        ranks=(stacked.rank,),
        scales_GC=torch.ones(1, 1, dtype=torch.float64),
        weights_GC=torch.ones(1, 1, dtype=torch.float64),
    )
    return decompose([fold(block, problem)], problem, total=1.0)[0]
