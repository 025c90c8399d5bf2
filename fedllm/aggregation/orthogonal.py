"""Triangular factors and orthonormal bases of tall matrices, float64.

Legend: G modules, N rows, R or K columns.
"""

import torch
from torch import Tensor

NEARLY_ORTHOGONAL = 0.5  # the part of a unit column orthogonal to the columns before it


def triangle(y_GNR: Tensor, min_remainder: float) -> Tensor | None:
    """Return the upper triangular T (R, R) of y = Q T, Q^T Q = I, or None if Householder is needed.

    The Cholesky factor of the Gram matrix takes a quarter of the time of a QR. Columns of very
    unequal size do no harm, nearly dependent ones make it fail.

    Args:
        y_GNR: the columns, float64.
        min_remainder: the part of each unit column that must be orthogonal to those before it.
    """
    gram_GRR = y_GNR.mT @ y_GNR
    sizes_GR = gram_GRR.diagonal(dim1=-2, dim2=-1).sqrt()
    if y_GNR.shape[2] > y_GNR.shape[1] or not bool((sizes_GR > 0).all()):
        return None
    unit_GRR = gram_GRR / sizes_GR[:, :, None] / sizes_GR[:, None, :]
    factor_GRR, failed_G = torch.linalg.cholesky_ex(unit_GRR)
    pivots_GR = factor_GRR.diagonal(dim1=-2, dim2=-1)
    if bool(failed_G.any()) or float(pivots_GR.min()) < min_remainder:
        return None
    triangle_GRR: Tensor = factor_GRR.mT * sizes_GR[:, None, :]
    return triangle_GRR


def orthonormal(y_GNK: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns' span."""
    t_GKK = triangle(y_GNK, NEARLY_ORTHOGONAL)
    if t_GKK is None:
        basis_GNK: Tensor = torch.linalg.qr(y_GNK).Q
        return basis_GNK
    return on_triangle(y_GNK, t_GKK)


def on_triangle(y_GNK: Tensor, t_GKK: Tensor) -> Tensor:
    """Return the orthonormal Q of y = Q T."""
    basis_GNK: Tensor = torch.linalg.solve_triangular(t_GKK, y_GNK, upper=True, left=False)
    return basis_GNK
