"""Cohorts that go through a chosen route, whatever route their shapes would take."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedllm.aggregation.route_types import Decomposition, Partial, Problem, Start
from fedllm.aggregation.routes import ROUTES
from fedllm.lora.factors import FactorBlock, Factors
from fedllm.lora.spectral import Spectral
from tests.lora.adapters import Cohort

_EXACT = torch.float64
Cuts = Sequence[int]  # the sizes of blocks, in the clients' order


def problem_of(cohort: Cohort, rank: int, *, tolerance: float = 1e-4) -> Problem:
    return Problem(
        out=cohort.shape.out,
        in_=cohort.shape.in_,
        stacked_rank=sum(item.rank for item in cohort.factors),
        rank=rank,
        tolerance=tolerance,
    )


def block_of(factors: Sequence[Sequence[Factors]], weights: Sequence[float]) -> FactorBlock:
    """Return the block of some clients' factors of G modules: one list of clients per module."""
    return FactorBlock(
        a_GRI=torch.stack([torch.cat([item.a_RI for item in module]) for module in factors]),
        b_GOR=torch.stack([torch.cat([item.b_OR for item in module], dim=1) for module in factors]),
        ranks=tuple(item.rank for item in factors[0]),
        scales_GC=torch.tensor([[i.scale for i in module] for module in factors], dtype=_EXACT),
        weights_GC=torch.tensor([list(weights)] * len(factors), dtype=_EXACT),
    )


def blocks_of(cohorts: Sequence[Cohort], cuts: Cuts | None = None) -> list[FactorBlock]:
    """Return the blocks of G modules whose clients have equal ranks and weights."""
    weights, blocks, begin = cohorts[0].weights, [], 0
    for size in cuts or [len(weights)]:
        part = slice(begin, begin + size)
        blocks.append(block_of([cohort.factors[part] for cohort in cohorts], weights[part]))
        begin += size
    assert begin == len(weights)
    return blocks


def partials_of(name: str, blocks: Sequence[FactorBlock]) -> list[Partial]:
    """Fold blocks by a route."""
    found = []
    for block in blocks:
        coefficients_GC = block.weights_GC * block.scales_GC
        coefficients_GR = coefficients_GC.repeat_interleave(torch.tensor(block.ranks), dim=1)
        found.append(ROUTES[name].fold(block.b_GOR, block.a_GRI, coefficients_GR))
    return found


def through(
    name: str, cohort: Cohort, rank: int, *, cuts: Cuts | None = None, near: Tensor | None = None
) -> Decomposition:
    """Return the decomposition of one module by a route."""
    partials = partials_of(name, blocks_of([cohort], cuts))
    start = Start(seed=7, near_GKI=near)
    (found,) = ROUTES[name].decompose(partials, problem_of(cohort, rank), start)
    return found


def rounding_of(name: str) -> float:
    """Return the rounding unit of a route: that of the sums of its blocks."""
    factor = torch.ones(1, 1, 1)
    partial = ROUTES[name].fold(factor, factor, torch.ones(1, 1, dtype=torch.float64))
    return max(torch.finfo(tensor.dtype).eps for tensor in partial.values())


def product(spectral: Spectral) -> Tensor:
    return (spectral.u_OR.double() * spectral.s_R.double()) @ spectral.vh_RI.double()
