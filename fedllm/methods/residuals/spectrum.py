"""All singular directions of a mean of products, and how many of them hold most of it."""

from dataclasses import replace

from torch import Tensor

from fedllm.aggregation.route_types import Decomposition, Problem
from fedllm.lora.spectral import truncate


def all_directions(problem: Problem) -> Problem:
    """Return the problem with as many triplets as the sum of products can have."""
    return replace(problem, rank=min(problem.stacked_rank, problem.out, problem.in_))


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
    """Return the fewest leading triplets with this share of the energy; at least one."""
    energies = found.spectral.s_R.double().square()
    if share >= 1:
        return len(energies)
    wanted = share * float(energies.sum())
    return min(len(energies), 1 + int((energies.cumsum(0) < wanted).sum()))
