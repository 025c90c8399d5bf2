"""Laws of FedRot-LoRA: how a client's factors are turned does not matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors, delta
from fedllm.methods.pairs.factor_mean import FactorMean
from fedllm.methods.pairs.fedrot import FedRot
from fedllm.methods.protocol import ModuleState
from tests.lora.adapters import random_factors
from tests.methods.aggregating import aggregate, can_train

METHOD, MEAN = FedRot(seed=3, alpha=16.0), FactorMean(seed=3, alpha=16.0)


def state_of(seed: int, rank: int) -> ModuleState:
    pair = random_factors(seed, out=11, in_=9, rank=rank)
    return {"A": pair.a_RI, "B": pair.b_OR}


def orthogonal(seed: int, rank: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rank, rank, generator=draw, dtype=torch.float64)).Q


def turned(factors: Factors, q_RR: Tensor) -> Factors:
    a, b = q_RR.mT @ factors.a_RI.double(), factors.b_OR.double() @ q_RR
    return Factors(a_RI=a.float(), b_OR=b.float(), scale=factors.scale)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), round_number=st.integers(1, 6), block_clients=st.integers(1, 4))
def test_turned_clients_come_to_the_same(
    data: st.DataObject, round_number: int, block_clients: int
) -> None:
    rank, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    weights = [float(data.draw(st.integers(1, 50))) for _ in range(count)]
    sent = [random_factors(seed, out=11, in_=9, rank=rank, scale=4.0) for seed in range(count)]
    before = state_of(99, rank)
    usual = aggregate(METHOD, sent, weights, [rank], before=before, round_number=round_number)
    others = [turned(item, orthogonal(seed, rank)) for seed, item in enumerate(sent)]
    for clients, amounts in ((others, weights), (others[::-1], weights[::-1])):
        found = aggregate(
            METHOD,
            clients,
            amounts,
            [rank],
            before=before,
            block_clients=block_clients,
            round_number=round_number,
        )
        for part in "AB":
            torch.testing.assert_close(found.state[part], usual.state[part], rtol=1e-3, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 4), round_number=st.integers(1, 4))
def test_clients_of_one_change_come_to_that_change(seed: int, rank: int, round_number: int) -> None:
    one = random_factors(seed, out=11, in_=9, rank=rank, scale=4.0)
    sent = [turned(one, orthogonal(seed + n, rank)) for n in range(3)]
    before = state_of(99, rank)
    state = aggregate(
        METHOD, sent, [1.0, 2.0, 4.0], [rank], before=before, round_number=round_number
    ).state
    found = delta(METHOD.module_adapter(module="m", state=state, rank=rank))
    torch.testing.assert_close(found, delta(one), rtol=1e-3, atol=1e-3)


def test_clients_that_agree_with_the_last_factors_are_averaged_as_they_are() -> None:
    before = state_of(1, 3)
    steps = [random_factors(seed, out=11, in_=9, rank=3) for seed in range(3)]
    sent = [
        Factors(a_RI=before["A"] * (1 + n), b_OR=before["B"] + 0.01 * step.b_OR, scale=16.0 / 3)
        for n, step in enumerate(steps)
    ]
    ours, mean = (aggregate(m, sent, [1, 2, 4], [3], before=before).state for m in (METHOD, MEAN))
    for part in "AB":
        torch.testing.assert_close(ours[part], mean[part])


def test_a_first_even_round_from_b_of_zero_turns_nothing() -> None:
    sent = [random_factors(seed, out=11, in_=9, rank=3, scale=16.0 / 3) for seed in range(3)]
    before = {"A": state_of(1, 3)["A"], "B": torch.zeros(11, 3)}
    ours, mean = (
        aggregate(m, sent, [1, 2, 4], [3], before=before, round_number=2).state
        for m in (METHOD, MEAN)
    )
    for part in "AB":
        torch.testing.assert_close(ours[part], mean[part])
    can_train(METHOD.module_adapter(module="m", state=ours, rank=3))


def test_two_clients_by_hand() -> None:
    # both have the product [[2, 0], [0, 6]]; the second's two directions are swapped, one negated
    method = FedRot(seed=0, alpha=2.0)
    one = Factors(a_RI=torch.eye(2), b_OR=torch.tensor([[2.0, 0.0], [0.0, 6.0]]), scale=1.0)
    two = Factors(
        a_RI=torch.tensor([[0.0, 1.0], [-1.0, 0.0]]),
        b_OR=torch.tensor([[0.0, -2.0], [6.0, 0.0]]),
        scale=1.0,
    )
    before = {"A": torch.tensor([[3.0, 0.0], [0.0, 1.0]]), "B": torch.zeros(2, 2)}
    # A_2 A^T = [[0, 1], [-3, 0]] = U S V^T with U V^T = [[0, 1], [-1, 0]] = Q; Q^T A_2 = I
    state = aggregate(method, [one, two], [1.0, 3.0], [2], before=before).state
    torch.testing.assert_close(state["A"], torch.eye(2))
    torch.testing.assert_close(state["B"], torch.tensor([[2.0, 0.0], [0.0, 6.0]]))
    # the mean of factors as they are: A = [[1, 3], [-3, 1]] / 4, B = [[2, -6], [18, 6]] / 4
    plain = aggregate(FactorMean(seed=0, alpha=2.0), [one, two], [1.0, 3.0], [2]).state
    torch.testing.assert_close(plain["A"], torch.tensor([[0.25, 0.75], [-0.75, 0.25]]))


def test_mixed_ranks_are_refused_in_its_own_name() -> None:
    reason = METHOD.refuse([{"mlp": 8}, {"mlp": 30}])
    assert reason is not None
    assert reason.startswith("method.name: fedrot ")
    sent = [random_factors(seed, out=11, in_=9, rank=rank) for seed, rank in enumerate((2, 4))]
    with pytest.raises(AdapterError, match="fedrot needs adapters of one shape and rank"):
        aggregate(METHOD, sent, [1.0, 1.0], [4])
