"""The dense route: one product, then the leading triplets through the Gram of its narrow side.

Legend: G modules, O out, I in, R stacked rank, K wanted rank.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fedllm.aggregation.route_types import (
    Certificate,
    Decomposition,
    Partial,
    Problem,
    Route,
    Start,
    ritz_triplets,
    split_modules,
    transposed,
    wanted_triplets,
)


def fold(b_GOR: Tensor, a_GRI: Tensor, coefficients_GR: Tensor) -> Partial:
    """Return the weighted sum of a block's products, float64."""
    return {"W": b_GOR.double() @ a_GRI.double().mul(coefficients_GR[..., None])}


def decompose(partials: Iterable[Partial], problem: Problem, start: Start) -> list[Decomposition]:
    """Return the leading triplets of the sum.

    Only `rank` triplets are wanted: an eigendecomposition of W^T W finds their right space for less
    than a full SVD.
    """
    del start  # this route draws nothing
    w_GOI = summed(partials)
    wide = problem.out < problem.in_
    tall = w_GOI.mT if wide else w_GOI
    gram = tall.mT @ tall
    values, vectors = torch.linalg.eigh(gram)
    basis = vectors[..., -wanted_triplets(problem, values) :].flip(-1)
    narrow_triplets = ritz_triplets(basis, (tall @ basis).mT)
    triplets = narrow_triplets if wide else transposed(narrow_triplets)
    # vector_norm makes no copy of the products
    energies = torch.linalg.vector_norm(w_GOI, dim=(-2, -1)).square().tolist()
    return [
        Decomposition(
            spectral=spectral,
            total_energy=energy,
            route="dense",
            certificate=direct_certificate(energy, spectral.s_R, eigenvalues),
        )
        for spectral, energy, eigenvalues in zip(
            split_modules(triplets), energies, values, strict=True
        )
    ]


def summed(partials: Iterable[Partial]) -> Tensor:
    """Return the sum of the blocks' products, added in their order, in place of the first one."""
    blocks = iter(partials)
    total = next(blocks)["W"]
    for block in blocks:
        total += block["W"]
        del block  # frees its memory before the next one is made
    return total


def direct_certificate(
    energy: float, s_K: Tensor, values_N: Tensor, *, formed_from: float = 0.0
) -> Certificate:
    """Return the certificate of triplets from a whole spectrum.

    The eigenvalues of a float64 Gram matrix have an error of at most about N eps of the largest
    (backward stability) and eps of the matrices it was formed from. The best triplets may hold more
    by that error. A residual below twice the error gets no excess.

    Args:
        energy: the squared Frobenius norm.
        s_K: the singular values found.
        values_N: all eigenvalues of the Gram matrix, ascending.
        formed_from: the product of the norms of the matrices whose product the Gram matrix is.
    """
    kept = float(s_K.double().square().sum())
    residual = max(0.0, energy - kept)
    rounding = torch.finfo(torch.float64).eps * max(len(values_N) * energy, formed_from)
    if residual <= 2 * rounding:
        return Certificate(residual_energy=residual, relative_excess=0.0)
    best = float(values_N[-len(s_K) :].clamp(min=0.0).sum()) + rounding
    excess = max(0.0, best - kept)
    optimal = max(residual - excess, rounding)
    return Certificate(residual_energy=residual, relative_excess=excess / optimal)


DENSE = Route(fold=fold, decompose=decompose)
