"""Laws of LoRA-FAIR: its product is nearer to the mean of products than that of the means."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors, delta
from fedllm.methods.options import LoraFairOptions
from fedllm.methods.pairs.factor_mean import FactorMean
from fedllm.methods.pairs.lora_fair import LoraFair
from fedllm.methods.protocol import Method, ModuleState
from tests.lora.adapters import dense_sum, random_factors
from tests.methods.aggregating import aggregate

MEAN = FactorMean(seed=3, alpha=16.0)
METHOD = LoraFair(seed=3, alpha=16.0)


def fair(ridge: float) -> LoraFair:
    return LoraFair(seed=3, alpha=16.0, options=LoraFairOptions(ridge=ridge))


def change(state: ModuleState, method: Method = METHOD) -> Tensor:
    rank = state["A"].shape[0]
    return delta(method.module_adapter(module="m", state=state, rank=rank))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), block_clients=st.integers(1, 4))
def test_b_solves_the_ridge_problem(data: st.DataObject, block_clients: int) -> None:
    # 4 clients of rank 3 on a weight of 40 x 30 are stacked, on one of 11 x 9 they are formed
    out, in_ = data.draw(st.sampled_from([(11, 9), (40, 30)]), label="shape")
    rank, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    ridge = data.draw(st.sampled_from([1e-3, 0.01, 1.0]), label="ridge")
    weights = [float(data.draw(st.integers(1, 50))) for _ in range(count)]
    sent = [
        random_factors(seed, out=out, in_=in_, rank=rank, scale=float(seed + 1))
        for seed in range(count)
    ]
    shares = [weight / sum(weights) for weight in weights]
    scale = 16.0 / rank
    a = torch.stack([w * s.a_RI.double() for w, s in zip(shares, sent, strict=True)]).sum(0)
    b = torch.stack(
        [w * s.scale / scale * s.b_OR.double() for w, s in zip(shares, sent, strict=True)]
    ).sum(0)
    missed = dense_sum(sent, shares) / scale - b @ a
    exact = b + missed @ a.mT @ torch.linalg.inv(a @ a.mT + ridge * torch.eye(rank).double())
    for clients, amounts in ((sent, weights), (sent[::-1], weights[::-1])):
        state = aggregate(fair(ridge), clients, amounts, [rank], block_clients=block_clients).state
        torch.testing.assert_close(state["A"].double(), a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state["B"].double(), exact, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_it_is_nearer_to_the_mean_of_products_than_the_factor_mean(data: st.DataObject) -> None:
    weights = [float(data.draw(st.integers(1, 50))) for _ in range(3)]
    sent = [random_factors(seed, out=11, in_=9, rank=4, scale=4.0) for seed in range(3)]
    wanted = dense_sum(sent, [weight / sum(weights) for weight in weights])
    far, near = (
        float((wanted - change(aggregate(m, sent, weights, [4]).state)).norm())
        for m in (MEAN, METHOD)
    )
    assert near < far


def test_where_all_clients_send_the_same_nothing_is_corrected() -> None:
    sent = random_factors(1, out=11, in_=9, rank=4, scale=4.0)
    state = aggregate(METHOD, [sent] * 3, [1.0, 2.0, 4.0], [4]).state
    torch.testing.assert_close(state["A"], sent.a_RI)
    torch.testing.assert_close(state["B"], sent.b_OR)


def test_a_large_ridge_is_the_factor_mean() -> None:
    sent = [random_factors(seed, out=11, in_=9, rank=4, scale=4.0) for seed in range(3)]
    ours, mean = (aggregate(m, sent, [1, 2, 4], [4]).state for m in (fair(1e9), MEAN))
    torch.testing.assert_close(ours["B"], mean["B"], rtol=1e-5, atol=1e-5)


def test_two_clients_by_hand() -> None:
    method = LoraFair(seed=3, alpha=1.0, options=LoraFairOptions(ridge=1.0))
    one = Factors(a_RI=torch.tensor([[2.0, 0.0]]), b_OR=torch.tensor([[1.0], [0.0]]), scale=1.0)
    two = Factors(a_RI=torch.tensor([[0.0, 2.0]]), b_OR=torch.tensor([[3.0], [2.0]]), scale=1.0)
    state = aggregate(method, [one, two], [1.0, 1.0], [1]).state
    # means A = [1, 1] and B = [2, 1]; dW = [[1, 3], [0, 2]], dW A^T = [4, 2]; A A^T = 2
    # D = ([4, 2] - 2 [2, 1]) / (2 + 1) = 0: the rows of dW sum to what B A has
    torch.testing.assert_close(state["B"], torch.tensor([[2.0], [1.0]]))
    state = aggregate(method, [one, two], [3.0, 1.0], [1]).state
    # A = [1.5, 0.5], B = [1.5, 0.5], dW = [[1.5, 1.5], [0, 1]], dW A^T = [3, 0.5], A A^T = 2.5
    # D = ([3, 0.5] - 2.5 [1.5, 0.5]) / 3.5
    exact = torch.tensor([[1.5 - 0.75 / 3.5], [0.5 - 0.75 / 3.5]])
    torch.testing.assert_close(state["B"], exact)


def test_mixed_ranks_are_refused_in_its_own_name() -> None:
    reason = METHOD.refuse([{"mlp": 8}, {"mlp": 30}])
    assert reason is not None
    assert reason.startswith("method.name: lora_fair averages factors of one rank")
    sent = [random_factors(seed, out=11, in_=9, rank=rank) for seed, rank in enumerate((2, 4))]
    with pytest.raises(AdapterError, match="lora_fair needs adapters of one shape and rank"):
        aggregate(METHOD, sent, [1.0, 1.0], [4])
