"""Spectra of a round's update: means over modules, each weighted by its energy."""

from pathlib import Path

import pytest

from fedllm.reporting.results.spectra import (
    RankSummary,
    last_spectra_table,
    metrics_of,
    rank_summaries,
    round_spectra,
    spectra_table,
)
from fedllm.storage.paths import RunPaths
from tests.reporting.runs import aggregated, module


def test_energies_of_modules_add_up() -> None:
    found = rank_summaries(aggregated(1, module(3.0, r2=1.0, r8=1.0), module(1.0, r2=0.0, r8=0.5)))
    assert found == [
        RankSummary(rank=2, modules=2, energy_kept=0.75, truncation_error=0.5),
        RankSummary(rank=8, modules=2, energy_kept=0.875, truncation_error=0.125**0.5),
    ]
    nothing = rank_summaries(aggregated(1, module(0.0, r2=0.0)))
    assert nothing == [RankSummary(rank=2, modules=1, energy_kept=1.0, truncation_error=0.0)]
    rounded = rank_summaries(aggregated(1, module(1.0, r2=1.0 + 1e-12)))
    assert rounded[0].truncation_error == 0.0


def test_a_module_counts_by_the_energy_of_its_change() -> None:
    found = round_spectra(
        aggregated(1, module(3.0, overlap=0.8, r2=1.0), module(1.0, overlap=0.4, r2=0.5))
    )
    assert found is not None
    assert found.energy == 4.0
    assert found.effective_rank == pytest.approx((3 * 4.5 + 1 * 1.5) / 4)
    assert found.beyond_smallest_rank == pytest.approx(0.125)
    assert found.overlap == pytest.approx(0.7)
    assert found.residual == pytest.approx(1 / 8)
    assert found.relative_excess == 0.003


def test_modules_without_an_overlap_do_not_count_in_its_mean() -> None:
    found = round_spectra(aggregated(2, module(3.0, r2=1.0), module(1.0, overlap=0.4, r2=0.5)))
    assert found is not None
    assert found.overlap == pytest.approx(0.4)


def test_a_round_without_energy_has_zeros_and_no_overlap() -> None:
    found = round_spectra(aggregated(1, module(0.0, r2=1.0)))
    assert found is not None
    assert (found.energy, found.effective_rank, found.residual) == (0.0, 0.0, 0.0)
    assert (found.beyond_smallest_rank, found.overlap) == (0.0, None)


def test_the_start_has_no_spectra() -> None:
    assert round_spectra(aggregated(0)) is None
    assert metrics_of(aggregated(0)) == {}


def test_metrics_have_a_key_for_every_rank() -> None:
    found = metrics_of(aggregated(1, module(1.0, overlap=0.5, r2=0.75, r8=1.0)))
    assert found == {
        "update_energy": 1.0,
        "effective_rank": 1.5,
        "beyond_smallest_rank": 0.25,
        "overlap": 0.5,
        "residual": 0.125,
        "relative_excess": 0.001,
        "energy_kept_rank_2": 0.75,
        "energy_kept_rank_8": 1.0,
    }


def test_a_collapse_is_seen_round_by_round(tmp_path: Path) -> None:
    paths = RunPaths(root=tmp_path)
    assert spectra_table(paths, 3) is None
    aggregated(0).publish(paths.round(0).aggregate_record)
    aggregated(1, module(1.0, r2=0.5)).publish(paths.round(1).aggregate_record)
    aggregated(3, module(1.0, overlap=0.25, r2=0.875)).publish(paths.round(3).aggregate_record)
    text = spectra_table(paths, 3)
    assert text is not None
    lines = text.splitlines()
    assert lines[0] == "how the aggregated update spreads"
    assert [line.split() for line in lines[2:]] == [
        ["1", "1.50", "50.00", "%", "-"],
        ["3", "1.50", "12.50", "%", "0.250"],
    ]


@pytest.mark.parametrize("rounds", [9, 10, 11, 50])
def test_of_a_long_run_ten_rounds_are_shown_the_first_and_the_last_among_them(
    tmp_path: Path, rounds: int
) -> None:
    paths = RunPaths(root=tmp_path)
    for number in range(1, rounds + 1):
        aggregated(number, module(1.0, r2=0.5)).publish(paths.round(number).aggregate_record)
    text = spectra_table(paths, rounds)
    assert text is not None
    shown = [int(line.split()[0]) for line in text.splitlines()[2:]]
    assert len(shown) == len(set(shown)) == min(rounds, 10)
    assert shown == sorted(shown)
    assert (shown[0], shown[-1]) == (1, rounds)


def test_runs_are_shown_side_by_side_by_their_last_round() -> None:
    text = last_spectra_table({"one": aggregated(2, module(1.0, r2=0.5)), "start": aggregated(0)})
    assert [line.split() for line in text.splitlines()[2:]] == [["one", "1.50", "50.00", "%", "-"]]
