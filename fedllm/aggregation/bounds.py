"""Upper bounds on what the best triplets could hold, from few products with the matrix.

For `G = W^T W` and an orthonormal basis X of Ritz vectors (`theta` their values, descending) the
energy of the best K triplets is the sum of the K largest eigenvalues of G. What follows holds for
any X; F is G on the complement of X.

Legend: G modules, N narrow side, L Ritz vectors, K wanted rank, P probes, J Lanczos steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]  # X (G, N, P) -> W^T W X
GapBound = Callable[[Tensor, Tensor, Tensor, int], Tensor]

FAILURE_PROBABILITY = 1e-7

_CLEAR = 1e-12  # of the largest Ritz value: smaller gaps are rounding
_PROBES = 16
_CHI_SQUARE = 1.06  # P(chi-square of 16 degrees of freedom < 1.06) < 1e-7
_STEPS, _STEPS_A_LOOK = 24, 2
_PROJECTIONS, _CANCELLED = 3, 0.5  # at most, while so little is left of a direction
_ROUNDINGS, _NOTHING = 16.0, 1e-30  # of a norm, absolute


def last_gap_bound(theta_GL: Tensor, residuals_GLL: Tensor, rest_G: Tensor, rank: int) -> Tensor:
    """Return at most what the best `rank` triplets hold, infinite where there is no gap.

    In the basis of X and its complement G is [[diag(theta), R^T], [R, F]]. For any delta > 0 it
    is below blockdiag(diag(theta) + R^T R / delta, F + delta I); with delta = theta_K - |F| the
    second block holds none of the K largest.

    Args:
        theta_GL: Ritz values.
        residuals_GLL: R^T R, R = (I - X X^T) G X.
        rest_G: upper bounds of |F|.
        rank: K.
    """
    clear_G, delta_G1 = _gap(theta_GL, rest_G, rank)
    raised_GLL = torch.diag_embed(theta_GL) + residuals_GLL / delta_G1[..., None]
    return torch.where(clear_G, _largest(raised_GLL, rank), torch.inf)


def own_gaps_bound(theta_GL: Tensor, residuals_GLL: Tensor, rest_G: Tensor, rank: int) -> Tensor:
    """Return another such bound, tighter where values far above the last one are less precise.

    With every theta_i raised to at least |F| + delta / 2, which only adds to G, as many of its
    eigenvalues are above |F| as there are Ritz values: they are at most those of
    |F| + M + M^(-1/2) R^T R M^(-1/2), M = diag(theta) - |F| (N. J. Lehmann, Z. Angew. Math. Mech.
    29 (1949); Parlett, The Symmetric Eigenvalue Problem, 1998, section 10.5).

    Args:
        theta_GL: as `last_gap_bound` has them, and all others too.
        residuals_GLL: R^T R.
        rest_G: upper bounds of |F|.
        rank: K.
    """
    clear_G, delta_G1 = _gap(theta_GL, rest_G, rank)
    gaps_GL = torch.maximum(theta_GL - rest_G[:, None], delta_G1 / 2)
    roots_GL = gaps_GL.rsqrt()
    scaled_GLL = roots_GL[:, :, None] * residuals_GLL * roots_GL[:, None, :]
    above_G = _largest(torch.diag_embed(gaps_GL) + scaled_GLL, rank)
    return torch.where(clear_G, above_G + rank * rest_G, torch.inf)


def _gap(theta_GL: Tensor, rest_G: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return where there is one, and theta_K - |F| there, 1 elsewhere."""
    delta_G = theta_GL[:, rank - 1] - rest_G
    clear_G = delta_G > _CLEAR * theta_GL[:, 0]
    return clear_G, torch.where(clear_G, delta_G, 1.0)[:, None]


def _largest(matrices_GLL: Tensor, number: int) -> Tensor:
    """Return the sum of the largest eigenvalues."""
    values_GL: Tensor = torch.linalg.eigvalsh(matrices_GLL)
    return values_GL[:, -number:].sum(-1)


@dataclass(frozen=True, kw_only=True)
class NormRange:
    """What is known of |F|: found to be at least `least_G`, and at most `most_G`."""

    least_G: Tensor
    most_G: Tensor


