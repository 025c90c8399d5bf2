"""How the aggregated updates of a run spread over directions, and what each rank keeps of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedllm.reporting.tables import number, text_table
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import AggregateRecord, ModuleDiagnostics

_ROUNDS = 10  # of a long run's, evenly spaced
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
    """A round's update in a few numbers: means over modules, each by the energy of its change.

    `effective_rank` is the number of directions that the energy spreads over,
    `beyond_smallest_rank` the share of it that the smallest rank of a client misses, `overlap` how
    much of the leading directions was there in the round before (None: in no module).
    `residual` and `relative_excess` say what the state leaves out, as a share of the energy, and
    the worst certificate of a module.
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

    Energies of modules add up: a module counts by the energy of its change.
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
    """Return a round's update in a few numbers, None where nothing was aggregated."""
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
    """Return the mean by the energy of each module, None without any."""
    listed = list(values)
    energy = math.fsum(module.total_energy for module, _ in listed)
    return math.fsum(m.total_energy * value for m, value in listed) / energy if energy else None


def metrics_of(record: AggregateRecord) -> dict[str, object]:
    """Return a round's update as the keys of a line of metrics."""
    found = round_spectra(record)
    if found is None:
        return {}
    return {
        "update_energy": found.energy,
        "effective_rank": found.effective_rank,
        "beyond_smallest_rank": found.beyond_smallest_rank,
        "overlap": found.overlap,
        "residual": found.residual,
        "relative_excess": found.relative_excess,
        **{f"energy_kept_rank_{s.rank}": s.energy_kept for s in rank_summaries(record)},
    }


def rank_table(record: AggregateRecord) -> str:
    """Return energy kept and truncation error per rank as a table."""
    rows = [
        [str(s.rank), str(s.modules), f"{100 * s.energy_kept:.2f} %", number(s.truncation_error, 4)]
        for s in rank_summaries(record)
    ]
    title = f"round {record.round}: what an adapter of each rank keeps of the aggregated update"
    return text_table(title, ["rank", "modules", "energy kept", "relative truncation error"], rows)


def spectra_table(paths: RunPaths, rounds: int) -> str | None:
    """Return how the update spread, round by round, as a table; None where no round has it.

    Of a long run some rounds are shown, the first and the last among them.
    """
    records = (AggregateRecord.find(paths.round(n).aggregate_record) for n in range(1, rounds + 1))
    found = [spectra for record in records if record and (spectra := round_spectra(record))]
    if not found:
        return None
    rows = [[str(spectra.round), *_told(spectra)] for spectra in _evenly(found)]
    return text_table("how the aggregated update spreads", ["round", *_COLUMNS], rows)


def last_spectra_table(runs: Mapping[str, AggregateRecord]) -> str:
    """Return how the updates of several runs spread, as a table with a line for each."""
    found = {name: round_spectra(record) for name, record in runs.items()}
    rows = [[name, *_told(spectra)] for name, spectra in found.items() if spectra]
    return text_table("how the last aggregated update spreads", ["run", *_COLUMNS], rows)


def _told(spectra: RoundSpectra) -> list[str]:
    return [
        number(spectra.effective_rank, 2),
        f"{100 * spectra.beyond_smallest_rank:.2f} %",
        "-" if spectra.overlap is None else number(spectra.overlap),
    ]


def _evenly(found: Sequence[RoundSpectra]) -> list[RoundSpectra]:
    last = len(found) - 1
    places = range(_ROUNDS) if last >= _ROUNDS else range(last + 1)
    steps = max(1, len(places) - 1)
    return [found[round(place * last / steps)] for place in places]
