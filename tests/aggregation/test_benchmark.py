"""The benchmark of the aggregation measures what it reports, on sizes that take no time."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.aggregation import main
from benchmarks.inputs.adapters import kinds_of, ranks_of
from benchmarks.measured.server_steps import StepTiming, step_table
from fedllm.errors import UserError
from fedllm.methods.catalog import METHODS

ARGUMENTS = ["--shape", "40x30", "--clients", "3", "--ranks", "2,4", "--wanted", "3"]


def test_the_benchmark_times_all_methods_on_the_same_inputs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main([*ARGUMENTS, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [case["spectrum"] for case in report["cases"]] == ["decaying", "flat"]
    for case in report["cases"]:
        assert (case["stacked_rank"], case["route"]) == (8, "factored")
        assert case["largest_difference"] < 1e-5
        assert abs(case["true_excess"]) < 1e-4
        assert {len(seconds) for seconds in case["seconds"].values()} == {5}
        assert set(case["median_seconds"]) == {
            "ours",
            "ours, stacked",
            "dense",
            "copy",
            "product",
        }
    main([*ARGUMENTS, "--threads", "1", "--repeats", "2"])
    text = capsys.readouterr().out
    assert "40x30, flat, stacked rank 8, wanted 3: route factored" in text
    assert "device cpu, threads 1, clients 3" in text


def test_an_iterative_route_is_timed_at_the_loose_tolerance_on_flat_spectra_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = ["--shape", "600x520", "--clients", "20", "--ranks", "8,32", "--wanted", "32"]
    main([*shape, "--repeats", "1", "--json"])
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert [(case["spectrum"], case["tolerance"]) for case in cases] == [
        ("decaying", 1e-4),
        ("flat", 1e-4),
        ("flat", 1e-2),
    ]
    for case in cases:
        assert case["route"] == "iterative"
        assert case["true_excess"] <= case["relative_excess"] <= case["tolerance"]


def test_named_models_have_their_modules_and_tiers_two_ranks() -> None:
    assert sum(kind.number for kind in kinds_of("llama-1.3b")) == 168
    assert sum(kind.number for kind in kinds_of("llama-7b")) == 224
    assert sum(kind.number for kind in kinds_of("llama-70b")) == 560
    mixed: dict[str, Any] = {"text": "8,30+200", "clients": 3}
    assert ranks_of(**mixed, mlp=False) == [8, 30, 8]
    assert ranks_of(**mixed, mlp=True) == [8, 200, 8]


def test_a_whole_round_is_aggregated_from_files_that_are_written_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*ARGUMENTS, "--threads", "1", "--files", str(tmp_path / "round")]
    main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["clients"], report["modules"], report["routes"]) == (3, 1, {"factored": 1})
    assert set(report["stages"]) == {"read", "fold", "decompose", "write"}
    assert 0.05 < report["peak_anonymous_gib"] < 2
    files = list((tmp_path / "round").rglob("updates/**/*.safetensors"))
    written = [file.stat().st_mtime_ns for file in files]
    main(arguments)
    assert "1 modules of 3 clients" in capsys.readouterr().out
    assert [file.stat().st_mtime_ns for file in files] == written
    with pytest.raises(UserError, match="a round of other arguments"):
        main([*arguments, "--clients", "4"])
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="not empty, and not a round"):
        main([*ARGUMENTS, "--files", str(tmp_path)])


def test_every_method_is_timed_beside_flexlora_on_the_same_updates(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["--methods", "--shape", "40x30x2", "--clients", "3", "--ranks", "2,4", "--json"]
    main([*asked, "--repeats", "2"])
    timings = json.loads(capsys.readouterr().out)
    assert {t["method"] for t in timings} == set(METHODS) - {"flexlora"}
    for timing in timings:
        assert timing["ranks"] == ("2,4" if METHODS[timing["method"]].ranks == "any" else "2")
        assert len(timing["seconds"]) == len(timing["reference"]) == 2
        assert timing["ratio"] > 0
    text = step_table([StepTiming(**{k: v for k, v in t.items() if k != "ratio"}) for t in timings])
    assert "server step of one module" in text
    # each round once, from the state that the one before left
    main(["--methods", "--shape", "40x30", "--clients", "3", "--ranks", "2", "--rounds", "2"])
    table = capsys.readouterr().out
    assert "worst (round)" in table and all(f" {t['method']} " in table for t in timings)
