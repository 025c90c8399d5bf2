"""What several processes make of a client with DeepSpeed ZeRO is what the plain loop does."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedllm.lora.factors import Adapter
from fedllm.training.loop import TrainResult
from fedllm.training.plain import Plain
from fedllm.training.shares import divide_rows
from tests.tiny import Tiny
from tests.training.test_loop import same, start
from tests.training.zero_processes import CASES, LONG, STOP, VARIANTS, trained_by

Found = Mapping[Any, Any]
BOUNDS = {"AdamW": 1e-5}


@pytest.fixture(scope="module")
def found(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Found]:
    """What one process and two found."""
    folder = tmp_path_factory.mktemp("zero")
    return {n: trained_by(n, tiny.model, folder / str(n)) for n in (1, 2)}


@pytest.fixture(scope="module")
def plain(tiny: Tiny) -> Mapping[str, TrainResult]:
    results = {}
    for name, case in CASES.items():
        slots = case.slots(tiny.model)
        trainer = Plain(slots=slots, settings=case.settings())
        (results[name],) = trainer.train([case.member(slots)])
    return results


def distance(found: Adapter, expected: Adapter, begun: Adapter | None = None) -> float:
    """The largest difference of two adapters, or of their changes since `begun`, relative to it."""

    def vector(adapter: Adapter) -> torch.Tensor:
        parts = [t.flatten() for _, f in sorted(adapter.items()) for t in (f.a_RI, f.b_OR)]
        return torch.cat(parts).double()

    difference = vector(found) - vector(expected)
    reference = vector(expected) - (vector(begun) if begun else 0.0)
    return float(difference.abs().max() / reference.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "name", "stage", "offload"), VARIANTS)
def test_every_stage_comes_to_what_the_plain_loop_does(
    found: Mapping[int, Found],
    plain: Mapping[str, TrainResult],
    processes: int,
    name: str,
    stage: int,
    offload: str,
) -> None:
    result, expected = found[processes][name, stage, offload], plain[name]
    bound = BOUNDS.get(name, 1e-6)
    assert distance(result.adapter, expected.adapter) < bound
    assert result.stats.losses == pytest.approx(expected.stats.losses, rel=1e-5)
    assert result.stats.gradient_norms == pytest.approx(expected.stats.gradient_norms, rel=1e-4)
    for count in ("rows", "steps", "tokens", "loss_tokens"):
        assert getattr(result.stats, count) == getattr(expected.stats, count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "name", "stage", "offload"), [each for each in VARIANTS if "gradient" in each[1]]
)
def test_the_gradient_of_a_step_is_that_of_all_its_targets(
    found: Mapping[int, Found],
    plain: Mapping[str, TrainResult],
    tiny: Tiny,
    processes: int,
    name: str,
    stage: int,
    offload: str,
) -> None:
    begun = start(CASES[name].slots(tiny.model))
    expected = plain[name].adapter
    assert distance(expected, begun) > 0.01
    assert distance(found[processes][name, stage, offload].adapter, expected, begun) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_who_is_stopped_goes_on_to_the_same_bits(
    found: Mapping[int, Found], processes: int
) -> None:
    resumed = found[processes]["resumed"]
    assert same(resumed, found[processes]["undisturbed"])
    assert resumed.stats.steps == 6


@pytest.mark.slow
def test_another_number_of_processes_goes_on_from_its_progress(
    found: Mapping[int, Found], tiny: Tiny
) -> None:
    case = replace(CASES["AdamW"], dropout=0.3, changes={**LONG, "max_steps": 6})
    slots = case.slots(tiny.model)
    progress, expected = found[2]["progress"], found[2]["undisturbed"]
    assert progress.step == STOP
    assert progress.fits(start(slots))
    assert all(tensor.numel() for tensor in progress.tensors.values())
    member = replace(case.member(slots), progress=progress)
    (result,) = Plain(slots=slots, settings=case.settings()).train([member])
    assert distance(result.adapter, expected.adapter) < 1e-5
    assert result.stats.losses == pytest.approx(expected.stats.losses, rel=1e-5)


@pytest.mark.slow
def test_stage_3_leaves_each_process_its_part_of_the_base_and_the_factors(
    found: Mapping[int, Found], tiny: Tiny
) -> None:
    slots = CASES["AdamW"].slots(tiny.model)
    base = sum(weight.numel() for weight in slots.model.parameters())
    vectors = sum(w.numel() for w in slots.model.parameters() if w.ndim == 1)
    factors = sum(f.a_RI.numel() + f.b_OR.numel() for f in start(slots).values())
    assert found[2]["whole"] == vectors + factors
    assert base / 2 <= found[2]["parts"] < 0.51 * base
    assert found[1]["parts"] == 0  # the only process has all of it


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_what_bits_depend_on_names_the_processes_and_deepspeed(
    found: Mapping[int, Found], processes: int
) -> None:
    environment = found[processes]["environment"]
    assert environment["processes"] == str(processes)
    assert environment["deepspeed"]


@pytest.mark.parametrize("lengths", [[], [5], [3, 9, 4, 4, 1], [7] * 8])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_rows_are_divided_by_their_tokens(lengths: list[int], processes: int) -> None:
    shares = divide_rows(lengths, processes)
    assert len(shares) == processes
    assert sorted(place for share in shares for place in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    tokens = [sum(lengths[place] for place in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)
