"""Padded batches have the textbook loss, with padding on the left and logits for the end only."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fedllm.model.base import load_base
from fedllm.packing.batches import collate, token_losses
from tests.decoders import AllLogits
from tests.tiny import Tiny


@dataclass(frozen=True)
class Row:
    prompt_ids: list[int]
    answer_ids: list[int]
    prompt_targets: Sequence[int] = ()


ROWS = [
    Row([5, 6, 7, 8, 9, 10], [11, 12, 1]),
    Row([20, 21], [22, 1]),
    Row([30], [31, 32, 33, 34, 1]),
]


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> nn.Module:
    return load_base(tiny.model, dtype="float32", device="cpu").model.eval()


def plain_losses(model: nn.Module, row: Row, *, first: int) -> Tensor:
    """Return the losses of a row alone, with all logits and without padding."""
    ids = torch.tensor([row.prompt_ids + row.answer_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    return nn.functional.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="none")


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_every_target_has_the_loss_it_has_alone(model: nn.Module, loss_on: str) -> None:
    batch = collate(ROWS, loss_on=loss_on, pad_token=0, device="cpu")  # type: ignore[arg-type]
    with torch.no_grad():
        losses = token_losses(model, batch)
    for row, found, count in zip(ROWS, losses, batch.counts().tolist(), strict=True):
        expected = plain_losses(model, row, first=len(row.prompt_ids) if loss_on == "answer" else 1)
        torch.testing.assert_close(found[-count:], expected)
        assert not found[:-count].any()


def test_counts_are_those_of_the_rows() -> None:
    batch = collate(ROWS, loss_on="answer", pad_token=0, device="cpu")
    assert batch.num_tokens == sum(len(r.prompt_ids) + len(r.answer_ids) for r in ROWS)
    assert batch.num_targets == sum(len(r.answer_ids) for r in ROWS) == batch.counts().sum()
    assert batch.targets_NK.shape == (3, 5)


def test_rows_of_one_length_need_no_mask() -> None:
    batch = collate(ROWS[:1] * 2, loss_on="answer", pad_token=0, device="cpu")
    assert batch.mask_NT is None
    assert batch.positions_NT is None
    assert batch.starts == (0, 0)


def test_the_padding_token_does_not_matter(model: nn.Module) -> None:
    with torch.no_grad():
        found = [
            token_losses(model, collate(ROWS, loss_on="answer", pad_token=pad, device="cpu"))
            for pad in (0, 17)
        ]
    assert torch.equal(*found)


def test_a_first_token_without_a_prompt_is_no_target() -> None:
    batch = collate([Row([], [7, 8, 1])], loss_on="answer", pad_token=0, device="cpu")
    assert batch.targets_NK.tolist() == [[8, 1]]


def test_a_model_that_computes_all_logits_gives_the_same(model: nn.Module) -> None:
    batch = collate(ROWS, loss_on="answer", pad_token=0, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(
            token_losses(AllLogits(model), batch), token_losses(model, batch)
        )


def test_float64_logits_keep_their_precision(tiny: Tiny) -> None:
    exact = load_base(tiny.model, dtype="float32", device="cpu").model.eval().double()
    batch = collate(ROWS, loss_on="answer", pad_token=0, device="cpu")
    with torch.no_grad():
        assert token_losses(exact, batch).dtype == torch.float64
        assert token_losses(exact.bfloat16(), batch).dtype == torch.float32
