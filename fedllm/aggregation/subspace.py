"""The leading eigenvectors of G = W^T W by a filtered subspace iteration, with a certificate.

Chebyshev filters (Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219 (2006), section 3)
between Rayleigh-Ritz steps. Directions so large that a filter would drown the others with them
are set aside and take a plain power step, which is enough where all that are wanted are so large.
Only the start and the filters' products are imprecise: they choose a subspace, which float32 then
measures.

Legend: G modules, M long side, N narrow side, L vectors of the subspace, A of them set aside,
K wanted rank, P probes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.aggregation.bounds import Apply, GapBound, last_gap_bound, norm_ranges, own_gaps_bound
from fedllm.aggregation.decomposition import RESOLUTION
from fedllm.aggregation.devices import is_fast_at_bfloat16
from fedllm.aggregation.orthogonal import on_triangle, triangle

# of the wanted rank: what is carried beside it, whose gap to it speeds everything
_EXTRA, _LEAST_EXTRA = 0.6, 8
_POWERS, FILTERS = 2, 5
_SET_ASIDE_ABOVE, _FAR_ABOVE = 20.0, 8.0  # times the lowest Ritz value
_ABOVE_TOLERANCE = 60.0  # by how much a filter amplifies, times the tolerance's inverse root
_AMPLIFICATION = 3e4  # at most
_SMALLEST_DEGREE, _LARGEST_DEGREE = 2, 12
_HOPED = 0.25  # of the gap, which a norm will be found to be away from its least
_PLAINLY_ABOVE, _OVERGROWN = 1.0 + 1e-6, 1e10
_NOISE = 1e-12  # of the largest Ritz value
# what is left of a column of unit length beside those before it, for either precision
_NEARLY_DEPENDENT = {torch.float64: 1e-3, torch.float32: 3e-2}
_ROWS = 512  # at a time, which stay in a cache
_DIFFERENCE_TELLS, _DIFFERENCE_LOSES = 5e-5, 1e-7  # of the energy
_ROUNDING, _ROUNDING_OF_ALL = 2e-7, 1e-12  # of each of the wanted energies, and of all
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is searched for: how many triplets, how good, in matrices of which energies."""

    rank: int
    tolerance: float
    energy_G: Tensor


@dataclass(frozen=True, kw_only=True)
class Found:
    """The leading triplets: a basis x, y = W x, and how to turn both.

    `residual_G` is the energy that they leave out, `relative_excess_G` bounds by which share of
    the optimum it is more than that.
    """

    x_GNL: Tensor
    y_GML: Tensor
    turn_GLK: Tensor
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
    quick = _Quick.of(w_GMN)
    ritz = _begun(quick, width(asked.rank, w_GMN.shape[2]), near_GNJ, draws)
    for number in range(FILTERS):
        basis_GNL = _stepped(w_GMN, quick, ritz, asked, is_first=number == 0)
        if not bool(torch.isfinite(basis_GNL).all()):
            return None
        measured = _Measured.of(w_GMN, basis_GNL)
        left_G = _left(w_GMN, measured, asked)
        excess_G = _relative_excess(w_GMN, measured, left_G, asked, probes)
        if bool((excess_G <= asked.tolerance).all()):
            return Found(
                x_GNL=measured.x_GNL,
                y_GML=measured.y_GML,
                turn_GLK=measured.turn_GLL[..., : asked.rank],
                residual_G=left_G,
                relative_excess_G=excess_G,
            )
        ritz = measured.ritz
    return None


def energies(w_GMN: Tensor) -> Tensor:
    """Return squared Frobenius norms in float64, good to some 2e-8."""
    rows_GM: Tensor = torch.linalg.vector_norm(w_GMN, dim=-1)
    return rows_GM.double().square().sum(-1)


def gram(y_GML: Tensor) -> Tensor:
    """Return y^T y in float64, from float32 products of some rows at a time.

    Each entry's error is some 1e-7 of its two columns' norms: columns of very unequal size keep
    their relative accuracy.
    """
    modules, _, number = y_GML.shape
    total = y_GML.new_zeros((modules, number, number), dtype=torch.float64)
    for rows in torch.split(y_GML, _ROWS, dim=1):
        rows = rows.float()
        total += rows.mT @ rows
    return total


