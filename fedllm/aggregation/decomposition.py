"""What a route returns, and the last step that all routes share.

Legend: O out, I in, K wanted rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.lora.spectral import Spectral


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """Leading singular triplets, the energy of the whole matrix, and the route taken.

    `total_energy` is the squared Frobenius norm, so that what was left out is known without the
    triplets that were not computed.
    """

    spectral: Spectral
    total_energy: float
    route: str


def on_left_basis(q_OK: Tensor, p_KI: Tensor) -> Spectral:
    """Return the triplets of `W` within the orthonormal columns `q_OK`, from `p_KI = q^T W`.

    Rayleigh-Ritz: the Gram matrix that found the basis squares the singular values and loses
    half of their digits; `W` itself, applied once more, gives them back.
    """
    rotation_KK, s_K, vh_KI = torch.linalg.svd(p_KI, full_matrices=False)
    return Spectral(u_OR=q_OK @ rotation_KK, s_R=s_K, vh_RI=vh_KI)
