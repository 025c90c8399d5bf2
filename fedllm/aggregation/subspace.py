"""The leading eigenvectors of G = W^T W by a filtered subspace iteration, with a certificate.

Chebyshev filters (Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219 (2006), section 3)
between Rayleigh-Ritz steps. Directions so large that a filter would drown the others with them
are set aside and take a plain power step. Only the start and the filters' products are imprecise:
they choose a subspace, which float32 then measures.

Legend: G modules, M long side, N narrow side, L vectors of the subspace, A of them set aside,
K wanted rank, P probes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.aggregation.bounds import Apply, gap_bound, norm_ranges
from fedllm.aggregation.decomposition import RESOLUTION
from fedllm.aggregation.orthogonal import on_triangle, triangle

# of the wanted rank: what is carried beside it, whose gap to it speeds everything
_EXTRA, _LEAST_EXTRA = 0.6, 8
_POWERS, FILTERS = 3, 5
_SET_ASIDE_ABOVE = 20.0  # times the lowest Ritz value
_AMPLIFICATION = 1e4
_SMALLEST_DEGREE, _LARGEST_DEGREE = 2, 12
_PLAINLY_ABOVE, _OVERGROWN = 1.0 + 1e-6, 1e10
_NOISE = 1e-12  # of the largest Ritz value
_NEARLY_DEPENDENT = 1e-3  # what is left of a column of unit length beside those before it
_ROWS = 512  # at a time, which stay in a cache
_DIFFERENCE_TELLS = 1e-4  # of the energy
_ROUNDING = 2e-7  # of each of the wanted energies
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is searched for: how many triplets, how good, in matrices of which energies."""

    rank: int
    tolerance: float
    energy_G: Tensor


@dataclass(frozen=True, kw_only=True)
class Found:
    """The leading triplets: right vectors, and W times them.

    `residual_G` is the energy that they leave out, `relative_excess_G` bounds by which share of
    the optimum it is more than that.
    """

    x_GNK: Tensor
    y_GMK: Tensor
    residual_G: Tensor
    relative_excess_G: Tensor


def width(rank: int, narrow: int) -> int:
    """Return how many vectors the subspace has."""
    return min(narrow, rank + max(_LEAST_EXTRA, math.ceil(_EXTRA * rank)))


def search(
    w_GMN: Tensor,
    asked: Asked,
    *,
    near_GNJ: Tensor,
    draws: torch.Generator,
    probes: torch.Generator,
) -> Found | None:
    """Return triplets that are as good as asked, or None if that takes too long.

    Each of at most `FILTERS` certificates fails with `bounds.FAILURE_PROBABILITY`.

    Args:
        w_GMN: float32, not narrower than long.
        asked: what is enough.
        near_GNJ: vectors that the wanted ones are thought to be near, at most K.
        draws: what the start is drawn from.
        probes: what certificates are drawn from, apart from all that chose the vectors.
    """
    ritz = _Ritz.of(w_GMN, _begun(w_GMN, width(asked.rank, w_GMN.shape[2]), near_GNJ, draws))
    for _ in range(FILTERS):
        basis_GNL = _filtered(w_GMN, ritz)
        if not bool(torch.isfinite(basis_GNL).all()):
            return None
        ritz = _Ritz.of(w_GMN, basis_GNL)
        left_G = _left(w_GMN, ritz, asked)
        excess_G = _relative_excess(w_GMN, ritz, left_G, asked, probes)
        if bool((excess_G <= asked.tolerance).all()):
            return Found(
                x_GNK=ritz.x_GNL[..., : asked.rank],
                y_GMK=ritz.y_GML[..., : asked.rank],
                residual_G=left_G,
                relative_excess_G=excess_G,
            )
    return None


