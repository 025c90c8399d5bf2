"""Sections on the aggregated update: spectrum, truncation error, ranges of directions."""

import math
from collections.abc import Iterator, Sequence

from fedllm.reporting.page.contents import LineChart, PageSection, table_of
from fedllm.reporting.page.quality_sections import by_label, distinct
from fedllm.reporting.results import run_rows
from fedllm.reporting.results.run_rows import Row, rounds_of
from fedllm.reporting.results.spectra import rank_summaries, round_spectra
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import AggregateRecord

_MAX_SPECTRA = 4
_LEAST_SHARE = 1e-9


def spectrum_section(paths: RunPaths) -> PageSection | None:
    """Return how the update spreads over directions, and what each rank loses; None without one."""
    records = [
        record
        for each in rounds_of(paths)
        if (record := AggregateRecord.find(each.aggregate_record)) and record.modules
    ]
    if not records:
        return None
    errors = [
        {"round": record.round, "rank": summary.rank, "truncation_error": summary.truncation_error}
        | {"energy_kept": summary.energy_kept, "modules": summary.modules}
        for record in records
        for summary in rank_summaries(record)
    ]
    spread = [
        {"round": found.round, "energy": found.energy, "effective_rank": found.effective_rank}
        | {"beyond_smallest_rank": found.beyond_smallest_rank, "overlap": found.overlap}
        | {"residual": found.residual, "relative_excess": found.relative_excess}
        for record in records
        if (found := round_spectra(record))
    ]
    return PageSection(
        name="spectra",
        title="The aggregated update",
        words=(
            "All modules together, each counted by the energy (squared Frobenius norm) of its "
            "change. The truncation error of a rank is the norm of what an adapter of that rank "
            "leaves out, over the norm of the whole change."
        ),
        charts=[*_spectra(records), _errors(errors), _spread(spread)],
        tables=[
            *table_of("truncation", "What an adapter of each rank keeps", errors),
            *table_of("spread", "How the update spreads", spread),
            *table_of("modules", "Every module and round", run_rows.module_rows(paths)),
        ],
    )


def _spectra(records: Sequence[AggregateRecord]) -> Iterator[LineChart]:
    records = [record for record in records if any(m.spectrum for m in record.modules.values())]
    if not records:
        return
    last = len(records) - 1
    steps = max(1, min(_MAX_SPECTRA, len(records)) - 1)
    chosen = {round(place * last / steps) for place in range(steps + 1)}
    yield LineChart(
        name="spectra",
        title="Energy of each direction",
        text="share of the update's energy in its first, second and further direction, by round",
        series={
            f"round {records[n].round}": list(enumerate(_shares(records[n]), 1))
            for n in sorted(chosen)
        },
        x_label="direction, the strongest first",
        y_label="share of the energy",
        log_y=True,
        whole_x=True,
    )


def _shares(record: AggregateRecord) -> Iterator[float | None]:
    """Yield the share of the energy of all modules that lies in each direction."""
    total = math.fsum(module.total_energy for module in record.modules.values())
    most = max(len(module.spectrum) for module in record.modules.values())
    for place in range(most):
        values = (m.spectrum[place] for m in record.modules.values() if place < len(m.spectrum))
        share = math.fsum(value * value for value in values) / total if total else 0.0
        # a logarithmic axis has no zero
        yield share if share > _LEAST_SHARE else None


def _errors(rows: Sequence[Row]) -> LineChart:
    newest = [row for row in rows if row["round"] == rows[-1]["round"]]
    return LineChart(
        name="truncation",
        title="Truncation error by rank",
        text="relative truncation error of an adapter of each rank, by round; in the last one "
        + ", ".join(f"rank {row['rank']}: {row['truncation_error']:.3f}" for row in newest),
        series=by_label(rows, "truncation_error", lambda row: f"rank {row['rank']}"),
        x_label="round",
        y_label="relative truncation error",
        whole_x=True,
        from_zero=True,
    )


def _spread(rows: Sequence[Row]) -> LineChart:
    return LineChart(
        name="effective-rank",
        title="Effective rank",
        text="number of directions over which the energy of the update spreads, by round",
        series=by_label(rows, "effective_rank", lambda _row: "effective rank"),
        x_label="round",
        y_label="effective rank",
        whole_x=True,
    )


def partition_section(paths: RunPaths) -> PageSection | None:
    """Return reach and energy of the ranges of directions between two ranks; None if unknown."""
    rows = run_rows.partition_rows(paths)
    if not rows:
        return None
    summed = list(_summed(rows))
    return PageSection(
        name="partitions",
        title="Ranges of directions",
        words=(
            "Clients of a small rank train only the first directions. The reach P_j of a range is "
            "the share of the round's weight whose clients trained it. Lost is the energy of the "
            "state before that would vanish if nobody had trained the range."
        ),
        charts=[
            LineChart(
                name=f"partitions-{key.replace('_', '-')}",
                title=title,
                text=f"{title} of every range of directions, by round",
                series=by_label(summed, key, lambda row: f"directions {row['directions']}"),
                x_label="round",
                y_label=label,
                whole_x=True,
                from_zero=True,
            )
            for key, title, label in (
                ("reach", "Reach (P_j)", "share of the weight"),
                ("energy_share", "Energy", "share of the state's energy"),
                ("lost_share", "Energy lost if nobody trained", "share of the range's energy"),
            )
        ],
        tables=[
            *table_of("partitions", "Reach and energy of all modules together", summed),
            *table_of("partitions-of-modules", "Reach and energy of every module", rows),
        ],
    )


def _summed(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield a row per round and range, over all modules that have it."""
    for number in distinct(rows, "round"):
        mine = [row for row in rows if row["round"] == number]
        energy = math.fsum(row["energy"] for row in mine)
        for first, last in sorted({(row["first"], row["last"]) for row in mine}):
            same = [row for row in mine if (row["first"], row["last"]) == (first, last)]
            own = math.fsum(row["energy"] for row in same)
            kept = math.fsum(row["energy_kept"] for row in same)
            lost = math.fsum(row["energy_lost"] for row in same)
            yield {
                "round": number,
                "directions": f"{first}-{last}",
                "modules": len(same),
                "reach": sum(row["reach"] for row in same) / len(same),
                "energy": own,
                "energy_share": own / energy if energy else None,
                "lost_share": lost / (kept + lost) if kept + lost else None,
            }
