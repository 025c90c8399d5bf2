"""Leading eigenvectors of G = W^T W by a filtered subspace iteration, with a certificate.

Chebyshev filters (Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219 (2006), section 3)
alternate with Rayleigh-Ritz steps. Very large directions would drown the others in a filter, so
they are deflated: they take a plain power step, which is enough where all wanted directions are
that large. Only the start and the products of the filters are imprecise. They choose a subspace,
which float32 products then measure.

Legend: G modules, M long side, N narrow side, L vectors of the subspace, A deflated ones of them,
K wanted rank, J vectors guessed, P probes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.aggregation.bounds import Apply, GapBound, last_gap_bound, norm_ranges, own_gaps_bound
from fedllm.aggregation.devices import is_fast_at_bfloat16
from fedllm.aggregation.orthogonal import on_triangle, triangle
from fedllm.aggregation.route_types import RESOLUTION

# The subspace has more vectors than the wanted rank, by this share of it and at least so many:
# a larger gap to the first vector outside makes every step converge faster.
_EXTRA_SHARE, _MIN_EXTRA = 0.6, 8
_POWERS, MAX_FILTERS = 2, 5
_DEFLATE_ABOVE, _FAR_ABOVE = 20.0, 8.0  # times the lowest Ritz value
_AMPLIFICATION_FACTOR = 60.0  # a filter amplifies by this, over the root of the tolerance
_MAX_AMPLIFICATION = 3e4
_MIN_DEGREE, _MAX_DEGREE = 2, 12
_EXPECTED_SHARE = 0.25  # of the gap: how far above its minimum a norm will be found
_MIN_RATIO, _MAX_GROWTH = 1.0 + 1e-6, 1e10
_NOISE = 1e-12  # of the largest Ritz value
# The part of a unit column that must be orthogonal to the columns before it, by precision.
_NEARLY_DEPENDENT = {torch.float64: 1e-3, torch.float32: 3e-2}
_ROWS = 512  # rows at a time, few enough to stay in a cache
_MIN_DIFFERENCE, _DIFFERENCE_ERROR = 5e-5, 1e-7  # of the energy
_ROUNDING, _TOTAL_ROUNDING = 2e-7, 1e-12  # of each wanted energy, and of the total energy
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class SearchTarget:
    """The goal of a search: how many triplets, and how near to the best ones.

    `energy_G` are the squared Frobenius norms of the matrices, `tolerance` the largest relative
    excess of the energy that the triplets leave out.
    """

    rank: int
    tolerance: float
    energy_G: Tensor


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Leading triplets: a basis x, y = W x, and the rotation that turns both to them.

    `residual_G` is the energy that the triplets leave out. It exceeds the smallest possible one by
    at most the share `relative_excess_G` of that smallest.
    """

    x_GNL: Tensor
    y_GML: Tensor
    turn_GLK: Tensor
    residual_G: Tensor
    relative_excess_G: Tensor


def width(rank: int, narrow: int) -> int:
    """Return the number of vectors in the subspace."""
    return min(narrow, rank + max(_MIN_EXTRA, math.ceil(_EXTRA_SHARE * rank)))


def search(
    w_GMN: Tensor,
    target: SearchTarget,
    *,
    guess_GNJ: Tensor,
    draws: torch.Generator,
    probes: torch.Generator,
) -> SearchResult | None:
    """Return triplets that reach the target, or None if the search takes too long.

    Each of at most `MAX_FILTERS` certificates fails with `bounds.FAILURE_PROBABILITY`.

    Args:
        w_GMN: float32, at least as long as narrow.
        target: how good the triplets must be.
        guess_GNJ: at most K vectors that are expected to be near the wanted ones.
        draws: the generator of the start.
        probes: the generator of the certificates, independent of everything that chose the vectors.
    """
    fast = _FastGram.of(w_GMN)
    ritz = _initial_ritz(fast, width(target.rank, w_GMN.shape[2]), guess_GNJ, draws)
    for number in range(MAX_FILTERS):
        basis_GNL = _next_basis(w_GMN, fast, ritz, target, is_first=number == 0)
        if not bool(torch.isfinite(basis_GNL).all()):
            return None
        measured = _Measured.of(w_GMN, basis_GNL)
        residual_G = _residual_energy(w_GMN, measured, target)
        excess_G = _relative_excess(w_GMN, measured, residual_G, target, probes)
        if bool((excess_G <= target.tolerance).all()):
            return SearchResult(
                x_GNL=measured.x_GNL,
                y_GML=measured.y_GML,
                turn_GLK=measured.turn_GLL[..., : target.rank],
                residual_G=residual_G,
                relative_excess_G=excess_G,
            )
        ritz = measured.ritz
    return None


