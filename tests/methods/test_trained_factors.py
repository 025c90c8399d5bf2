"""Methods whose clients train one factor: the mean of products is the product of the means."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.lora.factors import Factors, delta
from fedllm.methods.pairs.factor_mean import FactorMean
from fedllm.methods.pairs.ffa import Ffa
from fedllm.methods.pairs.rolora import RoLora
from fedllm.methods.protocol import Method, ModuleState
from fedllm.methods.spectral.fedsvd import FedSvd
from fedllm.methods.spectral.flexlora import FlexLora
from tests.lora.adapters import dense_sum, random_factors
from tests.methods.aggregating import aggregate, can_train

FFA, ROLORA, FEDSVD = (kind(seed=3, alpha=16.0) for kind in (Ffa, RoLora, FedSvd))
METHODS: list[Method] = [FFA, ROLORA, FEDSVD]


def of_one_a(count: int, rank: int = 3) -> list[Factors]:
    first = random_factors(9, out=11, in_=9, rank=rank, scale=16.0 / rank)
    return [
        replace(first, b_OR=random_factors(seed, out=11, in_=9, rank=rank).b_OR)
        for seed in range(count)
    ]


def change(method: Method, state: ModuleState, rank: int = 3) -> Tensor:
    return delta(method.module_adapter(module="m", state=state, rank=rank))


def test_what_trains_follows_from_the_round() -> None:
    tasks = {m.name: [m.local_task(n).trained for n in (1, 2, 3)] for m in METHODS}
    assert tasks == {
        "ffa": ["B", "B", "B"],
        "rolora": ["B", "A", "B"],
        "fedsvd": ["B", "B", "B"],
    }
    assert FlexLora(seed=3, alpha=16.0).local_task(2).trained == "AB"


def by_hand(b_one: Sequence[float], b_two: Sequence[float], a: Sequence[float]) -> list[Factors]:
    """Two clients of rank 1 on a weight of 2 x 2, scale 16."""
    return [
        Factors(a_RI=torch.tensor([a]), b_OR=torch.tensor(b)[:, None], scale=16.0)
        for b in (b_one, b_two)
    ]


@pytest.mark.parametrize("method", [FFA, ROLORA], ids=lambda method: method.name)
def test_b_is_the_weighted_mean_of_two_clients(method: Method) -> None:
    # weights 1 and 3: (1 (4, 0) + 3 (0, 8)) / 4 = (1, 6); A stays (3, 5)
    sent = by_hand((4.0, 0.0), (0.0, 8.0), (3.0, 5.0))
    state = aggregate(method, sent, [1.0, 3.0], [1]).state
    assert state["A"].tolist() == [[3.0, 5.0]]
    assert state["B"].tolist() == [[1.0], [6.0]]


def test_a_is_the_weighted_mean_where_b_is_frozen() -> None:
    # (1 (4, 0) + 3 (0, 8)) / 4 = (1, 6)
    sent = [
        Factors(a_RI=torch.tensor([a]), b_OR=torch.tensor([[3.0], [5.0]]), scale=16.0)
        for a in ((4.0, 0.0), (0.0, 8.0))
    ]
    state = aggregate(ROLORA, sent, [1.0, 3.0], [1], round_number=2).state
    assert state["A"].tolist() == [[1.0, 6.0]]
    assert state["B"].tolist() == [[3.0], [5.0]]


def test_fedsvd_turns_the_product_of_two_clients() -> None:
    # B = (1, 6), A = (3, 5), s = 16: the only singular value is 16 |B| |A| = 16 sqrt(37 * 34)
    sent = by_hand((4.0, 0.0), (0.0, 8.0), (3.0, 5.0))
    state = aggregate(FEDSVD, sent, [1.0, 3.0], [1]).state
    assert state["S"].tolist() == pytest.approx([16 * (37 * 34) ** 0.5])
    adapter = FEDSVD.module_adapter(module="m", state=state, rank=1)
    sign = float(adapter.a_RI[0, 0].sign())
    norm = 34**0.5
    assert adapter.a_RI[0].tolist() == pytest.approx([sign * 3 / norm, sign * 5 / norm])
    assert adapter.b_OR[:, 0].tolist() == pytest.approx([sign * norm, sign * 6 * norm])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), block_clients=st.integers(1, 4))
def test_nothing_is_lost_in_any_order_and_grouping(data: st.DataObject, block_clients: int) -> None:
    count = data.draw(st.integers(1, 4))
    weights = [float(data.draw(st.integers(1, 50))) for _ in range(count)]
    sent = of_one_a(count)
    wanted = dense_sum(sent, [weight / sum(weights) for weight in weights])
    for method in METHODS:
        for clients, amounts in ((sent, weights), (sent[::-1], weights[::-1])):
            state = aggregate(method, clients, amounts, [3], block_clients=block_clients).state
            torch.testing.assert_close(change(method, state), wanted, rtol=1e-5, atol=1e-5)


def test_the_frozen_a_keeps_its_bits() -> None:
    sent = of_one_a(7)
    state = aggregate(FFA, sent, [1.0, 2.0, 3.0, 5.0, 7.0, 11.0, 13.0], [3]).state
    assert torch.equal(state["A"], sent[0].a_RI)


def test_in_one_round_they_are_the_known_methods() -> None:
    sent, weights = of_one_a(3), [1.0, 2.0, 4.0]
    mean = aggregate(FactorMean(seed=3, alpha=16.0), sent, weights, [3]).state
    for method in (FFA, ROLORA):
        state = aggregate(method, sent, weights, [3]).state
        assert all(torch.equal(state[part], mean[part]) for part in mean)
    flex = aggregate(FlexLora(seed=3, alpha=16.0), sent, weights, [3]).state
    state = aggregate(FEDSVD, sent, weights, [3]).state
    assert all(torch.equal(state[part], flex[part]) for part in flex)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_mixed_ranks_are_refused_and_b_can_train(method: Method) -> None:
    assert method.refuse([{"m": 2}, {"m": 2}]) is None
    why = method.refuse([{"m": 2}, {"m": 4}])
    assert why is not None
    assert f"{method.name} averages factors of one rank" in why and "set all to 2" in why
    state = aggregate(method, of_one_a(2), [1.0, 1.0], [3]).state
    can_train(method.module_adapter(module="m", state=state, rank=3))
