"""The benchmark of ZeRO finds what the formula says, and its data parallelism trains alike."""

import json

import pytest

from benchmarks.zero import main
from tests.tiny import Tiny


@pytest.mark.slow
def test_bytes_of_a_process_are_those_of_the_formula(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--variants=parallel,stage-3", "--steps=3", "--tokens=24", "--rows=2", "--rank=2"]
    main([f"--model={tiny.model}", *sizes, "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["stage"] for each in found] == [None, 3]
    for each in found:
        for name, expected in each["formula"].items():
            assert each[name] == pytest.approx(expected, rel=0.01), name
        assert each["private"] > 0
        assert len(each["seconds"]) == 1
    assert found[1]["losses"] == pytest.approx(found[0]["losses"], rel=1e-4)
    assert found[1]["base"] < 0.6 * found[0]["base"]
    assert found[1]["optimizer"] == pytest.approx(found[0]["optimizer"] / 2, rel=0.01)
