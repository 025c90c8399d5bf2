"""Upper bounds on what the best triplets could hold, from few products with the matrix.

For `G = W^T W` and an orthonormal basis X of Ritz vectors (`theta` their values, descending) the
energy of the best K triplets is the sum of the K largest eigenvalues of G. Both bounds hold for
any X, with the stated probability over probes that are drawn apart from X.

Legend: G modules, N narrow side, L Ritz vectors, K wanted rank, P probes, D degree.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]  # X (G, N, P) -> W^T W X

FAILURE_PROBABILITY = 1e-6

_NORM_PROBES, _NORM_DEGREE = 16, 6
_MOMENT_PROBES, _MOMENT_STEPS = 48, 5
# P(chi-square of 16 degrees < 1.20) and P(Student's t of 47 degrees > 5.66) are below 5e-7
_CHI_SQUARE_16 = 1.20
_STUDENT_47 = 5.66


def gap_bound(
    theta_GL: Tensor, residuals_GLL: Tensor, rest_G: Tensor, rank: int
) -> Tensor:
    """Return at most what the best `rank` triplets hold, infinite where there is no gap.

    In the basis of X and its complement G is [[diag(theta), R^T], [R, F]]. For any delta > 0 it
    is below blockdiag(diag(theta) + R^T R / delta, F + delta I); with delta = theta_K - |F| the
    second block holds none of the K largest.

    Args:
        theta_GL: Ritz values.
        residuals_GLL: R^T R, R = (I - X X^T) G X.
        rest_G: upper bounds of |F|, such as `norm_bound` gives.
        rank: K.
    """
    delta_G = theta_GL[:, rank - 1] - rest_G
    clear_G = delta_G > 0
    safe_G11 = torch.where(clear_G, delta_G, 1.0)[:, None, None]
    raised_GL = torch.linalg.eigvalsh(torch.diag_embed(theta_GL) + residuals_GLL / safe_G11)
    best_G = raised_GL[:, -rank:].sum(-1)
    return torch.where(clear_G, best_G, torch.inf)


def norm_bound(apply: Apply, basis_GNL: Tensor, scale_G: Tensor, draws: torch.Generator) -> Tensor:
    """Return upper bounds of the norm of G on the complement of a basis.

    A Chebyshev polynomial T of F, scaled to [0, scale], applied to normal probes g: where v is
    F's leading eigenvector, |T(F) g|^2 >= T(|F|)^2 (v^T g)^2, and the sum of (v^T g)^2 is
    chi-square.
    """
    probes = _probes(basis_GNL, _NORM_PROBES, draws)

    def projected(x: Tensor) -> Tensor:
        return x - basis_GNL @ (basis_GNL.mT @ x)

    half_G11 = (scale_G / 2)[:, None, None].to(probes.dtype)
    before = projected(probes)
    now = projected(apply(before)) / half_G11 - before
    for _ in range(_NORM_DEGREE - 1):
        before, now = now, 2 * (projected(apply(now)) / half_G11 - now) - before
    grown_G = (now.double().square().sum((-2, -1)) / _CHI_SQUARE_16).sqrt().clamp(min=1.0)
    return scale_G / 2 * (1 + torch.cosh(torch.acosh(grown_G) / _NORM_DEGREE))


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """What is known of the eigenvalues of G: Ritz values, their number, their sum."""

    theta_GL: Tensor
    energy_G: Tensor
    size: int


def moment_bound(apply: Apply, known: Spectra, rank: int, basis_GNL: Tensor, draws: torch.Generator) -> Tensor:
    """Return at most what the best `rank` triplets hold, from random moments of the spectrum.

    The sum of the K largest eigenvalues is at most K tau + tr (G - tau)_+ <= K tau + tr p(G) for
    any tau and any polynomial p >= (x - tau)_+. p is fitted to the Ritz values and a guess of the
    rest; tr p(G) is then estimated (Hutchinson) with probes that neither was chosen by, its
    affine part taken exactly from the size and the energy. Student's t gives the margin. Tight
    where the spectrum is flat, where `gap_bound` finds no gap.
    """
    probes = _probes(basis_GNL, _MOMENT_PROBES, draws)
    top_G = 1.02 * known.theta_GL[:, 0]
    moments_GPD = _moments(apply, probes, top_G)
    bounds = []
    for moments_PD, theta_L, energy, top in zip(
        moments_GPD, known.theta_GL, known.energy_G.tolist(), top_G.tolist(), strict=True
    ):
        bounds.append(_moment_bound(moments_PD, theta_L / top, energy / top, known.size, rank) * top)
    return torch.stack(bounds)


def _probes(like_GNL: Tensor, number: int, draws: torch.Generator) -> Tensor:
    shape = (like_GNL.shape[0], like_GNL.shape[1], number)
    return torch.randn(shape, generator=draws, dtype=like_GNL.dtype).to(like_GNL.device)


def _moments(apply: Apply, probes_GNP: Tensor, top_G: Tensor) -> Tensor:
    """Return g^T T_d(G) g for every probe and d = 0, ..., 2 steps: T_i T_j has degree i + j."""
    half_G11 = (top_G / 2)[:, None, None].to(probes_GNP.dtype)
    terms = [probes_GNP, apply(probes_GNP) / half_G11 - probes_GNP]
    for _ in range(_MOMENT_STEPS - 1):
        terms.append(2 * (apply(terms[-1]) / half_G11 - terms[-1]) - terms[-2])

    def inner(one: Tensor, two: Tensor) -> Tensor:
        return (one * two).sum(-2, dtype=torch.float64)

    found = [inner(terms[0], terms[0]), inner(terms[0], terms[1])]
    for before, now in zip(terms[1:], terms[2:], strict=False):
        found += [2 * inner(before, before) - found[0], 2 * inner(before, now) - found[1]]
    found.append(2 * inner(terms[-1], terms[-1]) - found[0])
    return torch.stack(found, dim=-1).cpu()


def _moment_bound(moments_PD: Tensor, theta_L: Tensor, energy: float, size: int, rank: int) -> Tensor:
    """Return the bound of one module whose spectrum is scaled to [0, 1]."""
    theta_L = theta_L.cpu()
    guess_N = torch.cat([theta_L, _guessed_rest(theta_L, energy, size)])
    tau = float(theta_L[rank - 1])
    degree = moments_PD.shape[1] - 1
    majorant_D = _majorant(guess_N, tau, degree)
    # what is left of p beside an affine part, whose trace is known, fluctuates least
    values_ND = _chebyshev(guess_N, degree)
    affine_2 = torch.linalg.lstsq(values_ND[:, :2], (values_ND @ majorant_D)[:, None]).solution[:, 0]
    remainder_D = majorant_D.clone()
    remainder_D[:2] -= affine_2
    exact = float(affine_2[0]) * size + float(affine_2[1]) * (2 * energy - size)
    estimates_P = moments_PD @ remainder_D
    margin = _STUDENT_47 * estimates_P.std() / math.sqrt(len(estimates_P))
    return rank * tau + exact + estimates_P.mean() + margin


def _guessed_rest(theta_L: Tensor, energy: float, size: int) -> Tensor:
    """Return eigenvalues as the rest could have them: evenly spread, of the right sum."""
    number, most = size - len(theta_L), float(theta_L[-1])
    mean = max(0.0, energy - float(theta_L.sum())) / max(1, number)
    return torch.linspace(max(0.0, 2 * mean - most), min(most, 2 * mean), number, dtype=torch.float64)


def _chebyshev(x_N: Tensor, degree: int) -> Tensor:
    """Return T_d(2 x - 1), d = 0, ..., degree, for every x."""
    y_N = 2 * x_N - 1
    columns = [torch.ones_like(y_N), y_N]
    for _ in range(degree - 1):
        columns.append(2 * y_N * columns[-1] - columns[-2])
    return torch.stack(columns, dim=-1)


_GRID, _BEYOND = 400, 1.3


def _majorant(guess_N: Tensor, tau: float, degree: int) -> Tensor:
    """Return the coefficients of a small polynomial p >= (x - tau)_+ on [0, 1.3].

    A linear programme in degree + 1 unknowns, by Newton's method on its logarithmic barrier; the
    eigenvalues lie within 1.3 with all but the stated probability, see `norm_bound`. The grid is
    that of Chebyshev nodes, between which p bends less than the slack that is added at the end.
    """
    angles = torch.linspace(0, math.pi, _GRID, dtype=torch.float64)
    grid_M = _BEYOND * (1 - torch.cos(angles)) / 2
    basis_MD = _chebyshev(grid_M, degree)
    # scaled so that a step of Newton's method is well conditioned
    q_MD, r_DD = torch.linalg.qr(basis_MD)
    floor_M = (grid_M - tau).clamp(min=0.0)
    cost_D = torch.linalg.solve_triangular(r_DD.mT, _chebyshev(guess_N, degree).sum(0)[:, None], upper=False)[:, 0]
    # p = 1.3 lies above everywhere
    point_D = q_MD.mT @ torch.full_like(grid_M, 2 * _BEYOND)
    weight = float(cost_D.abs().max())
    for _ in range(60):
        slack_M = q_MD @ point_D - floor_M
        gradient_D = cost_D - weight * (q_MD.mT @ (1 / slack_M))
        hessian_DD = weight * (q_MD.mT * (1 / slack_M.square())) @ q_MD
        step_D = torch.linalg.solve(hessian_DD, gradient_D)
        change_M = q_MD @ step_D
        longest = float((change_M / slack_M).max())
        point_D = point_D - step_D * min(1.0, 0.9 / longest if longest > 0 else 1.0)
        weight *= 0.6
    solved_D: Tensor = torch.linalg.solve_triangular(r_DD, point_D[:, None], upper=True)[:, 0]
    fine_M = torch.linspace(0, _BEYOND, 20 * _GRID, dtype=torch.float64)
    short = float(((fine_M - tau).clamp(min=0.0) - _chebyshev(fine_M, degree) @ solved_D).max())
    solved_D[0] += max(0.0, short) + 1e-9
    return solved_D
