"""The iterative route: one dense sum, of which only the leading triplets are computed.

Legend: G modules, O out, I in, R stacked rank, M long side, N narrow side, K wanted rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.aggregation import dense_route
from fedllm.aggregation.bounds import FAILURE_PROBABILITY
from fedllm.aggregation.route_types import (
    Certificate,
    Decomposition,
    Partial,
    Problem,
    Route,
    Start,
    scaled,
    split_modules,
    transposed,
)
from fedllm.aggregation.subspace import (
    MAX_FILTERS,
    SearchResult,
    SearchTarget,
    energies,
    gram,
    search,
)
from fedllm.errors import AdapterError
from fedllm.lora.spectral import Spectral
from fedllm.planning.seeding import seed_of

_RANKS = 2048  # ranks whose scaled copies are in memory at once
_MIN_ENERGY, _MAX_ENERGY = 2.0**-16, 2.0**48
_SMALL = 1e-3  # of the largest singular value


def fold(b_GOR: Tensor, a_GRI: Tensor, coefficients_GR: Tensor) -> Partial:
    """Return the weighted sum of a block's products, float32, some ranks at a time."""
    (modules, out, _), in_ = b_GOR.shape, a_GRI.shape[2]
    w_GOI = a_GRI.new_empty((modules, out, in_), dtype=torch.float32)
    parts = zip(
        torch.split(b_GOR, _RANKS, dim=2),
        torch.split(a_GRI, _RANKS, dim=1),
        torch.split(coefficients_GR[..., None].float(), _RANKS, dim=1),
        strict=True,
    )
    for number, (b, a, coefficients) in enumerate(parts):
        w_GOI.baddbmm_(b.float(), a.float() * coefficients, beta=1 if number else 0)
    return {"W": w_GOI}


def decompose(partials: Iterable[Partial], problem: Problem, start: Start) -> list[Decomposition]:
    """Return the leading triplets of the sum, precise to the problem's tolerance.

    If one search for all modules fails, each module is searched alone. If that also takes too long
    (many equal singular values around the last wanted one, for example), the dense route decomposes
    the module, and the result names it.
    """
    sums = _ScaledSum.of(dense_route.summed(partials))
    decompositions = _decomposed(sums.w_GOI, sums.energy_G, problem, start)
    units = sums.units_G.tolist()
    return [scaled(item, unit) for item, unit in zip(decompositions, units, strict=True)]


def _decomposed(
    w_GOI: Tensor, energy_G: Tensor, problem: Problem, start: Start
) -> list[Decomposition]:
    wide = problem.out < problem.in_
    w_GMN = w_GOI.mT if wide else w_GOI
    found = search(
        w_GMN,
        SearchTarget(rank=problem.rank, tolerance=problem.tolerance, energy_G=energy_G),
        guess_GNJ=_narrow_guess(w_GOI, start, problem),
        draws=torch.Generator().manual_seed(start.seed),
        probes=torch.Generator().manual_seed(seed_of(start.seed, "probes", *energy_G.tolist())),
    )
    if found is not None:
        tall = _triplets(found)
        return _with_certificates(transposed(tall) if wide else tall, energy_G, found)
    if len(w_GOI) == 1:
        return dense_route.decompose([{"W": w_GOI.double()}], problem, start)
    alone = [
        _decomposed(w_GOI[i, None], energy_G[i, None], problem, _of_module(start, i))
        for i in range(len(w_GOI))
    ]
    return [item for found in alone for item in found]


def _of_module(start: Start, place: int) -> Start:
    near_GKI = None if start.near_GKI is None else start.near_GKI[place, None]
    return Start(seed=start.seed, near_GKI=near_GKI)