def energies(w_GMN: Tensor) -> Tensor:
    """Return squared Frobenius norms in float64, precise to about 2e-8."""
    rows_GM: Tensor = torch.linalg.vector_norm(w_GMN, dim=-1)
    return rows_GM.double().square().sum(-1)


def gram(y_GML: Tensor) -> Tensor:
    """Return y^T y in float64, summed from float32 products of a few rows at a time.

    The error of an entry is about 1e-7 of the norms of its two columns: columns of very unequal
    size keep their relative accuracy.
    """
    modules, _, number = y_GML.shape
    total = y_GML.new_zeros((modules, number, number), dtype=torch.float64)
    for rows in torch.split(y_GML, _ROWS, dim=1):
        rows = rows.float()
        total += rows.mT @ rows
    return total


def orthonormal(x_GNL: Tensor, precision: torch.dtype = torch.float64) -> Tensor:
    """Return a basis of the columns' span, orthonormal to float32 precision.

    Nearly dependent columns are rotated until they are independent. Where there are fewer
    directions than columns, Householder QR completes the basis.

    Args:
        x_GNL: the columns, float32.
        precision: float32 takes half of the time on well-conditioned columns and loses a digit.
    """
    for _ in range(3):
        for dtype in dict.fromkeys((precision, torch.float64)):
            columns_GNL = x_GNL.to(dtype)
            t_GLL = triangle(columns_GNL, _NEARLY_DEPENDENT[dtype])
            if t_GLL is not None:
                return on_triangle(columns_GNL, t_GLL).float()
        wide_GNL = x_GNL.double()
        unit = wide_GNL / wide_GNL.norm(dim=1, keepdim=True).clamp(min=_TINY)
        values_GL, vectors_GLL = torch.linalg.eigh(unit.mT @ unit)
        values_GL = torch.maximum(values_GL, 1e-12 * values_GL[:, -1:]).clamp(min=_TINY)
        x_GNL = (unit @ (vectors_GLL * values_GL.rsqrt()[:, None, :])).float()
    basis_GNL: Tensor = torch.linalg.qr(x_GNL).Q
    return basis_GNL


