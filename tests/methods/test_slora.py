"""Laws of SLoRA: entries of the weights, then the SVD of their change, then FlexLoRA."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.errors import ConfigError
from fedllm.lora.entries import entry_places, with_entries
from fedllm.lora.factors import Factors, ModuleShape, delta
from fedllm.methods.catalog import build_method
from fedllm.methods.local_task import Recipient
from fedllm.methods.options import SLoraOptions
from fedllm.methods.protocol import ModuleState
from fedllm.methods.spectral.flexlora import FlexLora
from fedllm.methods.spectral.slora import SLora
from tests.lora.adapters import random_factors
from tests.methods.aggregating import aggregate

METHOD = SLora(seed=3, alpha=16.0, options=SLoraOptions(sparse_rounds=2))
FLEXLORA = FlexLora(seed=3, alpha=16.0)


def sparse(factors: Factors) -> Tensor:
    """The change that a client's values stand for, float64."""
    places = entry_places(seed=3, shape=factors.shape, rank=factors.rank)
    return with_entries(factors.a_RI.double(), factors.b_OR.double(), places)


def in_base(state: ModuleState) -> Tensor:
    change = METHOD.base_delta(state)
    assert not isinstance(change, Factors)
    return torch.zeros(1) if change is None else change.double()


def adapter(state: ModuleState, rank: int) -> Tensor:
    return delta(METHOD.module_adapter(module="m", state=state, rank=rank))


def by_hand() -> tuple[list[Factors], list[int]]:
    """Two clients on a weight of 3 x 2: rank 1 has 5 of 6 entries, rank 2 all; and their places."""
    one = Factors(a_RI=torch.tensor([[1.0, 2.0]]), b_OR=torch.tensor([[3.0, 4.0, 5.0]]).T, scale=16)
    two = Factors(
        a_RI=torch.tensor([[5.0, 6.0], [9.0, 0.0]]),
        b_OR=torch.tensor([[7.0, 8.0, 9.0], [0.0, 0.0, 0.0]]).T,
        scale=8.0,
    )
    return [one, two], entry_places(seed=3, shape=one.shape, rank=2).tolist()


def test_every_entry_moves_by_the_mean_of_the_two_clients_that_hold_it() -> None:
    clients, places = by_hand()
    # weights 1 and 3: (1 + 3 x 5) / 4 = 4, (2 + 3 x 6) / 4 = 5, ...; the sixth is client two's: 9
    expected = torch.zeros(6, dtype=torch.float64)
    expected[places] = torch.tensor([4.0, 5.0, 6.0, 7.0, 8.0, 9.0], dtype=torch.float64)
    first = aggregate(METHOD, clients, [1.0, 3.0], [1, 2]).state
    assert torch.equal(in_base(first), expected.view(3, 2))
    assert not adapter(first, 2).any()
    # the second round comes in addition; it is the last of them: the base returns, the SVD is left
    last = aggregate(METHOD, clients, [1.0, 3.0], [1, 2], before=first, round_number=2).state
    assert METHOD.base_delta(last) is None
    torch.testing.assert_close(adapter(last, 2), 2 * expected.view(3, 2), atol=1e-5, rtol=1e-6)
    u, s, vh = torch.linalg.svd(2 * expected.view(3, 2), full_matrices=False)
    torch.testing.assert_close(
        adapter(last, 1), s[0] * torch.outer(u[:, 0], vh[0]), atol=1e-5, rtol=1e-6
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data(), block_clients=st.integers(1, 4))
def test_entries_are_means_whatever_the_order_and_grouping(
    data: st.DataObject, block_clients: int
) -> None:
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5), label="ranks")
    weights = [float(data.draw(st.integers(1, 50))) for _ in ranks]
    scales = [16.0 / rank for rank in ranks]
    sent = [
        random_factors(seed, out=11, in_=9, rank=rank, scale=scale)
        for seed, (rank, scale) in enumerate(zip(ranks, scales, strict=True))
    ]
    before = METHOD.start_module(module="m", shape=ModuleShape(out=11, in_=9), rank=4)
    found = aggregate(
        METHOD, sent, weights, [1, 4], before=before, block_clients=block_clients
    ).state
    held = torch.zeros(99, dtype=torch.float64)
    for rank, weight in zip(ranks, weights, strict=True):
        held[entry_places(seed=3, shape=sent[0].shape, rank=rank)] += weight
    total = sum(w * sparse(item) for w, item in zip(weights, sent, strict=True))
    expected = total / held.where(held > 0, 1.0).view(11, 9)
    torch.testing.assert_close(in_base(found), expected, atol=1e-6, rtol=1e-6)
    order = data.draw(st.permutations(range(len(ranks))), label="order")
    other = aggregate(METHOD, [sent[i] for i in order], [weights[i] for i in order], [1, 4]).state
    torch.testing.assert_close(in_base(other), expected, atol=1e-6, rtol=1e-6)


