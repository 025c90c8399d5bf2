"""The factored route: the SVD of a sum of products from its factors, without forming the sum.

Its cost grows with the stacked rank.

Legend: G modules, O out, I in, R stacked rank (of a block, then of all), K wanted rank.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedllm.aggregation import dense_route
from fedllm.aggregation.orthogonal import orthonormal, triangle
from fedllm.aggregation.route_types import (
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

_INDEPENDENT = 1e-2  # the part of a unit column orthogonal to the columns before it
_CANCELLED = 1e-6  # of the product of the parts' energies


def fold(b_GOR: Tensor, a_GRI: Tensor, coefficients_GR: Tensor) -> Partial:
    """Return the factors of a block in float64; each gets the root of the coefficient."""
    roots_GR = coefficients_GR.abs().sqrt()
    signed_GR = torch.copysign(roots_GR, coefficients_GR)
    return {
        "B": b_GOR.to(torch.float64, copy=True).mul_(roots_GR[:, None, :]),
        "A": a_GRI.to(torch.float64, copy=True).mul_(signed_GR[..., None]),
    }


def decompose(partials: Iterable[Partial], problem: Problem, start: Start) -> list[Decomposition]:
    """Return the leading triplets of the sum of the blocks' products.

    With A^T = Q T (QR, of which only T is needed) the left singular vectors are those of B T^T, and
    its Gram matrix T (B^T B) T^T is R x R. The tall side goes through its Gram matrix, which costs
    half of a QR. That has a floor of 1e-8 sigma_1, far below any live direction.
    """
    del start  # this route draws nothing
    blocks = list(partials)
    b_GOR = _side_by_side([block["B"] for block in blocks], 2)
    a_GRI = _side_by_side([block["A"] for block in blocks], 1)
    wide = problem.out < problem.in_
    tall, flat = (a_GRI.mT, b_GOR.mT) if wide else (b_GOR, a_GRI)
    t_GRR = triangle(flat.mT, _INDEPENDENT)
    if t_GRR is None:
        t_GRR = torch.linalg.qr(flat.mT, mode="r").R
    tall_GRR = tall.mT @ tall
    gram_GRR = t_GRR @ tall_GRR @ t_GRR.mT
    energy_G = _trace(gram_GRR).clamp(min=0.0)
    parts_G = t_GRR.square().sum((-2, -1)) * _trace(tall_GRR)
    if bool((energy_G < _CANCELLED * parts_G).any()):
        # the sum is small beside its parts, and the Gram matrix has their rounding: form the sum
        return dense_route.decompose([{"W": b_GOR @ a_GRI}], problem, Start())
    values_GR, vectors_GRR = torch.linalg.eigh(gram_GRR)
    kept = wanted_triplets(problem, values_GR)
    leading_GRK = vectors_GRR[..., -kept:].flip(-1)  # eigh sorts from the smallest
    basis = orthonormal(tall @ (t_GRR.mT @ leading_GRK))
    left_triplets = ritz_triplets(basis, (basis.mT @ tall) @ flat)
    triplets = transposed(left_triplets) if wide else left_triplets
    energies = zip(energy_G.tolist(), parts_G.tolist(), strict=True)
    return [
        Decomposition(
            spectral=spectral,
            total_energy=energy,
            route="factored",
            certificate=dense_route.direct_certificate(
                energy, spectral.s_R, eigenvalues, formed_from=parts
            ),
        )
        for spectral, (energy, parts), eigenvalues in zip(
            split_modules(triplets), energies, values_GR, strict=True
        )
    ]


def _trace(square_GRR: Tensor) -> Tensor:
    return square_GRR.diagonal(dim1=-2, dim2=-1).sum(-1)


def _side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


FACTORED = Route(fold=fold, decompose=decompose)
