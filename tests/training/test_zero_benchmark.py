"""The benchmark of ZeRO finds what the formula says, and its data parallelism trains alike."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.zero import main, random_base
from fedllm.model.base import load_base
from tests.tiny import Tiny


@pytest.mark.slow
def test_bytes_of_a_process_are_those_of_the_formula(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--variants=parallel,stage-3", "--steps=3", "--tokens=24", "--rows=2", "--rank=2"]
    main([f"--model={tiny.model}", *sizes, f"--scratch={tmp_path / 'new' / 'folder'}", "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["stage"] for each in found] == [None, 3]
    for each in found:
        for name, expected in each["formula"].items():
            assert each[name] == pytest.approx(expected, rel=0.01), name
        assert each["private"] > 0
        assert len(each["seconds"]) == len(each["cpu_seconds"]) == 1
    assert found[1]["losses"] == pytest.approx(found[0]["losses"], rel=1e-4)
    assert found[1]["base"] < 0.6 * found[0]["base"]
    assert found[1]["optimizer"] == pytest.approx(found[0]["optimizer"] / 2, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_are_a_base_of_the_shape(dtype: str, tmp_path: Path) -> None:
    base = load_base(random_base("3x64x96", dtype, tmp_path), dtype=dtype, device="cpu")
    mlp = base.modules["model.layers.2.mlp.up_proj"]
    assert (mlp.in_features, mlp.out_features) == (64, 96)
    weights = list(base.model.parameters())
    assert {weight.dtype for weight in weights} == {getattr(torch, dtype)}
    assert all(0 < weight.float().abs().max() < 2 for weight in weights)
