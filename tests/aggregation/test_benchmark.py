"""The benchmark measures what it says, on a size that takes no time."""

import json

import pytest

from benchmarks.aggregation import main


def test_the_benchmark_times_both_ways_on_the_same_inputs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["--shape", "40x30", "--clients", "3", "--ranks", "2,4", "--wanted", "3"]
    main([*asked, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["ranks"], report["route"]) == ([2, 4, 2], "factored")
    assert report["difference_over_sigma_1"] < 1e-5
    assert [len(seconds) for seconds in report["seconds"].values()] == [5, 5]
    main([*asked, "--threads", "1"])
    assert "stacked rank 8, wanted 3, cpu, 1 threads, median of 5" in capsys.readouterr().out
