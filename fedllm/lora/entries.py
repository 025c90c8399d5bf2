"""Entries of a weight that change by themselves, in place of a product of factors.

An adapter of rank r has r (O + I) values; here they belong to as many entries of the weight, and
lie in the same shapes: one row of A and one column of B are the next I + O entries. The entries are
drawn from a seed, the same for all modules of one shape. Those of a smaller rank are the first of a
larger one.

Legend: O out, I in, R rank, N entries.
"""

from functools import lru_cache

import torch
from torch import Tensor

from fedllm.lora.factors import ModuleShape
from fedllm.planning.seeding import seed_of


@lru_cache(maxsize=16)
def entry_places(*, seed: int, shape: ModuleShape, rank: int) -> Tensor:
    """Return the places of the entries in the flattened weight (N,), all of it at most."""
    draws = torch.Generator().manual_seed(seed_of(seed, "entries", shape.out, shape.in_))
    order = torch.randperm(shape.out * shape.in_, generator=draws)
    return order[: rank * (shape.out + shape.in_)].clone()


def with_entries(a_RI: Tensor, b_OR: Tensor, places_N: Tensor) -> Tensor:
    """Return the change of the weight (O, I) whose entries have the values of A and B."""
    change = a_RI.new_zeros(b_OR.shape[0] * a_RI.shape[1])
    change[places_N] = torch.cat([a_RI, b_OR.mT], dim=1).flatten()[: len(places_N)]
    return change.view(b_OR.shape[0], a_RI.shape[1])


def entries_of(change_OI: Tensor, places_N: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the entries of a change in the shapes of A (R, I) and B (O, R); zeros beyond them."""
    out, in_ = change_OI.shape
    values = change_OI.new_zeros(rank * (in_ + out))
    values[: len(places_N)] = change_OI.flatten()[places_N]
    values_RN = values.view(rank, in_ + out)
    return values_RN[:, :in_], values_RN[:, in_:].mT
