"""The singular directions of a mean of products that hold a share of its energy."""

from dataclasses import replace

from torch import Tensor

from fedllm.aggregation.route_types import Decomposition, Problem
from fedllm.lora.spectral import truncate


def holding(problem: Problem, share: float) -> Problem:
    """Return the problem with as many triplets as hold a share of the energy."""
    return replace(problem, share=share)


def cut(found: Decomposition, rank: int) -> Decomposition:
    """Return the leading `rank` triplets; the energy of the others is in the residual."""
    triplets = found.spectral
    if triplets.rank <= rank:
        return found
    behind = float(triplets.s_R[rank:].double().square().sum())
    certificate = replace(
        found.certificate, residual_energy=found.certificate.residual_energy + behind
    )
    return replace(found, spectral=truncate(triplets, rank), certificate=certificate)


def between(found: Decomposition, begin: int, end: int) -> Tensor:
    """Return the sum of the triplets from `begin` to before `end` (O, I), float32."""
    triplets = found.spectral
    u_OR = (triplets.u_OR[:, begin:end] * triplets.s_R[begin:end]).float()
    return u_OR @ triplets.vh_RI[begin:end].float()


def leading(found: Decomposition, share: float) -> int:
    """Return the fewest leading triplets with this share of all energy; at least one."""
    energies = found.spectral.s_R.double().square()
    if share >= 1:
        return len(energies)
    # rounding of the sum does not ask for one more
    wanted = share * found.total_energy * (1 - 1e-12)
    return min(len(energies), 1 + int((energies.cumsum(0) < wanted).sum()))