def test_after_the_sparse_rounds_it_is_flexlora_to_the_bit() -> None:
    sent = [random_factors(seed, out=11, in_=9, rank=3, scale=16 / 3) for seed in range(3)]
    before = METHOD.start_module(module="m", shape=ModuleShape(out=11, in_=9), rank=3)
    found = aggregate(METHOD, sent, [1.0, 2.0, 3.0], [3], before=before, round_number=3).state
    flex = aggregate(FLEXLORA, sent, [1.0, 2.0, 3.0], [3], round_number=3).state
    assert all(torch.equal(found[name], part) for name, part in flex.items())
    assert METHOD.base_delta(found) is None


def test_a_clipped_change_counts_less() -> None:
    (one, two), _ = by_hand()
    whole = aggregate(METHOD, [two], [1.0], [2]).state
    half = aggregate(METHOD, [replace(two, scale=two.scale / 2)], [1.0], [2]).state
    assert torch.equal(in_base(half), in_base(whole) / 2)
    assert one.rank == 1


def test_the_adapter_of_the_start_is_kept_through_the_sparse_rounds() -> None:
    start = random_factors(5, out=11, in_=9, rank=3, scale=16 / 3)
    first = aggregate(METHOD, [start], [1.0], [3], round_number=0).state
    torch.testing.assert_close(adapter(first, 3), delta(start), atol=1e-5, rtol=1e-5)
    to = Recipient(client="7", round=1)
    got = METHOD.hand_out(module="m", state=first, rank=2, to=to)
    assert not got.a_RI.any() and not got.b_OR.any() and got.rank == 2
    assert got.frozen is not None
    torch.testing.assert_close(delta(got.frozen), delta(start), atol=1e-5, rtol=1e-5)
    sent = random_factors(6, out=11, in_=9, rank=3, scale=16 / 3)
    state = aggregate(METHOD, [sent], [1.0], [3], before=first, round_number=1).state
    assert torch.equal(state["U"], first["U"])
    last = aggregate(METHOD, [sent], [1.0], [3], before=state, round_number=2).state
    u, s, vh = torch.linalg.svd(delta(start) + 2 * sparse(sent))
    best = (u[:, :3] * s[:3]) @ vh[:3]
    torch.testing.assert_close(adapter(last, 3), best, atol=1e-5, rtol=1e-5)


def test_what_trains_follows_from_the_round() -> None:
    seeds = [METHOD.local_task(number).entries_seed for number in (1, 2, 3)]
    assert seeds == [3, 3, None]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"sparse_rounds": 0}, "method.options.sparse_rounds: got 0, need >= 1"),
        ({"sparse_round": 2}, "did you mean `method.options.sparse_rounds`?"),
        ({"threshold": 0.5}, "an option of florist; slora has"),
    ],
)
def test_options_that_it_does_not_have_are_refused(options: dict[str, float], line: str) -> None:
    with pytest.raises(ConfigError) as found:
        build_method("slora", seed=0, alpha=16.0, scaling="fixed", options=options)
    assert line in str(found.value)
    with pytest.raises(ConfigError, match="needs a state of factors alone"):
        build_method("slora", seed=0, alpha=16.0, scaling="fixed", server="fedavgm")
