"""Entries of a weight in the shapes of an adapter."""

import pytest
import torch

from fedllm.lora.entries import entries_of, entry_places, with_entries
from fedllm.lora.factors import ModuleShape

SHAPE = ModuleShape(out=6, in_=4)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])  # 3 x 10 are more entries than there are
def test_values_come_back_from_their_entries(rank: int) -> None:
    places = entry_places(seed=3, shape=SHAPE, rank=rank)
    count = min(24, rank * 10)
    assert len(set(places.tolist())) == len(places) == count
    change = torch.zeros(24)
    change[places] = torch.arange(1.0, count + 1)
    a, b = entries_of(change.view(6, 4), places, rank)
    assert (a.shape, b.shape) == ((rank, 4), (6, rank))
    assert torch.equal(with_entries(a, b, places), change.view(6, 4))
    assert sorted([*a.flatten().tolist(), *b.flatten().tolist()])[-1] == count


def test_a_smaller_rank_has_the_first_entries_of_a_larger_one() -> None:
    large = entry_places(seed=3, shape=SHAPE, rank=2)
    assert torch.equal(entry_places(seed=3, shape=SHAPE, rank=1), large[:10])
    assert not torch.equal(entry_places(seed=4, shape=SHAPE, rank=2), large)
    a, b = torch.randn(2, 4), torch.randn(6, 2)
    first = with_entries(a[:1], b[:, :1], large[:10])
    both = with_entries(a, b, large)
    assert torch.equal(both.flatten()[large[:10]], first.flatten()[large[:10]])
