"""The dense route: one product, then the leading triplets through the Gram of its narrow side.

Legend: O out, I in, R stacked rank, K wanted rank; O >= I, R >= I.
"""

import torch
from torch import Tensor

from fedllm.aggregation.decomposition import Decomposition, on_left_basis
from fedllm.lora.spectral import Spectral


def dense(b_OR: Tensor, a_RI: Tensor, rank: int) -> Decomposition:
    """Return the leading triplets of `b_OR @ a_RI`, both float64.

    Only `rank` triplets are wanted: an eigendecomposition of W^T W (I x I) finds their right
    space for less than a full SVD.
    """
    w_OI = b_OR @ a_RI
    vectors_II = torch.linalg.eigh(w_OI.mT @ w_OI).eigenvectors
    q_IK = vectors_II[:, -rank:].flip(1)
    turned = on_left_basis(q_IK, (w_OI @ q_IK).mT)
    return Decomposition(
        spectral=Spectral(u_OR=turned.vh_RI.mT, s_R=turned.s_R, vh_RI=turned.u_OR.mT),
        total_energy=float(w_OI.square().sum()),
        route="dense",
    )
