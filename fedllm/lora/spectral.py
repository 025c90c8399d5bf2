"""The spectral form of a change, `U diag(S) V^T`: the adapter of any rank is a slice of it.

Legend: O out, I in, R rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors

DEAD_BELOW = 1e-6  # of the largest singular value


@dataclass(frozen=True, kw_only=True)
class Spectral:
    """Leading singular triplets, `s_R` sorted from the largest, of one dtype."""

    u_OR: Tensor
    s_R: Tensor
    vh_RI: Tensor

    @property
    def rank(self) -> int:
        """The number of triplets."""
        return self.s_R.shape[0]


def truncate(spectral: Spectral, rank: int) -> Spectral:
    """Return the leading `rank` triplets: the best approximation of that rank (Eckart-Young).

    Raises:
        AdapterError: there are fewer triplets than `rank`.
    """
    if not 1 <= rank <= spectral.rank:
        raise AdapterError(f"rank {rank} is above the state's rank {spectral.rank}: choose less")
    return Spectral(
        u_OR=spectral.u_OR[:, :rank], s_R=spectral.s_R[:rank], vh_RI=spectral.vh_RI[:rank]
    )


def to_factors(spectral: Spectral, *, rank: int, scale: float) -> Factors:
    """Return the adapter of `rank`: A = V_r^T, B = U_r diag(S_r) / scale (arXiv 2402.11505).

    All of S is in B, so that the A of a direction with S = 0 still gives B a gradient.

    Raises:
        AdapterError: there are fewer triplets than `rank`.
    """
    kept = truncate(spectral, rank)
    return Factors(a_RI=kept.vh_RI, b_OR=kept.u_OR * (kept.s_R / scale), scale=scale)


def with_fixed_signs(spectral: Spectral) -> Spectral:
    """Return the same triplets with the signs that make the largest entry of each V row positive.

    The first of equally large entries counts. The product is unchanged.
    """
    largest_R1 = spectral.vh_RI.abs().argmax(dim=1, keepdim=True)
    negative_R = spectral.vh_RI.gather(1, largest_R1).squeeze(1) < 0
    sign_R = 1.0 - 2.0 * negative_R.to(spectral.s_R.dtype)
    return Spectral(
        u_OR=spectral.u_OR * sign_R, s_R=spectral.s_R, vh_RI=spectral.vh_RI * sign_R[:, None]
    )


def with_live_directions(
    spectral: Spectral, *, rank: int, seeded_a: Callable[[int], Tensor]
) -> Spectral:
    """Return `rank` triplets, each of which can train.

    A direction with sigma <= 1e-6 sigma_1, or a missing one, gets zero U and S. Its V is the row at
    its place in `seeded_a(rank)` (the seeded start, drawn only where needed), made orthogonal to
    all rows before it and of unit length. So the product is unchanged (to 1e-6 sigma_1), and no
    client receives an arbitrary null space of an SVD. `rank` is at most the smaller side.
    """
    alive = min(rank, int((spectral.s_R > DEAD_BELOW * spectral.s_R[:1]).sum()))
    kept = Spectral(
        u_OR=spectral.u_OR[:, :alive], s_R=spectral.s_R[:alive], vh_RI=spectral.vh_RI[:alive]
    )
    if alive == rank:
        return kept
    # Householder QR completes the basis even where a seeded row lies in the span of the others
    rows_RI = torch.cat([kept.vh_RI, seeded_a(rank)[alive:].to(kept.vh_RI)])
    q_IR, r_RR = torch.linalg.qr(rows_RI.mT)
    turned_IR = torch.where(r_RR.diagonal() < 0, -q_IR, q_IR)
    dead = rank - alive
    return Spectral(
        u_OR=torch.cat([kept.u_OR, kept.u_OR.new_zeros(kept.u_OR.shape[0], dead)], dim=1),
        s_R=torch.cat([kept.s_R, kept.s_R.new_zeros(dead)]),
        vh_RI=torch.cat([kept.vh_RI, turned_IR.mT[alive:]]),
    )


def energy_left(*, residual_energy: float, s_R: Tensor, rank: int) -> float:
    """Return the energy (squared Frobenius norm) that the leading `rank` triplets leave out.

    Args:
        residual_energy: the energy that all triplets leave out.
        s_R: their singular values.
        rank: the number of triplets kept.
    """
    return residual_energy + float(s_R[rank:].double().square().sum())


def effective_rank(*, total_energy: float, s_R: Tensor) -> float:
    """Return the number of directions that the energy spreads over: exp of its Shannon entropy.

    The exponential is that of Roy & Vetterli (EUSIPCO 2007, "The effective rank"). The shares are
    those of the energy, sigma^2 over its sum, as in Alter et al. (PNAS 97, 2000): of the directions
    that were not computed only the energy is known. It counts as directions as large as the last
    computed one, the fewest that can hold it, so the result is at most the whole spectrum's. It
    lies between 1 and the rank; 0 without energy.
    """
    energies_R = s_R.double().square()
    total = max(total_energy, float(energies_R.sum()))
    shares_R = energies_R / total if total else energies_R
    shares_R = shares_R[shares_R > 0]
    if not len(shares_R):
        return 0.0
    tail = max(0.0, 1.0 - float(shares_R.sum()))
    entropy = -float((shares_R * shares_R.log()).sum()) - tail * math.log(float(shares_R[-1]))
    return math.exp(entropy)


def alive_directions(spectral: Spectral) -> Tensor:
    """Return the right singular vectors of the live directions, none where all S is zero."""
    return spectral.vh_RI[spectral.s_R > DEAD_BELOW * spectral.s_R[:1]]


def overlap(one_RI: Tensor, other_RI: Tensor, *, rank: int) -> float | None:
    """Return the mean squared cosine of the angles between two leading right singular spaces.

    1 where the spaces of the first `rank` vectors are the same, `rank` / I on average for random
    ones. None where either has fewer vectors.

    Args:
        one_RI: orthonormal rows, from the largest singular value; of any number.
        other_RI: the same of another change.
        rank: the dimension of both spaces.
    """
    if min(len(one_RI), len(other_RI)) < rank:
        return None
    cosines_RR = one_RI[:rank].double() @ other_RI[:rank].to(one_RI.device).double().mT
    return min(1.0, float(cosines_RR.square().sum()) / rank)
