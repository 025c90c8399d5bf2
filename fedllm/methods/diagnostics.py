"""Numbers about an aggregated module, the same for every method so that tables compare."""

import math
from collections.abc import Sequence

from torch import Tensor

from fedllm.aggregation.decomposition import Decomposition
from fedllm.lora.spectral import (
    alive_directions,
    effective_rank,
    energy_left,
    overlap,
)
from fedllm.storage.records import ModuleDiagnostics, RankQuality


def diagnose(
    decomposition: Decomposition,
    *,
    ranks: Sequence[int],
    stacked_rank: int,
    before: Tensor | None = None,
) -> ModuleDiagnostics:
    """Return the spectrum and, for each of `ranks` once and ascending, what it keeps.

    Args:
        decomposition: of the aggregated change.
        ranks: what anyone receives.
        stacked_rank: of the problem.
        before: (K, I), the right singular vectors of the change before the round that live, from
            the largest singular value.
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
    )
