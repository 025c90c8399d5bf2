"""Upper bounds of the energy that the best triplets can hold, from few products with the matrix.

For `G = W^T W` and an orthonormal basis X of Ritz vectors (`theta` their values, descending) the
energy of the best K triplets is the sum of the K largest eigenvalues of G. The bounds hold for any
X. F is G restricted to the complement of X.

Legend: G modules, N narrow side, L Ritz vectors, K wanted rank, P probes, J Lanczos steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]  # X (G, N, P) -> W^T W X
GapBound = Callable[[Tensor, Tensor, Tensor, int], Tensor]

FAILURE_PROBABILITY = 1e-7

_MIN_GAP = 1e-12  # of the largest Ritz value: smaller gaps are rounding
_PROBES = 16
_CHI_SQUARE = 1.06  # P(chi-square of 16 degrees of freedom < 1.06) < 1e-7
_STEPS, _STEPS_A_RANGE = 24, 2
_MAX_PROJECTIONS, _MIN_REMAINDER = 3, 0.5  # project again while less of a column remains
_ROUNDING_FACTOR, _TINY = 16.0, 1e-30  # roundings in a norm; an absolute floor


def last_gap_bound(theta_GL: Tensor, residuals_GLL: Tensor, rest_G: Tensor, rank: int) -> Tensor:
    """Return an upper bound of the energy of the best `rank` triplets, infinite without a gap.

    In the basis of X and its complement G is [[diag(theta), R^T], [R, F]]. For any delta > 0 it is
    below blockdiag(diag(theta) + R^T R / delta, F + delta I). With delta = theta_K - |F| the second
    block holds none of the K largest eigenvalues.

    Args:
        theta_GL: Ritz values.
        residuals_GLL: R^T R, R = (I - X X^T) G X.
        rest_G: upper bounds of |F|.
        rank: K.
    """
    has_gap_G, delta_G1 = _gap(theta_GL, rest_G, rank)
    raised_GLL = torch.diag_embed(theta_GL) + residuals_GLL / delta_G1[..., None]
    return torch.where(has_gap_G, _largest(raised_GLL, rank), torch.inf)


def own_gaps_bound(theta_GL: Tensor, residuals_GLL: Tensor, rest_G: Tensor, rank: int) -> Tensor:
    """Return a second bound, tighter where values far above the last one are less precise.

    Raise every theta_i to at least |F| + delta / 2, which only adds to G. Then as many of its
    eigenvalues are above |F| as there are Ritz values, and they are at most those of |F| + M +
    M^(-1/2) R^T R M^(-1/2), M = diag(theta) - |F| (N. J. Lehmann, Z. Angew. Math. Mech. 29 (1949);
    Parlett, The Symmetric Eigenvalue Problem, 1998, section 10.5).

    Args:
        theta_GL: Ritz values, as for `last_gap_bound`.
        residuals_GLL: R^T R.
        rest_G: upper bounds of |F|.
        rank: K.
    """
    has_gap_G, delta_G1 = _gap(theta_GL, rest_G, rank)
    gaps_GL = torch.maximum(theta_GL - rest_G[:, None], delta_G1 / 2)
    roots_GL = gaps_GL.rsqrt()
    scaled_GLL = roots_GL[:, :, None] * residuals_GLL * roots_GL[:, None, :]
    above_G = _largest(torch.diag_embed(gaps_GL) + scaled_GLL, rank)
    return torch.where(has_gap_G, above_G + rank * rest_G, torch.inf)


def _gap(theta_GL: Tensor, rest_G: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return where there is a gap, and its size theta_K - |F| (1 where there is none)."""
    delta_G = theta_GL[:, rank - 1] - rest_G
    has_gap_G = delta_G > _MIN_GAP * theta_GL[:, 0]
    return has_gap_G, torch.where(has_gap_G, delta_G, 1.0)[:, None]


def _largest(matrices_GLL: Tensor, number: int) -> Tensor:
    """Return the sum of the `number` largest eigenvalues."""
    values_GL: Tensor = torch.linalg.eigvalsh(matrices_GLL)
    return values_GL[:, -number:].sum(-1)


@dataclass(frozen=True, kw_only=True)
class NormRange:
    """The range of |F| that is known: at least `min_G`, at most `max_G`."""

    min_G: Tensor
    max_G: Tensor