def gram(y_GML: Tensor) -> Tensor:
    """Return y^T y in float64, from float32 products of some rows at a time.

    Each entry's error is some 1e-7 of its two columns' norms: columns of very unequal size keep
    their relative accuracy.
    """
    modules, _, number = y_GML.shape
    total = y_GML.new_zeros((modules, number, number), dtype=torch.float64)
    for rows in torch.split(y_GML, _ROWS, dim=1):
        total += rows.mT @ rows
    return total


def orthonormal(x_GNL: Tensor) -> Tensor:
    """Return a basis of the columns' span, orthonormal to the last digits of float32.

    Columns that are nearly dependent are turned until they are not; where there are fewer
    directions than columns Householder's way completes the basis.
    """
    for _ in range(3):
        wide_GNL = x_GNL.double()
        t_GLL = triangle(wide_GNL, _NEARLY_DEPENDENT)
        if t_GLL is not None:
            return on_triangle(wide_GNL, t_GLL).float()
        unit = wide_GNL / wide_GNL.norm(dim=1, keepdim=True).clamp(min=_TINY)
        values_GL, vectors_GLL = torch.linalg.eigh(unit.mT @ unit)
        values_GL = torch.maximum(values_GL, 1e-12 * values_GL[:, -1:]).clamp(min=_TINY)
        x_GNL = (unit @ (vectors_GLL * values_GL.rsqrt()[:, None, :])).float()
    basis_GNL: Tensor = torch.linalg.qr(x_GNL).Q
    return basis_GNL


@dataclass(frozen=True, kw_only=True)
class _Ritz:
    """Ritz vectors x, y = W x, and Ritz values, descending."""

    x_GNL: Tensor
    y_GML: Tensor
    theta_GL: Tensor

    @classmethod
    def of(cls, w_GMN: Tensor, x_GNL: Tensor) -> "_Ritz":
        """Return those of the span of `x_GNL`, orthonormal columns."""
        y_GML = w_GMN @ x_GNL
        theta_GL, turn_GLL = torch.linalg.eigh(gram(y_GML))
        turn_GLL = turn_GLL.flip(-1)  # eigh sorts from the smallest
        return cls(
            x_GNL=(x_GNL.double() @ turn_GLL).float(),
            y_GML=y_GML @ turn_GLL.float(),
            theta_GL=theta_GL.flip(-1).clamp(min=0.0),
        )

    @property
    def number_aside(self) -> int:
        """How many leading vectors would drown the others in a filter, in every module."""
        above_GL = self.theta_GL > _SET_ASIDE_ABOVE * self.cut[:, None]
        return int(above_GL.sum(-1).min())

    @property
    def cut(self) -> Tensor:
        """Below which a filter lets everything fade: the lowest Ritz value, if it is no noise."""
        return torch.maximum(self.theta_GL[:, -1], _NOISE * self.theta_GL[:, 0]).clamp(min=_TINY)


def _back(w_GMN: Tensor, y_GML: Tensor) -> Tensor:
    # the rows of y^T W are read as W lies: twice as fast for few of them
    return (y_GML.mT @ w_GMN).mT


def _exactly(w_GMN: Tensor) -> Apply:
    return lambda x_GNP: _back(w_GMN, w_GMN @ x_GNP)


def _begun(w_GMN: Tensor, number: int, near_GNJ: Tensor, draws: torch.Generator) -> Tensor:
    modules, _, narrow = w_GMN.shape
    drawn = torch.randn(modules, narrow, number - near_GNJ.shape[2], generator=draws)
    drawn = drawn.to(w_GMN.device) / math.sqrt(narrow)
    begun = torch.cat([near_GNJ.to(drawn), drawn], dim=2)
    quick = _Quick.beside(w_GMN, begun[..., :0], begun[..., :0])
    for _ in range(_POWERS):
        begun = orthonormal(quick(begun))
    return begun


