"""Numbers about an aggregated module, the same for every method so that tables compare."""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fedllm.aggregation.route_types import Decomposition, Problem, RankPartition
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
    left: Mapping[int, float] | None = None,
) -> ModuleDiagnostics:
    """Return the spectrum and, for each of `ranks` once and ascending, what it keeps.

    Args:
        decomposition: of the aggregated change.
        ranks: what anyone receives.
        stacked_rank: of the problem.
        before: (K, I), the right singular vectors of the change before the round that live, from
            the largest singular value.
        partitions: as `partition_qualities` returns them.
        left: rank -> the energy that its adapter leaves out, where the adapter is not the best of
            its rank.
    """
    s_R, energy = decomposition.spectral.s_R, decomposition.total_energy
    residual = decomposition.certificate.residual_energy
    rows = []
    for rank in sorted(set(ranks)):
        lost = (left or {}).get(rank)
        if lost is None:
            lost = energy_left(residual_energy=residual, s_R=s_R, rank=rank)
        share = min(1.0, lost / energy) if energy else 0.0
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
    before: Sequence[float],
    after: Sequence[float],
    untrained: Callable[[RankPartition], float],
) -> list[PartitionQuality]:
    """Return what the round made of each range of directions that the state has.

    Args:
        problem: its partitions are the ranges.
        total: what the weights of all clients sum to.
        before: the energy of each range in the state before the round.
        after: the same of the new state.
        untrained: what the method multiplies a range by, had nobody trained.
    """
    found = []
    for part, energy, energy_after in zip(held_partitions(problem), before, after, strict=True):
        kept = energy * untrained(part) ** 2
        found.append(
            PartitionQuality(
                first=part.begin + 1,
                last=min(part.end, problem.rank),
                reach=part.weight / total,
                energy_kept=kept,
                energy_lost=energy - kept,
                energy=energy_after,
            )
        )
    return found


def spectral_energies(problem: Problem, s_R: Tensor) -> list[float]:
    """Return the energy of each range of directions, from their singular values."""
    energies_R = s_R.double().square()
    return [float(energies_R[part.begin : part.end].sum()) for part in held_partitions(problem)]


def held_partitions(problem: Problem) -> list[RankPartition]:
    """Return the ranges of which the state holds any direction."""
    return [part for part in problem.partitions if part.begin < problem.rank]
