"""The part of a mean of products that holds a share of its energy: its fewest leading triplets.

More triplets may hold the share than anyone receives. Where a route forms W, their sum is
W V_k V_k^T, V_k the right singular vectors.

Legend: G modules, O out, I in, N narrow side, K triplets.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedllm.aggregation import dense_route, iterative_route, routes
from fedllm.aggregation.orthogonal import orthonormal
from fedllm.aggregation.route_types import (
    Decomposition,
    Partial,
    Problem,
    Start,
    ritz_triplets,
    split_modules,
    transposed,
)
from fedllm.lora.factors import FactorBlock
from fedllm.lora.spectral import truncate, with_fixed_signs
from fedllm.methods.residuals.base_state import Added

_LARGE_SIDE = 512
# a float32 Gram matrix of thousands of columns tells energies to some 1e-6 of the whole
_LARGEST_SHARE = 0.999
_SMALLEST = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class Held:
    """A mean of products: its leading triplets that anyone receives, and what holds the share.

    `held` is the sum of the fewest leading triplets that do, and `energy` is its energy.
    """

    leading: Decomposition
    held: Added
    energy: float

    def tail(self) -> Added:
        """Return what holds the share without the leading triplets."""
        triplets = self.leading.spectral
        if self.energy <= float(triplets.s_R.double().square().sum()):
            return Added(b_OK=triplets.u_OR[:, :0], a_KI=triplets.vh_RI[:0])
        if self.held.w_OI is None:
            rank = triplets.rank
            return Added(b_OK=self.held.b_OK[:, rank:], a_KI=self.held.a_KI[rank:])
        leading_OI = ((triplets.u_OR * triplets.s_R) @ triplets.vh_RI).float()
        return Added.of_formed(self.held.w_OI - leading_OI)


def fold(block: FactorBlock, problem: Problem, share: float) -> Partial:
    """Return sum_i n_i s_i B_i A_i of a block, as the route to its triplets holds it."""
    problem = replace(problem, share=share)
    if not _is_formed(problem):
        return routes.fold(block, problem)
    coefficients_GC = block.weights_GC * block.scales_GC
    coefficients_GR = coefficients_GC.repeat_interleave(torch.tensor(block.ranks), dim=1)
    of_route = dense_route.fold if problem.exact else iterative_route.fold
    return of_route(block.b_GOR, block.a_GRI, coefficients_GR.to(block.a_GRI.device))


def hold(
    partials: Iterable[Partial], problem: Problem, share: float, *, total: float, start: Start
) -> list[Held]:
    """Return what holds a share of the energy of the sum of `partials` over `total`."""
    problem = replace(problem, share=share)
    if _is_formed(problem):
        return _of_sum(dense_route.summed(partials) / total, problem)
    found = routes.decompose(partials, problem, total=total, start=start)
    return [_of_triplets(each, problem) for each in found]


def fewest(energies_N: Tensor, share: float, total: float) -> int:
    """Return the fewest leading directions with this share of all energy; at least one.

    `energies_N` are float64, from the largest.
    """
    if share >= 1:
        return len(energies_N)
    # rounding of the sum does not ask for one more
    wanted = share * total * (1 - 1e-12)
    return min(len(energies_N), 1 + int((energies_N.cumsum(0) < wanted).sum()))


def _is_formed(problem: Problem) -> bool:
    return routes.route_for(problem) == "dense"


def _of_triplets(found: Decomposition, problem: Problem) -> Held:
    triplets = found.spectral
    energies = triplets.s_R.double().square()
    # the sum has no higher rank, whatever a route finds behind
    count = min(problem.stacked_rank, fewest(energies, problem.share, found.total_energy))
    held = Added(b_OK=triplets.u_OR[:, :count] * triplets.s_R[:count], a_KI=triplets.vh_RI[:count])
    return Held(
        leading=_cut(found, problem.rank),
        held=held,
        energy=float(energies[:count].sum()),
    )


def _cut(found: Decomposition, rank: int) -> Decomposition:
    """Return the leading `rank` triplets; the energy of the others is in the residual."""
    if found.spectral.rank <= rank:
        return found
    behind = float(found.spectral.s_R[rank:].double().square().sum())
    certificate = replace(
        found.certificate, residual_energy=found.certificate.residual_energy + behind
    )
    spectral = truncate(found.spectral, rank)
    return replace(found, spectral=spectral, certificate=certificate)


def _of_sum(w_GOI: Tensor, problem: Problem) -> list[Held]:
    """Return the same of a sum that is formed, through the Gram matrix of its narrow side."""
    wide = problem.out < problem.in_
    found = []
    for w_MN in w_GOI.mT if wide else w_GOI:
        number = w_MN.to(_number_format(w_MN, problem))
        values, vectors = torch.linalg.eigh(number.mT @ number)
        values_N, vectors_NN = values.double().flip(0).clamp(min=0.0), vectors.flip(1)
        energy = float(torch.linalg.vector_norm(w_MN, dtype=torch.float64)) ** 2
        count = fewest(values_N, problem.share, energy)
        held_MN = _projected(number, vectors_NN, count)
        basis = orthonormal(vectors_NN[:, : min(problem.rank, len(values_N))].double()[None])
        (narrow,) = split_modules(ritz_triplets(basis, (w_MN.double() @ basis).mT))
        triplets = narrow if wide else transposed(narrow)
        found.append(
            Held(
                leading=Decomposition(
                    spectral=with_fixed_signs(triplets),
                    total_energy=energy,
                    route="dense",
                    certificate=dense_route.direct_certificate(
                        energy, triplets.s_R, values.double()
                    ),
                ),
                held=Added.of_formed((held_MN.mT if wide else held_MN).float()),
                energy=min(energy, float(values_N[:count].sum())),
            )
        )
    return found


def _number_format(w_MN: Tensor, problem: Problem) -> torch.dtype:
    """Return float32 where it tells the share well enough and takes half of the time."""
    peak = float(w_MN.abs().max())
    fits = _SMALLEST < peak < 1 / _SMALLEST  # squares of squares, too
    is_plain = not problem.exact and problem.share <= _LARGEST_SHARE and fits
    return torch.float32 if is_plain and min(w_MN.shape) >= _LARGE_SIDE else torch.float64


def _projected(w_MN: Tensor, vectors_NN: Tensor, count: int) -> Tensor:
    """Return the part of W in the first `count` directions, by the smaller product."""
    if 2 * count <= len(vectors_NN):
        held_NK = vectors_NN[:, :count]
        return (w_MN @ held_NK) @ held_NK.mT
    rest_NK = vectors_NN[:, count:]
    return w_MN - (w_MN @ rest_NK) @ rest_NK.mT