@dataclass(frozen=True, kw_only=True)
class _Ritz:
    """Ritz vectors x and their Ritz values theta, descending."""

    x_GNL: Tensor
    theta_GL: Tensor

    @property
    def num_deflated(self) -> int:
        """The number of leading vectors, in every module, that would drown the rest in a filter."""
        above_GL = self.theta_GL > _DEFLATE_ABOVE * self.cut[:, None]
        return int(above_GL.sum(-1).min())

    @property
    def cut(self) -> Tensor:
        """The upper end of what a filter damps: the lowest Ritz value, unless that is rounding."""
        return torch.maximum(self.theta_GL[:, -1], _NOISE * self.theta_GL[:, 0]).clamp(min=_TINY)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Measurements of a basis x by float32 products: y = W x, Ritz values, the rotation to them."""

    x_GNL: Tensor
    y_GML: Tensor
    theta_GL: Tensor
    turn_GLL: Tensor
    residuals_GLL: Tensor  # products of the Ritz vectors' residuals

    @classmethod
    def of(cls, w_GMN: Tensor, x_GNL: Tensor) -> "_Measured":
        """Measure a basis of orthonormal columns."""
        y_GML = w_GMN @ x_GNL
        gram_GLL = gram(y_GML)
        theta_GL, turn_GLL = torch.linalg.eigh(gram_GLL)
        turn_GLL = turn_GLL.flip(-1)  # eigh sorts from the smallest
        # rounding leaves a part within the basis: it makes the bounds larger, not wrong
        r_GNL = _transposed_product(w_GMN, y_GML).baddbmm(x_GNL, gram_GLL.float(), alpha=-1)
        return cls(
            x_GNL=x_GNL,
            y_GML=y_GML,
            theta_GL=theta_GL.flip(-1).clamp(min=0.0),
            turn_GLL=turn_GLL,
            residuals_GLL=turn_GLL.mT @ gram(r_GNL) @ turn_GLL,
        )

    @property
    def ritz(self) -> _Ritz:
        """The Ritz vectors and values of the basis."""
        x_GNL = (self.x_GNL.double() @ self.turn_GLL).float()
        return _Ritz(x_GNL=x_GNL, theta_GL=self.theta_GL)


def _transposed_product(w_GMN: Tensor, y_GML: Tensor) -> Tensor:
    # y^T W reads W in its memory order: twice as fast for few vectors
    return (y_GML.mT @ w_GMN).mT


def _gram_product(w_GMN: Tensor) -> Apply:
    return lambda x_GNP: _transposed_product(w_GMN, w_GMN @ x_GNP)


def _initial_ritz(
    fast: "_FastGram", number: int, guess_GNJ: Tensor, draws: torch.Generator
) -> _Ritz:
    """Return approximate Ritz vectors and values after a few power steps."""
    modules, _, narrow = fast.low_GMN.shape
    drawn = torch.randn(modules, narrow, number - guess_GNJ.shape[2], generator=draws)
    drawn = drawn.to(fast.low_GMN.device) / math.sqrt(narrow)
    x_GNL = torch.cat([guess_GNJ.to(drawn), drawn], dim=2)
    for _ in range(_POWERS - 1):
        x_GNL = orthonormal(fast(x_GNL), torch.float32)
    y_GML = fast.multiply(x_GNL)
    theta_GL, turn_GLL = torch.linalg.eigh(gram(y_GML).float())
    grown_GNL = fast.multiply_transposed(y_GML) @ turn_GLL.flip(-1)
    return _Ritz(
        x_GNL=orthonormal(grown_GNL, torch.float32),
        theta_GL=theta_GL.flip(-1).clamp(min=0.0).double(),
    )


def _next_basis(
    w_GMN: Tensor, all_w: "_FastGram", ritz: _Ritz, target: SearchTarget, *, is_first: bool
) -> Tensor:
    """Return a basis that is nearer to the wanted vectors."""
    if bool((ritz.theta_GL[:, target.rank - 1] > _FAR_ABOVE * ritz.cut).all()):
        if is_first and _allows_bfloat16(w_GMN, ritz, target):
            return orthonormal(_transposed_product(w_GMN, all_w.multiply(ritz.x_GNL).float()))
        return orthonormal(_gram_product(w_GMN)(ritz.x_GNL))
    num_deflated = ritz.num_deflated
    x_GNA, before = ritz.x_GNL[..., :num_deflated], ritz.x_GNL[..., num_deflated:]
    kept_GMA = w_GMN @ x_GNA
    fast = _FastGram.without(w_GMN, x_GNA, kept_GMA) if num_deflated else all_w
    # T_0 and T_1, then T_{d+1}(G) = (4 / cut G - 2) T_d(G) - T_{d-1}(G)
    half_G11 = (ritz.cut / 2)[:, None, None].float()
    now = fast(before).div_(half_G11).sub_(before)
    for _ in range(_degree(ritz, target) - 1):
        if not float(now.mT.abs().max()) < _MAX_GROWTH:  # its rows, which are not copied
            break  # beside the deflated vectors only rounding is left
        grown = fast(now).div_(half_G11 / 2).sub_(now, alpha=2).sub_(before)
        before, now = now, grown
    return orthonormal(torch.cat([_transposed_product(w_GMN, kept_GMA), now], dim=2))


def _allows_bfloat16(w_GMN: Tensor, ritz: _Ritz, target: SearchTarget) -> bool:
    """Say whether the first product of a power step may be in bfloat16.

    Its error is relative to all of W, however small the wanted value, and spreads evenly over all M
    N pairs of vectors. The second product turns at most `share_G` of the residual energy into
    excess.
    """
    theta_GK = ritz.theta_GL[:, : target.rank].clamp(min=_TINY)
    lost_G = torch.finfo(torch.bfloat16).eps ** 2 / 16 * target.energy_G
    share_G = lost_G * (1 / theta_GK).sum(-1) / w_GMN[0].numel()
    return bool((share_G < target.tolerance).all())


def _degree(ritz: _Ritz, target: SearchTarget) -> int:
    """Return the degree of the filter that lifts the last wanted vector far enough above the rest.

    The degree is lower where the largest vectors would grow so far above it that bfloat16 loses it.
    """
    last_G, first_G = ritz.theta_GL[:, target.rank - 1], ritz.theta_GL[:, ritz.num_deflated]
    needed = _degree_for(_AMPLIFICATION_FACTOR / math.sqrt(target.tolerance), last_G / ritz.cut)
    limit = _degree_for(_MAX_AMPLIFICATION, first_G / ritz.cut)
    return max(_MIN_DEGREE, min(_MAX_DEGREE, needed, limit))


def _degree_for(amplification: float, ratios_G: Tensor) -> int:
    """Return the degree of the Chebyshev polynomial that reaches `amplification` at all ratios."""
    at = 2 * max(float(ratios_G.max()), _MIN_RATIO) - 1
    return math.ceil(math.acosh(amplification) / math.acosh(at))


def _residual_energy(w_GMN: Tensor, measured: _Measured, target: SearchTarget) -> Tensor:
    """Return the energy that the leading triplets leave out.

    A difference of energies is precise to `_DIFFERENCE_ERROR` of them. Where that is too coarse,
    the energy is summed from W minus the triplets, precise to `_TOTAL_ROUNDING`.
    """
    # a sum of many squares keeps more digits than the products behind the Ritz values
    within_G = energies(measured.y_GML)
    kept_G = within_G - measured.theta_GL[:, target.rank :].sum(-1)
    difference_G = (target.energy_G - kept_G).clamp(min=0.0)
    if bool((difference_G > _MIN_DIFFERENCE * target.energy_G).all()):
        return difference_G
    x_GKN = measured.ritz.x_GNL[..., : target.rank].mT
    y_GMK = measured.y_GML @ measured.turn_GLL[..., : target.rank].float()
    total_G = torch.zeros_like(difference_G)
    parts = [torch.split(tensor, _ROWS, dim=1) for tensor in (w_GMN, y_GMK)]
    for w, y in zip(*parts, strict=True):
        total_G += torch.baddbmm(w, y, x_GKN, alpha=-1).norm(dim=-1).double().square().sum(-1)
    return total_G


def _relative_excess(
    w_GMN: Tensor,
    measured: _Measured,
    residual_G: Tensor,
    target: SearchTarget,
    probes: torch.Generator,
) -> Tensor:
    """Return an upper bound of the relative excess, infinite once it is clearly too large."""
    bound = _ExcessBound.of(measured, residual_G, target)
    theta_GL = measured.theta_GL
    last_G, lowest_G = theta_GL[:, target.rank - 1], theta_GL[:, -1]
    if bool(bound.complete_G.all()) or theta_GL.shape[1] == w_GMN.shape[2]:
        return bound(torch.zeros_like(lowest_G))  # no residual, or no complement
    # the norm of the rest is about the lowest Ritz value, and its range never shrinks to a point
    unknown_G = torch.full_like(lowest_G, torch.inf)
    if bool((bound(torch.lerp(lowest_G, last_G, _EXPECTED_SHARE)) > target.tolerance).any()):
        return unknown_G
    for rest in norm_ranges(_gram_product(w_GMN), measured.x_GNL, target.energy_G, probes):
        if bool(((rest.min_G >= last_G) & ~bound.complete_G).any()):
            break
        if bool(((rest.max_G < last_G) | bound.complete_G).all()):
            excess_G = bound(rest.max_G)
            if bool((excess_G <= target.tolerance).all()):
                return excess_G
    return unknown_G


@dataclass(frozen=True, kw_only=True)
class _ExcessBound:
    """The relative excess as a function of an upper bound of the rest's norm."""

    measured: _Measured
    target: SearchTarget
    min_residual_G: Tensor
    rounding_G: Tensor
    complete_G: Tensor

    @classmethod
    def of(cls, measured: _Measured, residual_G: Tensor, target: SearchTarget) -> "_ExcessBound":
        """Return the bound for measured Ritz vectors.

        Rounding enters twice. First, float32 vectors leave out more: the y of a v is the best one
        but for its own error, whose energy is about eps^2 of the total, and the error of a v costs
        eps^2 of the energy of its triplet. Second, the matrix of the Ritz step has errors D_ij of
        about 1e-7 of s_i s_j. A found vector that is not the best within the basis loses at most
        D_ij^2 / (theta_i - theta_j), or 2 |D_ij| where the two values are practically equal.
        """
        wanted_G = target.rank * measured.theta_GL[:, target.rank - 1]
        by_difference_G = residual_G > _MIN_DIFFERENCE * target.energy_G
        error_G = torch.where(by_difference_G, _DIFFERENCE_ERROR, _TOTAL_ROUNDING)
        return cls(
            measured=measured,
            target=target,
            min_residual_G=residual_G - error_G * target.energy_G,
            rounding_G=_ROUNDING * wanted_G + _TOTAL_ROUNDING * target.energy_G,
            complete_G=residual_G <= RESOLUTION * target.energy_G,
        )

    def __call__(self, rest_G: Tensor) -> Tensor:
        """Return the relative excess if the norm of the rest is at most `rest_G`."""
        theta_GL = self.measured.theta_GL
        bounds = [last_gap_bound, own_gaps_bound]
        if bool((theta_GL[:, 0] > _FAR_ABOVE * theta_GL[:, self.target.rank - 1]).all()):
            bounds.reverse()  # the tighter one first
        bound_G = self._from(bounds[0], rest_G)
        if bool((bound_G <= self.target.tolerance).all()):
            return bound_G
        return torch.minimum(bound_G, self._from(bounds[1], rest_G))

    def _from(self, best: GapBound, rest_G: Tensor) -> Tensor:
        theta_GL, rank = self.measured.theta_GL, self.target.rank
        best_G = best(theta_GL, self.measured.residuals_GLL, rest_G, rank)
        excess_G = (best_G - theta_GL[:, :rank].sum(-1)).clamp(min=0.0) + self.rounding_G
        optimal_G = self.min_residual_G - excess_G
        limited_G = torch.where(optimal_G > 0, excess_G / optimal_G, torch.inf)
        return torch.where(self.complete_G, 0.0, limited_G)