def orthonormal(x_GNL: Tensor, precision: torch.dtype = torch.float64) -> Tensor:
    """Return a basis of the columns' span, orthonormal to the last digits of float32.

    Columns that are nearly dependent are turned until they are not; where there are fewer
    directions than columns Householder's way completes the basis.

    Args:
        x_GNL: the columns, float32.
        precision: in float32 well-conditioned columns take half of the time and lose a digit.
    """
    for _ in range(3):
        for each in dict.fromkeys((precision, torch.float64)):
            given_GNL = x_GNL.to(each)
            t_GLL = triangle(given_GNL, _NEARLY_DEPENDENT[each])
            if t_GLL is not None:
                return on_triangle(given_GNL, t_GLL).float()
        wide_GNL = x_GNL.double()
        unit = wide_GNL / wide_GNL.norm(dim=1, keepdim=True).clamp(min=_TINY)
        values_GL, vectors_GLL = torch.linalg.eigh(unit.mT @ unit)
        values_GL = torch.maximum(values_GL, 1e-12 * values_GL[:, -1:]).clamp(min=_TINY)
        x_GNL = (unit @ (vectors_GLL * values_GL.rsqrt()[:, None, :])).float()
    basis_GNL: Tensor = torch.linalg.qr(x_GNL).Q
    return basis_GNL


