"""Numbers about an aggregated module, the same for every method so that tables compare."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from fedllm.aggregation.decomposition import Decomposition, Problem
from fedllm.lora.spectral import (
    alive_directions,
    effective_rank,
    energy_left,
    overlap,
)
from fedllm.storage.records import ModuleDiagnostics, PartitionQuality, RankQuality


def diagnose(
    decomposition: Decomposition,
    *,
    ranks: Sequence[int],
    stacked_rank: int,
    before: Tensor | None = None,
    partitions: Sequence[PartitionQuality] = (),
) -> ModuleDiagnostics:
    """Return the spectrum and, for each of `ranks` once and ascending, what it keeps.

    Args:
        decomposition: of the aggregated change.
        ranks: what anyone receives.
        stacked_rank: of the problem.
        before: (K, I), the right singular vectors of the change before the round that live, from
            the largest singular value.
        partitions: as `partition_qualities` returns them.
    """
    s_R, energy = decomposition.spectral.s_R, decomposition.total_energy
    residual = decomposition.certificate.residual_energy
    rows = []
    for rank in sorted(set(ranks)):
        left = energy_left(residual_energy=residual, s_R=s_R, rank=rank)
        share = min(1.0, left / energy) if energy else 0.0
        rows.append(
            RankQuality(rank=rank, energy_kept=1.0 - share, truncation_error=math.sqrt(share))
        )
    alive_RI = alive_directions(decomposition.spectral)
    return ModuleDiagnostics(
        spectrum=s_R.tolist(),
        total_energy=energy,
        ranks=rows,
        stacked_rank=stacked_rank,
        route=decomposition.route,
        residual_energy=residual,
        relative_excess=decomposition.certificate.relative_excess,
        failure_probability=decomposition.certificate.failure_probability,
        effective_rank=effective_rank(total_energy=energy, s_R=s_R),
        beyond_smallest_rank=1.0 - rows[0].energy_kept,
        overlap=None if before is None else overlap(alive_RI, before, rank=rows[0].rank),
        partitions=list(partitions),
    )


def partition_qualities(
    problem: Problem,
    *,
    total: float,
    energies_before_R: Tensor,
    energies_R: Tensor,
    untrained: Callable[[float], float],
) -> list[PartitionQuality]:
    """Return what the round made of each range of directions that the state has.

    Args:
        problem: its partitions are the ranges.
        total: what the weights of all clients sum to.
        energies_before_R: the energy of each direction of the state before the round.
        energies_R: the same of the new state.
        untrained: the share of the weight that reaches a direction -> what the method multiplies
            the direction by, had nobody trained.
    """
    found = []
    for part in problem.partitions:
        if part.begin >= problem.rank:
            break
        reach = part.weight / total
        energy = float(energies_before_R[part.begin : part.end].sum())
        kept = energy * untrained(reach) ** 2
        found.append(
            PartitionQuality(
                first=part.begin + 1,
                last=min(part.end, problem.rank),
                reach=reach,
                energy_kept=kept,
                energy_lost=energy - kept,
                energy=float(energies_R[part.begin : part.end].sum()),
            )
        )
    return found