def norm_ranges(
    apply: Apply, basis_GNL: Tensor, energy_G: Tensor, draws: torch.Generator
) -> Iterator[NormRange]:
    """Yield ever narrower ranges of |F|, one for every few products with some probes.

    With F's leading eigenvector v and normal probes g, |p(F) g|^2 >= p(|F|)^2 (v^T g)^2 for any
    polynomial p, and the sum of (v^T g)^2 is chi-square: all upper ends hold together but with
    `FAILURE_PROBABILITY`. p are Chebyshev polynomials of the best scale; Lanczos' matrices hold
    |p(F) g| for all of them (Golub and Meurant, Matrices, Moments and Quadrature, 2010, ch. 4).
    The ranges include the rounding of the products, of whatever precision they are.

    Args:
        apply: F's products, of which this takes what is in X.
        basis_GNL: X.
        energy_G: the squared Frobenius norms of W.
        draws: what the probes are drawn from.
    """
    shape = (basis_GNL.shape[0], basis_GNL.shape[1], _PROBES)
    probes = torch.randn(shape, generator=draws, dtype=basis_GNL.dtype).to(basis_GNL.device)
    now = _beside(probes, basis_GNL)
    norms_GP = now.double().norm(dim=1)
    now = now / norms_GP[:, None, :].to(now.dtype).clamp(min=_NOTHING)
    before = torch.zeros_like(now)
    largest_GP = torch.zeros_like(norms_GP)
    rounding = _ROUNDINGS * torch.finfo(now.dtype).eps
    alphas: list[Tensor] = []
    betas = [torch.zeros_like(norms_GP)]
    for step in range(1, _STEPS + 1):
        grown = apply(now) - before * betas[-1][:, None, :].to(now.dtype)
        alphas.append((grown * now).sum(1, dtype=torch.float64))
        # from each direction itself, not from its products: a small one is made larger, and with
        # it what it has of X, whose products are not F's
        grown = _beside(grown - now * alphas[-1][:, None, :].to(now.dtype), basis_GNL)
        betas.append(grown.double().norm(dim=1))
        # where all of a probe's directions are found the next one would be rounding
        largest_GP = torch.maximum(largest_GP, alphas[-1].abs() + betas[-1])
        ended_GP = betas[-1] <= (rounding * largest_GP).clamp(min=_NOTHING)
        betas[-1] = torch.where(ended_GP, 0.0, betas[-1])
        inverse_GP = torch.where(ended_GP, 0.0, 1 / betas[-1])
        before, now = now, grown * inverse_GP[:, None, :].to(now.dtype)
        if step % _STEPS_A_LOOK == 0:
            found = _range(torch.stack(alphas, -1), torch.stack(betas[1:], -1), norms_GP)
            yield _widened(found, rounding * energy_G.sqrt())


def _beside(x_GNP: Tensor, basis_GNL: Tensor) -> Tensor:
    """Return what is left of columns beside X.

    Rounding leaves some of X in it, which counts where little else is left.
    """
    for _ in range(_PROJECTIONS):
        given_GNP, x_GNP = x_GNP, x_GNP - basis_GNL @ (basis_GNL.mT @ x_GNP)
        left_GP, whole_GP = (each.double().norm(dim=1) for each in (x_GNP, given_GNP))
        if bool((left_GP >= _CANCELLED * whole_GP).all()):
            break
    return x_GNP


def _widened(found: NormRange, rounding_G: Tensor) -> NormRange:
    """Return the range of |F| from that of the matrix whose products rounding has made.

    An entry of W x is a sum of N terms, off by some sqrt(N) eps / 2 of |w| |x|, w the row (Higham
    and Mary, SIAM J. Sci. Comput. 41 (2019), theorem 2.4), each by itself: along one direction
    the errors of M of them come to sqrt(N / M) eps |W|_F / 2, M >= N. So do those of W^T y and of
    the projections, some six in a step, which leave a few eps of X in a direction. All of that is
    as if W (I - X X^T) were changed by less than `_ROUNDINGS` eps |W|_F (where nothing but
    rounding is beside X, half of it was seen), and no further are its singular values moved.
    """
    least_G = (found.least_G.clamp(min=0.0).sqrt() - rounding_G).clamp(min=0.0).square()
    return NormRange(least_G=least_G, most_G=(found.most_G.sqrt() + rounding_G).square())


def _range(alphas_GPJ: Tensor, betas_GPJ: Tensor, norms_GP: Tensor) -> NormRange:
    device, degree = alphas_GPJ.device, alphas_GPJ.shape[2]
    # many small decompositions, which a CPU does at once
    alphas_GPJ, betas_GPJ, norms_GP = alphas_GPJ.cpu(), betas_GPJ.cpu(), norms_GP.cpu()
    # a polynomial of this degree does not reach the last, unknown entry of the diagonal
    diagonal = torch.cat([alphas_GPJ, torch.zeros_like(alphas_GPJ[..., :1])], -1)
    matrices = torch.diag_embed(diagonal)
    matrices = matrices + torch.diag_embed(betas_GPJ, 1) + torch.diag_embed(betas_GPJ, -1)
    least_G = torch.linalg.eigvalsh(matrices[..., :-1, :-1])[..., -1].amax(-1)
    values_GPJ, vectors_GPJJ = torch.linalg.eigh(matrices)
    weights_GPJ = vectors_GPJJ[..., 0, :].square() * norms_GP[..., None].square()
    scales_GS = least_G[:, None] * torch.linspace(0.5, 1.1, 61, dtype=torch.float64)
    scales_GS = scales_GS.clamp(min=torch.finfo(torch.float64).tiny)
    x_GSPJ = 2 * values_GPJ[:, None] / scales_GS[:, :, None, None] - 1
    squares_GS = (_chebyshev(x_GSPJ, degree).square() * weights_GPJ[:, None]).sum((-2, -1))
    grown_GS = (squares_GS / _CHI_SQUARE).sqrt().clamp(min=1.0)
    most_GS = scales_GS / 2 * (1 + torch.cosh(torch.acosh(grown_GS) / degree))
    return NormRange(least_G=least_G.to(device), most_G=most_GS.amin(-1).to(device))


def _chebyshev(x: Tensor, degree: int) -> Tensor:
    inside = torch.cos(degree * torch.acos(x.clamp(-1, 1)))
    outside = torch.cosh(degree * torch.acosh(x.abs().clamp(min=1)))
    return torch.where(x.abs() <= 1, inside, outside)