def _filtered(w_GMN: Tensor, ritz: _Ritz) -> Tensor:
    """Return a basis in which all that is below the lowest Ritz values has faded."""
    aside = ritz.number_aside
    ratio = float((ritz.theta_GL[:, aside] / ritz.cut).max())
    degree = _SMALLEST_DEGREE
    if ratio > _PLAINLY_ABOVE:  # otherwise all that is wanted is set aside, and the rest is noise
        degree = math.ceil(math.acosh(_AMPLIFICATION) / math.acosh(2 * ratio - 1))
        degree = max(_SMALLEST_DEGREE, min(_LARGEST_DEGREE, degree))
    kept_GMA = ritz.y_GML[..., :aside]
    quick = _Quick.beside(w_GMN, ritz.x_GNL[..., :aside], kept_GMA)
    # T_0 and T_1, then T_{d+1}(G) = (4 / cut G - 2) T_d(G) - T_{d-1}(G)
    half_G11 = (ritz.cut / 2)[:, None, None].float()
    before = ritz.x_GNL[..., aside:]
    now = quick(before).div_(half_G11).sub_(before)
    for _ in range(degree - 1):
        if not float(now.abs().max()) < _OVERGROWN:
            break  # what is left beside the vectors set aside is rounding
        grown = quick(now).div_(half_G11 / 2).sub_(now, alpha=2).sub_(before)
        before, now = now, grown
    return orthonormal(torch.cat([_back(w_GMN, kept_GMA), now], dim=2))


def _left(w_GMN: Tensor, ritz: _Ritz, asked: Asked) -> Tensor:
    """Return the energy that the leading triplets leave out.

    As a difference of energies, good to some 1e-7 of them; where that is too little, from what
    is left of W.
    """
    difference_G = (asked.energy_G - ritz.theta_GL[:, : asked.rank].sum(-1)).clamp(min=0.0)
    if bool((difference_G > _DIFFERENCE_TELLS * asked.energy_G).all()):
        return difference_G
    x_GKN = ritz.x_GNL[..., : asked.rank].mT
    total_G = torch.zeros_like(difference_G)
    parts = [torch.split(whole, _ROWS, dim=1) for whole in (w_GMN, ritz.y_GML[..., : asked.rank])]
    for w, y in zip(*parts, strict=True):
        total_G += torch.baddbmm(w, y, x_GKN, alpha=-1).norm(dim=-1).double().square().sum(-1)
    return total_G


def _relative_excess(
    w_GMN: Tensor, ritz: _Ritz, left_G: Tensor, asked: Asked, probes: torch.Generator
) -> Tensor:
    """Return at most how much less could be left out, infinite once it is plainly not enough."""
    bound = _Bound.of(w_GMN, ritz, left_G, asked)
    last_G, lowest_G = ritz.theta_GL[:, asked.rank - 1], ritz.theta_GL[:, -1]
    if bool(bound.done_G.all()) or ritz.theta_GL.shape[1] == w_GMN.shape[2]:
        return bound(torch.zeros_like(lowest_G))  # nothing is left, or there is no rest
    # the norm of the rest will hardly be found to be less than the lowest Ritz value
    hoped_G = bound(lowest_G)
    unknown_G = torch.full_like(hoped_G, torch.inf)
    if bool((hoped_G > asked.tolerance).any()):
        return unknown_G
    # the excess grows at least as the gap shrinks
    needed_G = (last_G - lowest_G) * hoped_G / asked.tolerance
    needed_G = torch.where(bound.done_G, -torch.inf, needed_G)
    for rest in norm_ranges(_exactly(w_GMN), ritz.x_GNL, probes):
        if bool((last_G - rest.least_G < needed_G).any()):
            break
        if bool((last_G - rest.most_G >= needed_G).all()):
            excess_G = bound(rest.most_G)
            if bool((excess_G <= asked.tolerance).all()):
                return excess_G
    return unknown_G


