"""A merged model stores as much of the change as its number format can, and reports it."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedllm.adapters.merging import narrow
from fedllm.cli.main import run as fedllm
from fedllm.errors import ModelError
from fedllm.storage.paths import RunPaths
from tests.adapters.test_export import expected, make_run
from tests.tiny import Tiny


@pytest.fixture(scope="module")
def small(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """Make a run on a bfloat16 base whose change is far smaller than its weights."""
    return make_run(tmp_path_factory.mktemp("run") / "r", tiny, dtype="bfloat16", size=0.0003)


def export(run: RunPaths, out: Path, *options: str) -> int:
    return fedllm(["export", str(run.root), "--merge", "--out", str(out), *options])


def weights(folder: Path, modules: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return {name: model.get_submodule(name).weight.data.double() for name in modules}


def exact(run: RunPaths, base: Path) -> dict[str, Tensor]:
    changes = expected(run, 6)
    before = weights(base, list(changes), torch.bfloat16)
    return {name: before[name] + change for name, change in changes.items()}


def size(tensors: dict[str, Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).norm())


@pytest.mark.parametrize(
    ("options", "dtype", "least"),
    [
        ([], torch.bfloat16, 0.0),
        (["--dtype", "float32"], torch.float32, 0.999),
        (["--dtype", "float16"], torch.float16, 0.0),
    ],
)
def test_every_weight_is_the_nearest_to_the_exact_sum(
    tiny: Tiny,
    small: RunPaths,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    dtype: torch.dtype,
    least: float,
) -> None:
    assert export(small, tmp_path / "out", "--json", *options) == 0
    said = json.loads(capsys.readouterr().out)
    name = str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["dtype"] == name
    assert said["dtype"] == name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    sums, changes = exact(small, tiny.model), expected(small, 6)
    found = weights(tmp_path / "out", list(sums), dtype)
    for module, wanted in sums.items():
        assert torch.equal(found[module], wanted.to(dtype).double())
    lost = size({m: found[m] - sums[m] for m in sums}) / size(changes)
    assert said["survived"] == pytest.approx(max(0.0, 1 - lost), abs=1e-6)
    assert said["survived"] >= least
    before = weights(tiny.model, list(sums), torch.bfloat16)
    same = sum(int((found[m] == before[m]).sum()) for m in sums)
    total = sum(change.numel() for change in changes.values())
    assert said["unchanged_share"] == pytest.approx(same / total, abs=1e-6)


def test_a_change_that_is_mostly_lost_by_rounding_is_reported_with_the_remedy(
    small: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(small, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "of the change survived rounding" in said
    assert "merge with --dtype float32" in said
    assert export(small, tmp_path / "whole", "--dtype", "float32") == 0
    said = capsys.readouterr().out
    assert "100.0% of the change survived rounding" in said
    assert "merge with" not in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--merge", "--dtype", "int8"], "--dtype: got 'int8', need one of float32"),
        (["--dtype", "float32"], "--dtype: is for --merge"),
    ],
)
def test_a_number_format_that_cannot_be_is_one_line(
    small: RunPaths,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    arguments = ["export", str(small.root), "--out", str(tmp_path / "out"), *options]
    assert fedllm(arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_weight_that_the_format_cannot_hold_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"weight: does not fit torch\.float16; use float32"):
        narrow(model, torch.float16)
