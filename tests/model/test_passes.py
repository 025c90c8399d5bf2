"""A packed step is the padded step: the same loss, the same gradient of every factor."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fedllm.model.passes import PACKERS, Cut
from tests.decoders import DECODERS, Row, gradients, in_way, make_decoder, plain_loss, worst

HEAD = [5, 6, 7, 8, 9, 10, 11, 12, 13]
DRAW = torch.Generator().manual_seed(3)
LONG = torch.randint(14, 64, (60,), generator=DRAW).tolist()

STEPS = {
    "very different lengths": [
        Row([*HEAD, 20], [21, 1]),
        Row([*HEAD, *LONG], [30, 31, 1]),
        Row([*HEAD, 40, 41, 42, 43, 44], [50, 51, 52, 53, 54, 55, 1]),
    ],
    "an input is empty": [Row([*HEAD], [20, 1]), Row([*HEAD, 30, 31], [32, 1])],
    "a prompt is empty": [Row([], [20, 21, 1]), Row([30, 31], [32, 1])],
    "one row": [Row([*HEAD, 20, 21], [22, 1])],
    "identical rows": [Row([*HEAD, 20, 21], [22, 23, 1])] * 3,
    "identical rows and another": [*[Row([*HEAD, 20, 21], [22, 1])] * 2, Row([*HEAD, 30], [1])],
    "answers differ at the border": [
        Row(HEAD, [20, 1]),
        Row(HEAD, [21, 1]),
        Row(HEAD, [20, 22, 1]),
    ],
    "only the last token differs": [Row(HEAD, [20]), Row(HEAD, [21]), Row(HEAD, [22])],
    "one is the beginning of another": [Row(HEAD, [20, 1]), Row([*HEAD, 20, 1], [22, 1])],
    "nothing in common": [Row([20, 21, 22], [23, 1]), Row([30, 31], [32, 1])],
    "a row of one token": [Row([], [20]), Row([*HEAD, 20], [21, 1])],
}


def step_loss(model: nn.Module, rows: Sequence[Row], way: str, **cut: object) -> Tensor:
    """The mean loss of a step as the training loop has it."""
    options = {"loss_on": "answer", "pad_token": 0, "device": "cpu", **cut}
    passes = PACKERS[way](rows, Cut(**options))  # type: ignore[arg-type]
    targets = sum(one.num_targets for one in passes)
    return torch.stack([one.loss_sum(in_way(model, way)) for one in passes]).sum() / targets


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return make_decoder("llama")


def assert_equal(
    model: nn.Module, rows: Sequence[Row], way: str, bound: float, **cut: object
) -> None:
    loss_on = str(cut.get("loss_on", "answer"))
    plain = gradients(in_way(model, "padded"), lambda: plain_loss(model, rows, loss_on=loss_on))
    found = gradients(model, lambda: step_loss(model, rows, way, **cut))
    assert found[0] == pytest.approx(plain[0], rel=bound)
    assert worst(found[1], plain[1]) < bound


@pytest.mark.parametrize("way", ["parts", "mask", "packed", "padded"])
@pytest.mark.parametrize("loss_on", ["answer", "all"])
@pytest.mark.parametrize("step", STEPS)
def test_loss_and_gradients_are_those_of_the_padded_step(
    llama: nn.Module, step: str, loss_on: str, way: str
) -> None:
    rows = STEPS[step]
    if way == "padded" and step == "a row of one token":
        rows = rows[1:]  # nothing of it is computed
    assert_equal(llama, rows, way, 1e-6, loss_on=loss_on)


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_computes_parts_as_padded_rows(name: str) -> None:
    assert_equal(make_decoder(name), STEPS["very different lengths"], "parts", 1e-6)


@pytest.mark.parametrize("name", DECODERS)
def test_float32_differs_by_its_rounding(name: str) -> None:
    model = make_decoder(name, torch.float32)
    assert_equal(model, STEPS["very different lengths"], "parts", 1e-5)
