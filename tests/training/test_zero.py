"""What several processes make of a client with DeepSpeed ZeRO is what the plain loop does."""

import fcntl
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedllm.lora.factors import Adapter
from fedllm.training.loop import TrainResult
from fedllm.training.plain import Plain
from fedllm.training.shares import divide_rows
from tests.tiny import Tiny
from tests.training.test_loop import same, start
from tests.training.zero_processes import CASES, RESUMED, STOP, VARIANTS, gradients, trained_by

Found = Mapping[Any, Any]
# largest difference of the factors; None: only the losses are compared
BOUNDS = {"AdamW": 1e-5, "all layers kept": 1e-5, "AdamW as usual": None, "bfloat16": None}
BOUNDS["bfloat16 base and products"] = None
FOUR = pytest.param(4, marks=pytest.mark.nightly)
MARKS = {4: FOUR.marks}
ALL = [pytest.param(*each, marks=MARKS.get(each[0], ())) for each in VARIANTS]
LOSSES = {"AdamW as usual": 1e-3, "bfloat16": 1e-2, "bfloat16 base and products": 1e-2}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A plain training, and the gradient of each of its steps."""

    result: TrainResult
    gradients: list[Tensor]


@pytest.fixture(scope="module")
def found(
    tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, testrun_uid: str
) -> Mapping[int, Found]:
    """What one process, two and four found; the four also go on where the two stopped."""
    folder = tmp_path_factory.getbasetemp().parent / f"zero-{testrun_uid}"
    folder.mkdir(exist_ok=True)
    return _Trained(tiny.model, folder)


class _Trained(dict[int, Found]):
    """What so many processes found; they train when a test asks for it."""

    def __init__(self, model: Path, folder: Path) -> None:
        super().__init__()
        self._model, self._folder = model, folder

    def __missing__(self, processes: int) -> Found:
        if processes == 4:
            assert self[2]
        others = self._folder / "2" if processes == 4 else None
        # once for all processes of pytest: it takes half a minute
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = trained_by(processes, self._model, self._folder / str(processes), others)
        self[processes] = found
        return found


@pytest.fixture(scope="module")
def plain(tiny: Tiny) -> Mapping[str, Expected]:
    results = {}
    for name, case in CASES.items():
        slots = case.slots(tiny.model)
        trainer = Plain(slots=slots, settings=case.settings())
        steps: list[Tensor] = []
        with gradients(steps):
            (result,) = trainer.train([case.member(slots)])
        results[name] = Expected(result=result, gradients=steps)
    return results


def vector(adapter: Adapter) -> Tensor:
    parts = [t.flatten() for _, f in sorted(adapter.items()) for t in (f.a_RI, f.b_OR)]
    return torch.cat(parts).double()


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def distance(found: Adapter, expected: Adapter) -> float:
    return difference(vector(found), vector(expected))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "name", "stage", "offload"), ALL)
def test_every_stage_comes_to_what_the_plain_loop_does(
    found: Mapping[int, Found],
    plain: Mapping[str, Expected],
    processes: int,
    name: str,
    stage: int,
    offload: str,
) -> None:
    result, expected = found[processes][name, stage, offload], plain[name].result
    bound = BOUNDS.get(name, 1e-6)
    if bound is not None:
        assert distance(result.adapter, expected.adapter) < bound
    losses = LOSSES.get(name, 1e-5)
    assert result.stats.losses == pytest.approx(expected.stats.losses, rel=losses)
    if name not in LOSSES:
        assert result.stats.gradient_norms == pytest.approx(expected.stats.gradient_norms, rel=1e-4)
    assert result.stats.computed_tokens > 0
    for count in ("rows", "steps", "tokens", "loss_tokens", "padded_tokens"):
        assert getattr(result.stats, count) == getattr(expected.stats, count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "name", "stage", "offload"),
    [a for a, each in zip(ALL, VARIANTS, strict=True) if CASES[each[1]].rule == "fedavg"],
)
def test_the_gradient_of_every_step_is_that_of_all_its_targets(
    found: Mapping[int, Found],
    plain: Mapping[str, Expected],
    processes: int,
    name: str,
    stage: int,
    offload: str,
) -> None:
    steps, expected = found[processes]["gradients", name, stage, offload], plain[name].gradients
    assert len(steps) == len(expected) == CASES[name].changes["max_steps"]
    for step, own in zip(steps, expected, strict=True):
        assert difference(step[: own.numel()], own) < 1e-6
        assert not step[own.numel() :].any()  # padding


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, FOUR])
def test_who_is_stopped_goes_on_to_the_same_bits(
    found: Mapping[int, Found], processes: int
) -> None:
    resumed = found[processes]["resumed"]
    assert same(resumed, found[processes]["undisturbed"])
    assert resumed.stats.steps == 6


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, FOUR])
def test_another_number_of_processes_goes_on_from_its_progress(
    found: Mapping[int, Found], tiny: Tiny, processes: int
) -> None:
    slots = RESUMED.slots(tiny.model)
    progress, expected = found[2]["progress"], found[2]["undisturbed"]
    assert progress.step == STOP
    assert progress.fits(start(slots))
    assert all(tensor.numel() for tensor in progress.tensors.values())
    member = replace(RESUMED.member(slots), progress=progress)
    if processes == 1:
        (result,) = Plain(slots=slots, settings=RESUMED.settings()).train([member])
    else:
        result = found[processes]["from others"]
    assert distance(result.adapter, expected.adapter) < 1e-5
    assert result.stats.losses == pytest.approx(expected.stats.losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, FOUR])
def test_stage_3_leaves_each_process_its_part_and_the_factors(
    found: Mapping[int, Found], tiny: Tiny, processes: int
) -> None:
    slots = RESUMED.slots(tiny.model)
    base = sum(weight.numel() for weight in slots.model.parameters())
    vectors = sum(w.numel() for w in slots.model.parameters() if w.ndim == 1)
    factors = sum(f.a_RI.numel() + f.b_OR.numel() for f in start(slots).values())
    own = found[processes]
    # AdamW keeps two numbers for each of the factors, and none for the base
    assert 2 * factors / processes <= own["optimizer"] < 2 * factors / processes + 16
    if processes == 1:  # it has all of the base
        assert own["parts"] == 0
        return
    assert own["whole"] == vectors + factors
    assert base / processes <= own["parts"] < 1.02 * base / processes


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, FOUR])
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