@dataclass(frozen=True, kw_only=True)
class _FastGram:
    """Products with W^T W without the deflated vectors, in bfloat16 where the device is fast at it.

    The deflated vectors are subtracted from W before it is rounded: they are so large that their
    rounding would hide all else.
    """

    low_GMN: Tensor
    deflated_GNA: Tensor | None = None

    @classmethod
    def of(cls, w_GMN: Tensor) -> "_FastGram":
        """Return the products with all of W."""
        return cls(low_GMN=w_GMN.bfloat16() if is_fast_at_bfloat16(w_GMN.device) else w_GMN)

    @classmethod
    def without(cls, w_GMN: Tensor, deflated_GNA: Tensor, y_GMA: Tensor) -> "_FastGram":
        """Return the products with W - y a^T, where y = W a."""
        if not is_fast_at_bfloat16(w_GMN.device):
            return cls(low_GMN=w_GMN, deflated_GNA=deflated_GNA)
        low_GMN = torch.empty_like(w_GMN, dtype=torch.bfloat16)
        parts = [torch.split(tensor, _ROWS, dim=1) for tensor in (low_GMN, w_GMN, y_GMA)]
        for low, w, y in zip(*parts, strict=True):
            low.copy_(torch.baddbmm(w, y, deflated_GNA.mT, alpha=-1))
        return cls(low_GMN=low_GMN, deflated_GNA=deflated_GNA)

    def __call__(self, x_GNA: Tensor) -> Tensor:
        """Return W^T W times the vectors, float32."""
        return self._projected(self.multiply_transposed(self.multiply(self._projected(x_GNA))))

    def multiply(self, x_GNA: Tensor) -> Tensor:
        """Return W times the vectors, in the precision that W has here."""
        # as rows, module by module: W is read in its memory order and never copied
        rows_GAN = x_GNA.mT.to(self.low_GMN.dtype).contiguous()
        pairs = zip(rows_GAN, self.low_GMN, strict=True)
        return _side_by_side([rows_AN @ low_MN.mT for rows_AN, low_MN in pairs]).mT

    def multiply_transposed(self, y_GMA: Tensor) -> Tensor:
        """Return W^T times the vectors, float32."""
        pairs = zip(y_GMA.mT, self.low_GMN, strict=True)
        return _side_by_side([rows_AM @ low_MN for rows_AM, low_MN in pairs]).float().mT

    def _projected(self, x_GNA: Tensor) -> Tensor:
        if self.deflated_GNA is None:
            return x_GNA
        return x_GNA - self.deflated_GNA @ (self.deflated_GNA.mT @ x_GNA)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(parts)) if len(parts) > 1 else parts[0][None]
