"""Dropout belongs to a row and a position, whatever else is in the batch."""

import pytest
import torch
from torch import Tensor

from fedllm.model.noise import Piece, RowDropout, RowSeeds


def dropped(
    x: Tensor, *, seeds: list[int], starts: list[int], rate: float = 0.3, module: str = "m"
) -> Tensor:
    rows = RowSeeds()
    pieces = zip(seeds, starts, strict=True)
    rows.enter(
        [Piece(entry=n, start=at, stop=x.shape[1], seed=s) for n, (s, at) in enumerate(pieces)]
    )
    result: Tensor = RowDropout(rate, module=module, rows=rows)(x)
    return result


def test_a_row_has_its_mask_in_any_batch_and_behind_any_padding() -> None:
    x = torch.ones(2, 9, 7)
    together = dropped(x, seeds=[11, 12], starts=[0, 4])
    assert torch.equal(together[0], dropped(x[:1], seeds=[11], starts=[0])[0])
    assert torch.equal(together[1, 4:], dropped(x[:1, 4:], seeds=[12], starts=[0])[0])


def test_rows_and_modules_have_masks_of_their_own() -> None:
    x = torch.ones(2, 9, 7)
    both = dropped(x, seeds=[11, 12], starts=[0, 0])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, dropped(x, seeds=[11, 12], starts=[0, 0], module="other"))


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_the_rate_is_met_and_the_mean_kept(rate: float) -> None:
    y = dropped(torch.ones(4, 64, 256), seeds=[1, 2, 3, 4], starts=[0] * 4, rate=rate)
    assert (y == 0).float().mean().item() == pytest.approx(rate, abs=0.01)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)


def test_evaluation_drops_nothing() -> None:
    x = torch.randn(1, 3, 5)
    assert RowDropout(0.5, module="m", rows=RowSeeds()).eval()(x) is x
