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


@pytest.fixture(scope="module", params=[1, 2])
def found(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Found:
    out = tmp_path_factory.mktemp("zero") / "found"
    return trained_by(request.param, tiny.model, out)


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
@pytest.mark.parametrize(("name", "stage", "offload"), VARIANTS)
def test_every_stage_comes_to_what_the_plain_loop_does(
    found: Found, plain: Mapping[str, TrainResult], name: str, stage: int, offload: str
) -> None:
    result, expected = found[name, stage, offload], plain[name]
    bound = BOUNDS.get(name, 1e-6)
    assert distance(result.adapter, expected.adapter) < bound
    assert result.stats.losses == pytest.approx(expected.stats.losses, rel=1e-5)
    assert result.stats.gradient_norms == pytest.approx(expected.stats.gradient_norms, rel=1e-4)
    for count in ("rows", "steps", "tokens", "loss_tokens"):
        assert getattr(result.stats, count) == getattr(expected.stats, count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "offload"), [each for each in VARIANTS if "gradient" in each[0]]
)
def test_the_gradient_of_a_step_is_that_of_all_its_targets(
    found: Found, plain: Mapping[str, TrainResult], tiny: Tiny, name: str, stage: int, offload: str
) -> None:
    begun = start(CASES[name].slots(tiny.model))
    expected = plain[name].adapter
    assert distance(expected, begun) > 0.01
    assert distance(found[name, stage, offload].adapter, expected, begun) < 1e-6


@pytest.mark.slow
def test_who_is_stopped_goes_on_to_the_same_bits(found: Found) -> None:
    assert same(found["resumed"], found["undisturbed"])
    assert found["resumed"].stats.steps == 6


@pytest.mark.slow
def test_its_progress_is_that_of_the_plain_loop(found: Found, tiny: Tiny) -> None:
    case = replace(CASES["AdamW"], dropout=0.3, changes={**LONG, "max_steps": 6})
    slots = case.slots(tiny.model)
    progress = found["progress"]
    assert progress.step == STOP
    assert progress.fits(start(slots))
    assert all(tensor.numel() for tensor in progress.tensors.values())
    member = replace(case.member(slots), progress=progress)
    (result,) = Plain(slots=slots, settings=case.settings()).train([member])
    assert distance(result.adapter, found["undisturbed"].adapter) < 1e-5
    assert result.stats.losses == pytest.approx(found["undisturbed"].stats.losses, rel=1e-5)


@pytest.mark.slow
def test_what_bits_depend_on_names_the_processes_and_deepspeed(found: Found) -> None:
    assert found["environment"]["processes"] in {"1", "2"}
    assert found["environment"]["deepspeed"]


@pytest.mark.parametrize("lengths", [[], [5], [3, 9, 4, 4, 1], [7] * 8])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_rows_are_divided_by_their_tokens(lengths: list[int], processes: int) -> None:
    shares = divide_rows(lengths, processes)
    assert len(shares) == processes
    assert sorted(place for share in shares for place in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    tokens = [sum(lengths[place] for place in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)