@dataclass(frozen=True, kw_only=True)
class _Ritz:
    """Ritz vectors x and Ritz values, descending."""

    x_GNL: Tensor
    theta_GL: Tensor

    @property
    def number_aside(self) -> int:
        """How many leading vectors would drown the others in a filter, in every module."""
        above_GL = self.theta_GL > _SET_ASIDE_ABOVE * self.cut[:, None]
        return int(above_GL.sum(-1).min())

    @property
    def cut(self) -> Tensor:
        """Below which a filter lets everything fade: the lowest Ritz value, if it is no noise."""
        return torch.maximum(self.theta_GL[:, -1], _NOISE * self.theta_GL[:, 0]).clamp(min=_TINY)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What float32 products say of a basis x: y = W x, its Ritz values, how to turn it to them."""

    x_GNL: Tensor
    y_GML: Tensor
    theta_GL: Tensor
    turn_GLL: Tensor
    residuals_GLL: Tensor  # products of the Ritz vectors' residuals

    @classmethod
    def of(cls, w_GMN: Tensor, x_GNL: Tensor) -> "_Measured":
        """Return it for orthonormal columns."""
        y_GML = w_GMN @ x_GNL
        gram_GLL = gram(y_GML)
        theta_GL, turn_GLL = torch.linalg.eigh(gram_GLL)
        turn_GLL = turn_GLL.flip(-1)  # eigh sorts from the smallest
        # what rounding leaves of it within the basis makes the bounds larger, not wrong
        r_GNL = _back(w_GMN, y_GML).baddbmm(x_GNL, gram_GLL.float(), alpha=-1)
        return cls(
            x_GNL=x_GNL,
            y_GML=y_GML,
            theta_GL=theta_GL.flip(-1).clamp(min=0.0),
            turn_GLL=turn_GLL,
            residuals_GLL=turn_GLL.mT @ gram(r_GNL) @ turn_GLL,
        )

    @property
    def ritz(self) -> _Ritz:
        """The Ritz vectors and values."""
        x_GNL = (self.x_GNL.double() @ self.turn_GLL).float()
        return _Ritz(x_GNL=x_GNL, theta_GL=self.theta_GL)


def _back(w_GMN: Tensor, y_GML: Tensor) -> Tensor:
    # the rows of y^T W are read as W lies: twice as fast for few of them
    return (y_GML.mT @ w_GMN).mT


def _exactly(w_GMN: Tensor) -> Apply:
    return lambda x_GNP: _back(w_GMN, w_GMN @ x_GNP)


def _begun(quick: "_Quick", number: int, near_GNJ: Tensor, draws: torch.Generator) -> _Ritz:
    """Return about the Ritz vectors and values after a few power steps."""
    modules, _, narrow = quick.low_GMN.shape
    drawn = torch.randn(modules, narrow, number - near_GNJ.shape[2], generator=draws)
    drawn = drawn.to(quick.low_GMN.device) / math.sqrt(narrow)
    x_GNL = torch.cat([near_GNJ.to(drawn), drawn], dim=2)
    for _ in range(_POWERS - 1):
        x_GNL = orthonormal(quick(x_GNL), torch.float32)
    y_GML = quick.forth(x_GNL)
    theta_GL, turn_GLL = torch.linalg.eigh(gram(y_GML).float())
    grown_GNL = quick.back(y_GML) @ turn_GLL.flip(-1)
    return _Ritz(
        x_GNL=orthonormal(grown_GNL, torch.float32),
        theta_GL=theta_GL.flip(-1).clamp(min=0.0).double(),
    )


def _stepped(
    w_GMN: Tensor, whole: "_Quick", ritz: _Ritz, asked: Asked, *, is_first: bool
) -> Tensor:
    """Return a basis nearer to the wanted vectors."""
    if bool((ritz.theta_GL[:, asked.rank - 1] > _FAR_ABOVE * ritz.cut).all()):
        if is_first and _may_round(w_GMN, ritz, asked):
            return orthonormal(_back(w_GMN, whole.forth(ritz.x_GNL).float()))
        return orthonormal(_exactly(w_GMN)(ritz.x_GNL))
    aside = ritz.number_aside
    x_GNA, before = ritz.x_GNL[..., :aside], ritz.x_GNL[..., aside:]
    kept_GMA = w_GMN @ x_GNA
    quick = _Quick.beside(w_GMN, x_GNA, kept_GMA) if aside else whole
    # T_0 and T_1, then T_{d+1}(G) = (4 / cut G - 2) T_d(G) - T_{d-1}(G)
    half_G11 = (ritz.cut / 2)[:, None, None].float()
    now = quick(before).div_(half_G11).sub_(before)
    for _ in range(_degree(ritz, asked) - 1):
        if not float(now.mT.abs().max()) < _OVERGROWN:  # its rows, which are not copied
            break  # what is left beside the vectors set aside is rounding
        grown = quick(now).div_(half_G11 / 2).sub_(now, alpha=2).sub_(before)
        before, now = now, grown
    return orthonormal(torch.cat([_back(w_GMN, kept_GMA), now], dim=2))


def _may_round(w_GMN: Tensor, ritz: _Ritz, asked: Asked) -> bool:
    """Say whether the first product of a power step may be in bfloat16.

    What it loses is of all of W, however small the wanted value, and is scattered evenly over all
    M N pairs of vectors: the second product makes at most so large a share of what is left out
    excess.
    """
    theta_GK = ritz.theta_GL[:, : asked.rank].clamp(min=_TINY)
    lost_G = torch.finfo(torch.bfloat16).eps ** 2 / 16 * asked.energy_G
    share_G = lost_G * (1 / theta_GK).sum(-1) / w_GMN[0].numel()
    return bool((share_G < asked.tolerance).all())


def _degree(ritz: _Ritz, asked: Asked) -> int:
    """Return the degree of the filter that lifts the wanted last one high enough above the rest.

    Less where the largest ones would be lifted so high above it that bfloat16 loses it.
    """
    last_G, first_G = ritz.theta_GL[:, asked.rank - 1], ritz.theta_GL[:, ritz.number_aside]
    needed = _degree_for(_ABOVE_TOLERANCE / math.sqrt(asked.tolerance), last_G / ritz.cut)
    most = _degree_for(_AMPLIFICATION, first_G / ritz.cut)
    return max(_SMALLEST_DEGREE, min(_LARGEST_DEGREE, needed, most))


def _degree_for(amplification: float, ratios_G: Tensor) -> int:
    """Return the degree of the Chebyshev polynomial that is so large at all of these places."""
    at = 2 * max(float(ratios_G.max()), _PLAINLY_ABOVE) - 1
    return math.ceil(math.acosh(amplification) / math.acosh(at))


def _left(w_GMN: Tensor, measured: _Measured, asked: Asked) -> Tensor:
    """Return the energy that the leading triplets leave out.

    As a difference of energies, good to `_DIFFERENCE_LOSES` of them; where that is too little,
    from what is left of W, good to `_ROUNDING_OF_ALL`.
    """
    # sums of many squares keep more digits than the products that Ritz values are found from
    within_G = energies(measured.y_GML)
    kept_G = within_G - measured.theta_GL[:, asked.rank :].sum(-1)
    difference_G = (asked.energy_G - kept_G).clamp(min=0.0)
    if bool((difference_G > _DIFFERENCE_TELLS * asked.energy_G).all()):
        return difference_G
    x_GKN = measured.ritz.x_GNL[..., : asked.rank].mT
    y_GMK = measured.y_GML @ measured.turn_GLL[..., : asked.rank].float()
    total_G = torch.zeros_like(difference_G)
    parts = [torch.split(whole, _ROWS, dim=1) for whole in (w_GMN, y_GMK)]
    for w, y in zip(*parts, strict=True):
        total_G += torch.baddbmm(w, y, x_GKN, alpha=-1).norm(dim=-1).double().square().sum(-1)
    return total_G


def _relative_excess(
    w_GMN: Tensor, measured: _Measured, left_G: Tensor, asked: Asked, probes: torch.Generator
) -> Tensor:
    """Return at most how much less could be left out, infinite once it is plainly not enough."""
    bound = _Bound.of(measured, left_G, asked)
    theta_GL = measured.theta_GL
    last_G, lowest_G = theta_GL[:, asked.rank - 1], theta_GL[:, -1]
    if bool(bound.done_G.all()) or theta_GL.shape[1] == w_GMN.shape[2]:
        return bound(torch.zeros_like(lowest_G))  # nothing is left, or there is no rest
    # the norm of the rest is hardly less than the lowest Ritz value, and never found quite so
    unknown_G = torch.full_like(lowest_G, torch.inf)
    if bool((bound(torch.lerp(lowest_G, last_G, _HOPED)) > asked.tolerance).any()):
        return unknown_G
    for rest in norm_ranges(_exactly(w_GMN), measured.x_GNL, asked.energy_G, probes):
        if bool(((rest.least_G >= last_G) & ~bound.done_G).any()):
            break
        if bool(((rest.most_G < last_G) | bound.done_G).all()):
            excess_G = bound(rest.most_G)
            if bool((excess_G <= asked.tolerance).all()):
                return excess_G
    return unknown_G


@dataclass(frozen=True, kw_only=True)
class _Bound:
    """The relative excess as it follows from a bound of the norm of the rest."""

    measured: _Measured
    asked: Asked
    least_left_G: Tensor
    rounding_G: Tensor
    done_G: Tensor

    @classmethod
    def of(cls, measured: _Measured, left_G: Tensor, asked: Asked) -> "_Bound":
        """Return that of the Ritz vectors.

        Rounding enters twice. Float32 vectors leave out more: the y of a v is the best one but
        for its own error, whose energy is some eps^2 of all, and eps^2 of a triplet's energy goes
        with the errors of its v. And the matrix that Ritz vectors are found from has errors D_ij
        of some 1e-7 of s_i s_j: of the K found, any that is not the best within the basis loses
        at most D_ij^2 / (theta_i - theta_j) or, where those are as good as equal, 2 |D_ij|.
        """
        wanted_G = asked.rank * measured.theta_GL[:, asked.rank - 1]
        by_difference_G = left_G > _DIFFERENCE_TELLS * asked.energy_G
        loses_G = torch.where(by_difference_G, _DIFFERENCE_LOSES, _ROUNDING_OF_ALL)
        return cls(
            measured=measured,
            asked=asked,
            least_left_G=left_G - loses_G * asked.energy_G,
            rounding_G=_ROUNDING * wanted_G + _ROUNDING_OF_ALL * asked.energy_G,
            done_G=left_G <= RESOLUTION * asked.energy_G,
        )

    def __call__(self, rest_G: Tensor) -> Tensor:
        """Return the bound where the norm of the rest is at most `rest_G`."""
        theta_GL = self.measured.theta_GL
        bounds = [last_gap_bound, own_gaps_bound]
        if bool((theta_GL[:, 0] > _FAR_ABOVE * theta_GL[:, self.asked.rank - 1]).all()):
            bounds.reverse()  # the likelier one first
        bound_G = self._by(bounds[0], rest_G)
        if bool((bound_G <= self.asked.tolerance).all()):
            return bound_G
        return torch.minimum(bound_G, self._by(bounds[1], rest_G))

    def _by(self, best: GapBound, rest_G: Tensor) -> Tensor:
        theta_GL, rank = self.measured.theta_GL, self.asked.rank
        best_G = best(theta_GL, self.measured.residuals_GLL, rest_G, rank)
        excess_G = (best_G - theta_GL[:, :rank].sum(-1)).clamp(min=0.0) + self.rounding_G
        optimal_G = self.least_left_G - excess_G
        bounded_G = torch.where(optimal_G > 0, excess_G / optimal_G, torch.inf)
        return torch.where(self.done_G, 0.0, bounded_G)


@dataclass(frozen=True, kw_only=True)
class _Quick:
    """W^T W beside the vectors set aside, in bfloat16 where the device is fast at it.

    Those vectors are taken out of W before it is rounded: beside them all else is rounding.
    """

    low_GMN: Tensor
    aside_GNA: Tensor | None = None

    @classmethod
    def of(cls, w_GMN: Tensor) -> "_Quick":
        """Return the products with all of W."""
        return cls(low_GMN=w_GMN.bfloat16() if is_fast_at_bfloat16(w_GMN.device) else w_GMN)

    @classmethod
    def beside(cls, w_GMN: Tensor, aside_GNA: Tensor, y_GMA: Tensor) -> "_Quick":
        """Return the products with W - y a^T, y = W a."""
        if not is_fast_at_bfloat16(w_GMN.device):
            return cls(low_GMN=w_GMN, aside_GNA=aside_GNA)
        low_GMN = torch.empty_like(w_GMN, dtype=torch.bfloat16)
        parts = [torch.split(whole, _ROWS, dim=1) for whole in (low_GMN, w_GMN, y_GMA)]
        for low, w, y in zip(*parts, strict=True):
            low.copy_(torch.baddbmm(w, y, aside_GNA.mT, alpha=-1))
        return cls(low_GMN=low_GMN, aside_GNA=aside_GNA)

    def __call__(self, x_GNA: Tensor) -> Tensor:
        """Return the products, float32."""
        return self._projected(self.back(self.forth(self._projected(x_GNA))))

    def forth(self, x_GNA: Tensor) -> Tensor:
        """Return W times the vectors, as precise as W is here."""
        # as rows, one module after the other: W is then read as it lies, and never copied
        rows_GAN = x_GNA.mT.to(self.low_GMN.dtype).contiguous()
        pairs = zip(rows_GAN, self.low_GMN, strict=True)
        return _side_by_side([rows_AN @ low_MN.mT for rows_AN, low_MN in pairs]).mT

    def back(self, y_GMA: Tensor) -> Tensor:
        """Return W^T times the vectors, float32."""
        pairs = zip(y_GMA.mT, self.low_GMN, strict=True)
        return _side_by_side([rows_AM @ low_MN for rows_AM, low_MN in pairs]).float().mT

    def _projected(self, x_GNA: Tensor) -> Tensor:
        if self.aside_GNA is None:
            return x_GNA
        return x_GNA - self.aside_GNA @ (self.aside_GNA.mT @ x_GNA)


def _side_by_side(each: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(each)) if len(each) > 1 else each[0][None]
