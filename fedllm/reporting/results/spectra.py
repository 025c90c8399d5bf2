"""Spectra of a run's aggregated updates: how the energy spreads, and what each rank keeps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedllm.reporting.tables import number, text_table
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import AggregateRecord, ModuleDiagnostics

_MAX_ROUNDS = 10  # shown of a long run, evenly spaced
_COLUMNS = ("effective rank", "energy beyond the smallest rank", "overlap with the round before")


@dataclass(frozen=True, kw_only=True)
class RankSummary:
    """One rank over all modules of a round: energy kept and relative truncation error."""

    rank: int
    modules: int
    energy_kept: float
    truncation_error: float


@dataclass(frozen=True, kw_only=True)
class RoundSpectra:
    """Summary of a round's update: means over modules, weighted by the energy of their change.

    `effective_rank` is the number of directions that the energy spreads over,
    `beyond_smallest_rank` the share of the energy that the smallest rank of a client misses.
    `overlap` is the share of the leading directions that the previous round had too (None: known
    for no module). `residual` is the share of the energy that the state leaves out, and
    `relative_excess` the worst certificate of a module.
    """

    round: int
    energy: float
    effective_rank: float
    beyond_smallest_rank: float
    overlap: float | None
    residual: float
    relative_excess: float


def rank_summaries(record: AggregateRecord) -> list[RankSummary]:
    """Return energy kept and truncation error per rank, over all modules of a round.

    A module counts by the energy of its change: energies of modules add up.
    """
    kept: dict[int, float] = {}
    total: dict[int, float] = {}
    modules: dict[int, int] = {}
    for module in record.modules.values():
        for quality in module.ranks:
            rank = quality.rank
            kept[rank] = kept.get(rank, 0.0) + quality.energy_kept * module.total_energy
            modules[rank] = modules.get(rank, 0) + 1
            total[rank] = total.get(rank, 0.0) + module.total_energy
    shares = {rank: kept[rank] / total[rank] if total[rank] else 1.0 for rank in sorted(kept)}
    return [
        RankSummary(
            rank=rank,
            modules=modules[rank],
            energy_kept=share,
            truncation_error=max(0.0, 1.0 - share) ** 0.5,
        )
        for rank, share in shares.items()
    ]


def round_spectra(record: AggregateRecord) -> RoundSpectra | None:
    """Return the summary of a round's update, None if nothing was aggregated."""
    modules = list(record.modules.values())
    if not modules:
        return None
    energy = math.fsum(module.total_energy for module in modules)
    compared = [(m, m.overlap) for m in modules if m.overlap is not None]
    return RoundSpectra(
        round=record.round,
        energy=energy,
        effective_rank=_mean((m, m.effective_rank) for m in modules) or 0.0,
        beyond_smallest_rank=_mean((m, m.beyond_smallest_rank) for m in modules) or 0.0,
        overlap=_mean(compared),
        residual=math.fsum(m.residual_energy for m in modules) / energy if energy else 0.0,
        relative_excess=max(module.relative_excess for module in modules),
    )


def _mean(values: Iterable[tuple[ModuleDiagnostics, float]]) -> float | None:
    """Return the mean weighted by the energy of each module, None without any energy."""
    listed = list(values)
    energy = math.fsum(module.total_energy for module, _ in listed)
    return math.fsum(m.total_energy * value for m, value in listed) / energy if energy else None


def metrics_of(record: AggregateRecord) -> dict[str, object]:
    """Return the summary of a round's update under the keys of `metrics.jsonl`."""
    spectra = round_spectra(record)
    if spectra is None:
        return {}
    return {
        "update_energy": spectra.energy,
        "effective_rank": spectra.effective_rank,
        "beyond_smallest_rank": spectra.beyond_smallest_rank,
        "overlap": spectra.overlap,
        "residual": spectra.residual,
        "relative_excess": spectra.relative_excess,
        **{f"energy_kept_rank_{s.rank}": s.energy_kept for s in rank_summaries(record)},
    }


def rank_table(record: AggregateRecord) -> str:
    """Return a table of energy kept and truncation error per rank."""
    rows = [
        [str(s.rank), str(s.modules), f"{100 * s.energy_kept:.2f} %", number(s.truncation_error, 4)]
        for s in rank_summaries(record)
    ]
    title = f"round {record.round}: what an adapter of each rank keeps of the aggregated update"
    return text_table(title, ["rank", "modules", "energy kept", "relative truncation error"], rows)


def spectra_table(paths: RunPaths, rounds: int) -> str | None:
    """Return a table of how the update spreads, round by round; None if no round has a spectrum.

    A long run shows some rounds, the first and the last among them.
    """
    records = (AggregateRecord.find(paths.round(n).aggregate_record) for n in range(1, rounds + 1))
    rounds_known = [spectra for record in records if record and (spectra := round_spectra(record))]
    if not rounds_known:
        return None
    rows = [[str(spectra.round), *_cells(spectra)] for spectra in _evenly_spaced(rounds_known)]
    return text_table("how the aggregated update spreads", ["round", *_COLUMNS], rows)


def last_spectra_table(runs: Mapping[str, AggregateRecord]) -> str:
    """Return a table of how the last updates of several runs spread, one line per run."""
    last_spectra = {name: round_spectra(record) for name, record in runs.items()}
    rows = [[name, *_cells(spectra)] for name, spectra in last_spectra.items() if spectra]
    return text_table("how the last aggregated update spreads", ["run", *_COLUMNS], rows)


def _cells(spectra: RoundSpectra) -> list[str]:
    return [
        number(spectra.effective_rank, 2),
        f"{100 * spectra.beyond_smallest_rank:.2f} %",
        "-" if spectra.overlap is None else number(spectra.overlap),
    ]


def _evenly_spaced(rounds: Sequence[RoundSpectra]) -> list[RoundSpectra]:
    last = len(rounds) - 1
    places = range(_MAX_ROUNDS) if last >= _MAX_ROUNDS else range(last + 1)
    steps = max(1, len(places) - 1)
    return [rounds[round(place * last / steps)] for place in places]
