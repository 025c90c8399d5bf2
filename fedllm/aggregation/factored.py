"""The factored route: the SVD of `b_OR @ a_RI` at the cost of its stacked rank, never formed.

Legend: O out, I in, R stacked rank, K wanted rank; O >= I > R.
"""

import torch
from torch import Tensor

from fedllm.aggregation.decomposition import Decomposition, on_left_basis


def factored(b_OR: Tensor, a_RI: Tensor, rank: int) -> Decomposition:
    """Return the leading triplets of `b_OR @ a_RI`, both float64.

    With A^T = Q T (QR, of which only T is needed) the left singular vectors are those of B T^T,
    and its Gram matrix T (B^T B) T^T is R x R. The narrow side goes through QR, which stays
    exact for dependent columns (a Cholesky factor would not) and for factors of very unequal
    sizes (both are column-wise backward stable); the tall side through its Gram matrix, which
    costs half of a QR. The Gram matrix has a floor of 1e-8 sigma_1, far below what lives.
    """
    t_RR = torch.linalg.qr(a_RI.mT, mode="r").R
    gram_RR = t_RR @ (b_OR.mT @ b_OR) @ t_RR.mT
    vectors_RR = torch.linalg.eigh(gram_RR).eigenvectors
    leading_RK = vectors_RR[:, -rank:].flip(1)  # eigh sorts from the smallest
    q_OK = torch.linalg.qr(b_OR @ (t_RR.mT @ leading_RK)).Q
    return Decomposition(
        spectral=on_left_basis(q_OK, (q_OK.mT @ b_OR) @ a_RI),
        total_energy=max(0.0, float(gram_RR.trace())),
        route="factored",
    )