def norm_ranges(
    apply: Apply, basis_GNL: Tensor, energy_G: Tensor, draws: torch.Generator
) -> Iterator[NormRange]:
    """Yield ever narrower ranges of |F|, one after every few products with the probes.

    With F's leading eigenvector v and normal probes g, |p(F) g|^2 >= p(|F|)^2 (v^T g)^2 for any
    polynomial p, and the sum of (v^T g)^2 is chi-square: all upper ends hold together, except with
    `FAILURE_PROBABILITY`. p are Chebyshev polynomials of the best scale. Lanczos' matrices give
    |p(F) g| for all of them (Golub and Meurant, Matrices, Moments and Quadrature, 2010, ch. 4). The
    ranges include the rounding of the products in any precision.

    Args:
        apply: products with G; the part in X is projected out.
        basis_GNL: X.
        energy_G: the squared Frobenius norms of W.
        draws: the generator of the probes.
    """
    shape = (basis_GNL.shape[0], basis_GNL.shape[1], _PROBES)
    probes = torch.randn(shape, generator=draws, dtype=basis_GNL.dtype).to(basis_GNL.device)
    now = _orthogonal_to(probes, basis_GNL)
    norms_GP = now.double().norm(dim=1)
    now = now / norms_GP[:, None, :].to(now.dtype).clamp(min=_TINY)
    before = torch.zeros_like(now)
    largest_GP = torch.zeros_like(norms_GP)
    rounding = _ROUNDING_FACTOR * torch.finfo(now.dtype).eps
    alphas: list[Tensor] = []
    betas = [torch.zeros_like(norms_GP)]
    for step in range(1, _STEPS + 1):
        grown = apply(now) - before * betas[-1][:, None, :].to(now.dtype)
        alphas.append((grown * now).sum(1, dtype=torch.float64))
        # project each direction itself: scaling up a small one also scales up its part in X,
        # and products with that part are not F's
        grown = _orthogonal_to(grown - now * alphas[-1][:, None, :].to(now.dtype), basis_GNL)
        betas.append(grown.double().norm(dim=1))
        # once a probe has no new direction, the next one would be rounding
        largest_GP = torch.maximum(largest_GP, alphas[-1].abs() + betas[-1])
        ended_GP = betas[-1] <= (rounding * largest_GP).clamp(min=_TINY)
        betas[-1] = torch.where(ended_GP, 0.0, betas[-1])
        inverse_GP = torch.where(ended_GP, 0.0, 1 / betas[-1])
        before, now = now, grown * inverse_GP[:, None, :].to(now.dtype)
        if step % _STEPS_A_RANGE == 0:
            computed = _range(torch.stack(alphas, -1), torch.stack(betas[1:], -1), norms_GP)

            yield _widened(computed, rounding * energy_G.sqrt())


def _orthogonal_to(x_GNP: Tensor, basis_GNL: Tensor) -> Tensor:
    """Return the columns minus their part in X.

    One projection leaves rounding in X, which matters where little of a column remains.
    """
    for _ in range(_MAX_PROJECTIONS):
        before_GNP, x_GNP = x_GNP, x_GNP - basis_GNL @ (basis_GNL.mT @ x_GNP)
        remaining_GP, before_GP = x_GNP.double().norm(dim=1), before_GNP.double().norm(dim=1)
        if bool((remaining_GP >= _MIN_REMAINDER * before_GP).all()):
            break
    return x_GNP


def _widened(computed: NormRange, rounding_G: Tensor) -> NormRange:
    """Return the range of |F| from that of the matrix whose products include rounding.

    An entry of W x is a sum of N terms, with an error of about sqrt(N) eps / 2 of |w| |x|, w the
    row (Higham and Mary, SIAM J. Sci. Comput. 41 (2019), theorem 2.4), independent of other
    entries. Along one direction the errors of M entries add up to sqrt(N / M) eps |W|_F / 2, M >=
    N. The same holds for W^T y and for the projections, about six in a step, which leave a few eps
    of X in a direction. Together this is as if W (I - X X^T) were changed by less than
    `_ROUNDING_FACTOR` eps |W|_F (half of it was measured where only rounding is beside X), and its
    singular values move by no more than that.
    """
    min_G = (computed.min_G.clamp(min=0.0).sqrt() - rounding_G).clamp(min=0.0).square()
    return NormRange(min_G=min_G, max_G=(computed.max_G.sqrt() + rounding_G).square())


def _range(alphas_GPJ: Tensor, betas_GPJ: Tensor, norms_GP: Tensor) -> NormRange:
    device, degree = alphas_GPJ.device, alphas_GPJ.shape[2]
    # many small decompositions: a CPU does them at once
    alphas_GPJ, betas_GPJ, norms_GP = alphas_GPJ.cpu(), betas_GPJ.cpu(), norms_GP.cpu()
    # a polynomial of this degree does not reach the last, unknown entry of the diagonal
    diagonal = torch.cat([alphas_GPJ, torch.zeros_like(alphas_GPJ[..., :1])], -1)
    matrices = torch.diag_embed(diagonal)
    matrices = matrices + torch.diag_embed(betas_GPJ, 1) + torch.diag_embed(betas_GPJ, -1)
    min_G = torch.linalg.eigvalsh(matrices[..., :-1, :-1])[..., -1].amax(-1)
    values_GPJ, vectors_GPJJ = torch.linalg.eigh(matrices)
    weights_GPJ = vectors_GPJJ[..., 0, :].square() * norms_GP[..., None].square()
    scales_GS = min_G[:, None] * torch.linspace(0.5, 1.1, 61, dtype=torch.float64)
    scales_GS = scales_GS.clamp(min=torch.finfo(torch.float64).tiny)
    x_GSPJ = 2 * values_GPJ[:, None] / scales_GS[:, :, None, None] - 1
    squares_GS = (_chebyshev(x_GSPJ, degree).square() * weights_GPJ[:, None]).sum((-2, -1))
    grown_GS = (squares_GS / _CHI_SQUARE).sqrt().clamp(min=1.0)
    max_GS = scales_GS / 2 * (1 + torch.cosh(torch.acosh(grown_GS) / degree))
    return NormRange(min_G=min_G.to(device), max_G=max_GS.amin(-1).to(device))


def _chebyshev(x: Tensor, degree: int) -> Tensor:
    inside = torch.cos(degree * torch.acos(x.clamp(-1, 1)))
    outside = torch.cosh(degree * torch.acosh(x.abs().clamp(min=1)))
    return torch.where(x.abs() <= 1, inside, outside)
