"""Results of a route, and the last step that all routes share.

Legend: G modules, O out, I in, R stacked rank, K wanted rank.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from fedllm.aggregation.orthogonal import NEARLY_ORTHOGONAL, triangle
from fedllm.lora.spectral import Spectral

RESOLUTION = 1e-11  # of the energy: float32 sums cannot tell less from zero

Partial: TypeAlias = Mapping[str, Tensor]  # the result of one block: part -> (G, ...)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Proof of how near the triplets are to the best ones of their number.

    `residual_energy` is the squared Frobenius norm of what they leave out. It exceeds the smallest
    possible one by at most the share `relative_excess` of that smallest, with probability at least
    `1 - failure_probability` over the route's own random draws (0: certain). The residual is
    measured on the sum as the route formed it: in float64 or, on the iterative route, in float32,
    which cannot resolve less than `RESOLUTION` of the whole energy. A residual below that gets
    `relative_excess` 0.
    """

    residual_energy: float
    relative_excess: float
    failure_probability: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """Leading singular triplets, the energy of the whole matrix, the route and its certificate.

    `total_energy` is the squared Frobenius norm. It tells the energy that the triplets leave out
    without computing the others.
    """

    spectral: Spectral
    total_energy: float
    route: str
    certificate: Certificate


@dataclass(frozen=True, kw_only=True)
class RankPartition:
    """A range of directions that the same clients train, and the weight of these clients.

    Directions count from 0, `end` is not in the range. `weight` is the sum of the weights of the
    round's clients whose rank is at least `end`; it is not normalised.
    """

    begin: int
    end: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The decomposition to compute, for each of some modules of one shape.

    Attributes:
        out: rows of the weight.
        in_: columns of the weight.
        stacked_rank: the sum of all clients' ranks.
        rank: how many triplets are wanted.
        share: more than `rank` triplets are wanted where fewer do not hold this share of the
            energy; 1: all. Only direct routes find them.
        exact: only direct routes in float64.
        tolerance: the largest relative excess of an iterative route's residual energy.
        partitions: the ranges of directions between the ranks that are trained or received, from
            the first direction; routes do not look at them.
    """

    out: int
    in_: int
    stacked_rank: int
    rank: int
    share: float = 0.0
    exact: bool = False
    tolerance: float = 1e-4
    partitions: tuple[RankPartition, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Start:
    """The start of an iterative route: a seed, and right singular vectors expected to be near."""

    seed: int = 0
    near_GKI: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Route:
    """A route from blocks of factors to triplets.

    Attributes:
        fold: `b_GOR`, `a_GRI` and the coefficient of each column (G, R) -> the partial result of a
            block.
        decompose: the partial results of all blocks, in their order -> triplets, module by module;
            the partial results are consumed.
    """

    fold: Callable[[Tensor, Tensor, Tensor], Partial]
    decompose: Callable[[Iterable[Partial], Problem, Start], list[Decomposition]]


def wanted_triplets(problem: Problem, values_GN: Tensor) -> int:
    """Return how many triplets to compute; `values_GN` are their energies, ascending."""
    count = values_GN.shape[-1]
    if problem.share >= 1:
        return count
    kept = min(problem.rank, count)
    if not problem.share:
        return kept
    energies_GN = values_GN.clamp(min=0.0).flip(-1).cumsum(-1)
    enough_G = 1 + (energies_GN < problem.share * energies_GN[..., -1:]).sum(-1)
    return min(count, max(kept, int(enough_G.max())))


def ritz_triplets(q_GOK: Tensor, p_GKI: Tensor) -> Spectral:
    """Return the triplets of `W` within the orthonormal columns `q_GOK`, from `p_GKI = q^T W`.

    Rayleigh-Ritz: the Gram matrix behind the basis squares the singular values and loses half of
    their digits. One more product with `W` restores them.
    """
    t_GKK = triangle(p_GKI.mT, NEARLY_ORTHOGONAL)
    if t_GKK is None:
        rotation_GKK, s_GK, vh_GKI = torch.linalg.svd(p_GKI, full_matrices=False)
    else:
        # the rows are nearly the right singular vectors: p = T^T Q^T, and T is small
        rotation_GKK, s_GK, small_GKK = torch.linalg.svd(t_GKK.mT)
        rows = torch.linalg.solve_triangular(t_GKK.mT, p_GKI, upper=False)
        vh_GKI = small_GKK @ rows
    return Spectral(u_OR=q_GOK @ rotation_GKK, s_R=s_GK, vh_RI=vh_GKI)


def transposed(spectral: Spectral) -> Spectral:
    """Return the triplets of the transposed matrix."""
    return Spectral(u_OR=spectral.vh_RI.mT, s_R=spectral.s_R, vh_RI=spectral.u_OR.mT)


def split_modules(spectral: Spectral) -> list[Spectral]:
    """Return the triplets of each of the G modules."""
    parts = zip(spectral.u_OR, spectral.s_R, spectral.vh_RI, strict=True)
    return [Spectral(u_OR=u_OR, s_R=s_R, vh_RI=vh_RI) for u_OR, s_R, vh_RI in parts]


def scaled(decomposition: Decomposition, unit: float) -> Decomposition:
    """Return the decomposition of the matrix multiplied by `unit`."""
    spectral = replace(decomposition.spectral, s_R=decomposition.spectral.s_R * unit)
    residual = decomposition.certificate.residual_energy * unit**2
    return replace(
        decomposition,
        spectral=spectral,
        total_energy=decomposition.total_energy * unit**2,
        certificate=replace(decomposition.certificate, residual_energy=residual),
    )