@dataclass(frozen=True, kw_only=True)
class _Bound:
    """The relative excess as it follows from a bound of the norm of the rest."""

    ritz: _Ritz
    rank: int
    residuals_GLL: Tensor
    left_G: Tensor
    rounding_G: Tensor
    done_G: Tensor

    @classmethod
    def of(cls, w_GMN: Tensor, ritz: _Ritz, left_G: Tensor, asked: Asked) -> "_Bound":
        """Return that of the Ritz vectors."""
        r_GNL = _back(w_GMN, ritz.y_GML) - ritz.x_GNL * ritz.theta_GL[:, None, :].float()
        r_GNL = r_GNL - ritz.x_GNL @ (ritz.x_GNL.mT @ r_GNL)
        wanted_G = asked.rank * ritz.theta_GL[:, asked.rank - 1]
        return cls(
            ritz=ritz,
            rank=asked.rank,
            residuals_GLL=gram(r_GNL),
            left_G=left_G,
            # what float32 vectors lose, several times what was ever seen
            rounding_G=_ROUNDING * wanted_G + RESOLUTION / 10 * asked.energy_G,
            done_G=left_G <= RESOLUTION * asked.energy_G,
        )

    def __call__(self, rest_G: Tensor) -> Tensor:
        """Return the bound where the norm of the rest is at most `rest_G`."""
        theta_GL = self.ritz.theta_GL
        best_G = gap_bound(theta_GL, self.residuals_GLL, rest_G, self.rank)
        excess_G = (best_G - theta_GL[:, : self.rank].sum(-1)).clamp(min=0.0) + self.rounding_G
        optimal_G = self.left_G - excess_G
        bounded_G = torch.where(optimal_G > 0, excess_G / optimal_G, torch.inf)
        return torch.where(self.done_G, 0.0, bounded_G)


@dataclass(frozen=True, kw_only=True)
class _Quick:
    """W^T W beside the vectors set aside, in bfloat16 where the device is fast at it.

    Those vectors are taken out of W before it is rounded: beside them all else is rounding.
    """

    low_GMN: Tensor
    aside_GNA: Tensor

    @classmethod
    def beside(cls, w_GMN: Tensor, aside_GNA: Tensor, y_GMA: Tensor) -> "_Quick":
        """Return the products with W - y a^T, y = W a."""
        if not is_fast_at_bfloat16(w_GMN.device):
            return cls(low_GMN=w_GMN, aside_GNA=aside_GNA)
        if not aside_GNA.shape[2]:
            return cls(low_GMN=w_GMN.bfloat16(), aside_GNA=aside_GNA)
        low_GMN = torch.empty_like(w_GMN, dtype=torch.bfloat16)
        parts = [torch.split(whole, _ROWS, dim=1) for whole in (low_GMN, w_GMN, y_GMA)]
        for low, w, y in zip(*parts, strict=True):
            low.copy_(torch.baddbmm(w, y, aside_GNA.mT, alpha=-1))
        return cls(low_GMN=low_GMN, aside_GNA=aside_GNA)

    def __call__(self, x_GNA: Tensor) -> Tensor:
        """Return the products, float32."""
        x_GNA = self._projected(x_GNA)
        if self.low_GMN.dtype == torch.float32:
            return self._projected(_back(self.low_GMN, self.low_GMN @ x_GNA))
        # one by one: a batched product of a transposed bfloat16 matrix would copy it first
        pairs = zip(self.low_GMN, x_GNA.bfloat16(), strict=True)
        return self._projected(
            torch.stack([low_MN.mT @ (low_MN @ x_NA) for low_MN, x_NA in pairs]).float()
        )

    def _projected(self, x_GNA: Tensor) -> Tensor:
        if not self.aside_GNA.shape[2]:
            return x_GNA
        return x_GNA - self.aside_GNA @ (self.aside_GNA.mT @ x_GNA)


def is_fast_at_bfloat16(device: torch.device) -> bool:
    """Say whether a device multiplies bfloat16 matrices several times as fast as float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported()