def _with_certificates(
    triplets: Spectral, energy_G: Tensor, found: SearchResult
) -> list[Decomposition]:
    numbers = zip(
        energy_G.tolist(), found.residual_G.tolist(), found.relative_excess_G.tolist(), strict=True
    )
    return [
        Decomposition(
            spectral=spectral,
            total_energy=energy,
            route="iterative",
            certificate=Certificate(
                residual_energy=residual,
                relative_excess=excess,
                # a module may have been searched twice: with others, then alone
                failure_probability=2 * MAX_FILTERS * FAILURE_PROBABILITY,
            ),
        )
        for spectral, (energy, residual, excess) in zip(
            split_modules(triplets), numbers, strict=True
        )
    ]


@dataclass(frozen=True, kw_only=True)
class _ScaledSum:
    """Sums in units in which float32 can hold squares of squares; their energies and the units."""

    w_GOI: Tensor
    energy_G: Tensor
    units_G: Tensor  # powers of 2

    @classmethod
    def of(cls, w_GOI: Tensor) -> "_ScaledSum":
        """Return the sums as they are, or in other units where they are far from 1."""
        energy_G = energies(w_GOI)
        if bool(((energy_G < _MAX_ENERGY) & (energy_G > _MIN_ENERGY)).all()):
            return cls(w_GOI=w_GOI, energy_G=energy_G, units_G=torch.ones_like(energy_G))
        peak_G = torch.linalg.vector_norm(w_GOI, ord=torch.inf, dim=(-2, -1)).double()
        if not bool(torch.isfinite(peak_G).all()):
            raise AdapterError(
                "the sum of the updates' products does not fit float32: "
                "lower the learning rate, or sum in float64 (aggregation.exact: true, --exact)"
            )
        powers_G = torch.exp2(peak_G.clamp(min=torch.finfo(torch.float64).tiny).log2().floor())
        units_G = torch.where(peak_G > 0, powers_G, 1.0)
        scaled_GOI = (w_GOI.double() / units_G[:, None, None]).float()
        return cls(w_GOI=scaled_GOI, energy_G=energies(scaled_GOI), units_G=units_G)


def _narrow_guess(w_GOI: Tensor, start: Start, problem: Problem) -> Tensor:
    """Return vectors of the narrow side from right singular vectors, none where none are known."""
    if start.near_GKI is None:
        return w_GOI.new_zeros(w_GOI.shape[0], min(problem.out, problem.in_), 0)
    near_GIK = start.near_GKI[:, : problem.rank].to(w_GOI).mT
    return w_GOI @ near_GIK if problem.out < problem.in_ else near_GIK


def _triplets(found: SearchResult) -> Spectral:
    """Return triplets from Ritz vectors and W times them, corrected for rounding."""
    y_GMK = found.y_GML @ found.turn_GLK.float()
    values_GK, turn_GKK = torch.linalg.eigh(gram(y_GMK))
    turn_GKK = turn_GKK.flip(-1)
    s_GK = values_GK.flip(-1).clamp(min=0.0).sqrt()
    inverse_GK = torch.where(s_GK > 0, 1 / s_GK, 0.0)
    u_GMK = y_GMK @ (turn_GKK * inverse_GK[:, None, :]).float()
    if bool((s_GK[:, -1] <= _SMALL * s_GK[:, 0]).any()):
        u_GMK = _orthonormalized(u_GMK)
    vh_GKN = (found.x_GNL.double() @ (found.turn_GLK @ turn_GKK)).float().mT
    return Spectral(u_OR=u_GMK, s_R=s_GK.float(), vh_RI=vh_GKN)


def _orthonormalized(u_GMK: Tensor) -> Tensor:
    """Return the columns made orthonormal one after the other.

    Rounding leaves some of the large columns in the small ones, and a zero column has no direction.
    """
    q_GMK, r_GKK = torch.linalg.qr(u_GMK.double())
    turned_G1K = (r_GKK.diagonal(dim1=-2, dim2=-1) < 0)[:, None, :]
    return torch.where(turned_G1K, -q_GMK, q_GMK).float()


ITERATIVE = Route(fold=fold, decompose=decompose)
