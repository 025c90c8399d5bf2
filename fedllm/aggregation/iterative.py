"""The iterative route: one product, of which only the leading triplets are searched for.

Legend: G modules, O out, I in, R stacked rank, M long side, N narrow side, K wanted rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.aggregation import dense
from fedllm.aggregation.bounds import FAILURE_PROBABILITY
from fedllm.aggregation.decomposition import (
    Certificate,
    Decomposition,
    Partial,
    Problem,
    Route,
    Start,
    each_of,
    in_units,
    turned,
)
from fedllm.aggregation.subspace import FILTERS, Asked, Found, energies, gram, search
from fedllm.errors import AdapterError
from fedllm.lora.spectral import Spectral
from fedllm.planning.seeding import seed_of

_RANKS = 2048  # of which scaled copies are held at once
_LEAST_ENERGY, _LARGEST_ENERGY = 2.0**-16, 2.0**48
_SMALL = 1e-3  # of the largest singular value


def fold(b_GOR: Tensor, a_GRI: Tensor, amounts_GR: Tensor) -> Partial:
    """Return a block's weighted sum of products, float32, some ranks at a time."""
    (modules, out, _), in_ = b_GOR.shape, a_GRI.shape[2]
    w_GOI = a_GRI.new_empty((modules, out, in_), dtype=torch.float32)
    parts = zip(
        torch.split(b_GOR, _RANKS, dim=2),
        torch.split(a_GRI, _RANKS, dim=1),
        torch.split(amounts_GR[..., None].float(), _RANKS, dim=1),
        strict=True,
    )
    for number, (b, a, amounts) in enumerate(parts):
        w_GOI.baddbmm_(b.float(), a.float() * amounts, beta=1 if number else 0)
    return {"W": w_GOI}


def decompose(partials: Iterable[Partial], problem: Problem, start: Start) -> list[Decomposition]:
    """Return the leading triplets of the sum, good enough for the problem's tolerance.

    Modules that a search for all of them together does not serve are searched alone. Where that
    does not get there in time either (as where many singular values about the wanted last one
    are equal), the direct way is taken and named.
    """
    scaled = _Scaled.of(dense.summed(partials))
    found = _decomposed(scaled.w_GOI, scaled.energy_G, problem, start)
    units = scaled.units_G.tolist()
    return [in_units(each, unit) for each, unit in zip(found, units, strict=True)]


def _decomposed(
    w_GOI: Tensor, energy_G: Tensor, problem: Problem, start: Start
) -> list[Decomposition]:
    wide = problem.out < problem.in_
    w_GMN = w_GOI.mT if wide else w_GOI
    found = search(
        w_GMN,
        Asked(rank=problem.rank, tolerance=problem.tolerance, energy_G=energy_G),
        near_GNJ=_near(w_GOI, start, problem),
        draws=torch.Generator().manual_seed(start.seed),
        probes=torch.Generator().manual_seed(seed_of(start.seed, "probes", *energy_G.tolist())),
    )
    if found is not None:
        tall = _triplets(found)
        return _told(turned(tall) if wide else tall, energy_G, found)
    if len(w_GOI) == 1:
        return dense.decompose([{"W": w_GOI.double()}], problem, start)
    alone = [
        _decomposed(w_GOI[i, None], energy_G[i, None], problem, _of_module(start, i))
        for i in range(len(w_GOI))
    ]
    return [each for one in alone for each in one]


def _of_module(start: Start, place: int) -> Start:
    near_GKI = None if start.near_GKI is None else start.near_GKI[place, None]
    return Start(seed=start.seed, near_GKI=near_GKI)


def _told(triplets: Spectral, energy_G: Tensor, found: Found) -> list[Decomposition]:
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
                # a module may have been searched for twice: with others, then alone
                failure_probability=2 * FILTERS * FAILURE_PROBABILITY,
            ),
        )
        for spectral, (energy, residual, excess) in zip(each_of(triplets), numbers, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class _Scaled:
    """Matrices whose squares of squares float32 can hold, their energies, and their units."""

    w_GOI: Tensor
    energy_G: Tensor
    units_G: Tensor  # powers of 2

    @classmethod
    def of(cls, w_GOI: Tensor) -> "_Scaled":
        """Return the matrices as they are, or where they are far from 1 in other units."""
        energy_G = energies(w_GOI)
        if bool(((energy_G < _LARGEST_ENERGY) & (energy_G > _LEAST_ENERGY)).all()):
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


def _near(w_GOI: Tensor, start: Start, problem: Problem) -> Tensor:
    """Return vectors of the narrow side from right singular vectors, none where none are known."""
    if start.near_GKI is None:
        return w_GOI.new_zeros(w_GOI.shape[0], min(problem.out, problem.in_), 0)
    near_GIK = start.near_GKI[:, : problem.rank].to(w_GOI).mT
    return w_GOI @ near_GIK if problem.out < problem.in_ else near_GIK


def _triplets(found: Found) -> Spectral:
    """Return triplets from Ritz vectors and W times them, which rounding has turned a little."""
    y_GMK = found.y_GML @ found.turn_GLK.float()
    values_GK, turn_GKK = torch.linalg.eigh(gram(y_GMK))
    turn_GKK = turn_GKK.flip(-1)
    s_GK = values_GK.flip(-1).clamp(min=0.0).sqrt()
    inverse_GK = torch.where(s_GK > 0, 1 / s_GK, 0.0)
    u_GMK = y_GMK @ (turn_GKK * inverse_GK[:, None, :]).float()
    if bool((s_GK[:, -1] <= _SMALL * s_GK[:, 0]).any()):
        u_GMK = _beside_those_before(u_GMK)
    vh_GKN = (found.x_GNL.double() @ (found.turn_GLK @ turn_GKK)).float().mT
    return Spectral(u_OR=u_GMK, s_R=s_GK.float(), vh_RI=vh_GKN)


def _beside_those_before(u_GMK: Tensor) -> Tensor:
    """Return the columns made orthonormal one after the other.

    Rounding left some of the large ones in the small ones, and a zero one has no direction.
    """
    q_GMK, r_GKK = torch.linalg.qr(u_GMK.double())
    turned_G1K = (r_GKK.diagonal(dim1=-2, dim2=-1) < 0)[:, None, :]
    return torch.where(turned_G1K, -q_GMK, q_GMK).float()


ITERATIVE = Route(fold=fold, decompose=decompose)
