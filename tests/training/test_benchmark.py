"""The benchmark takes the same steps in every way, and says what each took."""

import json
from pathlib import Path

import pytest

from benchmarks.measured.training_ways import WAYS
from benchmarks.training import main, parsed, prepared_in, timed
from tests.tiny import Tiny


def test_all_ways_take_the_same_steps_and_compute_ever_fewer_tokens(
    tiny: Tiny, tmp_path: Path
) -> None:
    sizes = ["--cutoff=160", "--threads=1", "--clients=3", "--co=2", "--repeats=2", "--steps=2"]
    asked = parsed([f"--model={tiny.model}", f"--data={tiny.data}", *sizes])
    asked.scratch = tmp_path
    prepared_in(tmp_path, asked)
    found = timed(asked)
    assert (found["layout"], found["steps"], found["groups"]) == ("parts", 6, 2)
    assert list(found["ways"]) == list(WAYS)
    tokens = [way["tokens_a_step"] for way in found["ways"].values()]
    assert tokens[0] > tokens[1] > tokens[2] == tokens[3] == tokens[4]
    for way in found["ways"].values():
        assert len(way["ms_a_step"]) == len(way["times_as_fast"]) == 2
        assert min(way["ms_a_step"]) > 0
    assert found["ways"]["plain"]["times_as_fast"] == [1.0, 1.0]


def test_memory_is_that_of_a_process_for_each_way(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--cutoff=160", "--threads=1", "--clients=2", "--co=2", "--repeats=1"]
    main([f"--model={tiny.model}", f"--data={tiny.data}", *sizes, "--ways", "selected", "--json"])
    found = json.loads(capsys.readouterr().out)["ways"]["selected"]
    assert 0 < found["peak_mib"] < 500
    assert found["times_as_fast"] == [1.0]
