"""Laws of raFLoRA: every range of directions by the clients that reach it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.lora.factors import Factors, delta
from fedllm.methods.protocol import ModuleState
from fedllm.methods.spectral.flexlora import FlexLora
from fedllm.methods.spectral.raflora import RaFlora
from tests.lora.adapters import random_factors
from tests.methods.aggregating import aggregate, can_train

METHOD = RaFlora(seed=3, alpha=16.0)
FLEXLORA = FlexLora(seed=3, alpha=16.0)
FLOAT32 = 4e-6  # relative rounding of a state carried in float32


def change(state: ModuleState) -> Tensor:
    return (state["U"].double() * state["S"].double()) @ state["Vh"].double()


def state_of(seed: int, rank: int, full: int) -> ModuleState:
    sent = random_factors(seed, out=11, in_=9, rank=rank)
    return aggregate(FLEXLORA, [sent], [1.0], [full]).state


def dense_ranges(
    sent: list[Factors], weights: list[float], before: ModuleState, bounds: list[int]
) -> Tensor:
    """The sum of the ranges' means, formed in float64 direction by direction."""
    total = torch.zeros(11, 9, dtype=torch.float64)
    for direction in range(bounds[-1]):
        end = next(bound for bound in bounds if bound > direction)
        one = slice(direction, direction + 1)
        reach = sum(w for w, item in zip(weights, sent, strict=True) if item.rank >= end)
        if not reach:
            u, vh = before["U"][:, one].double(), before["Vh"][one].double()
            total += u * float(before["S"][direction]) @ vh
        for weight, item in zip(weights, sent, strict=True):
            if item.rank >= end and reach:
                product = item.b_OR[:, one].double() @ item.a_RI[one].double()
                total += weight / reach * item.scale * product
    return total


@settings(max_examples=60, deadline=None)
@given(data=st.data(), block_clients=st.integers(1, 4))
def test_the_state_is_the_best_of_the_ranges_means(data: st.DataObject, block_clients: int) -> None:
    full = data.draw(st.integers(1, 8), label="the state's rank")
    ranks = data.draw(st.lists(st.integers(1, full), min_size=1, max_size=5), label="ranks")
    weights = [float(data.draw(st.integers(0, 50))) for _ in ranks[1:]] + [3.0]
    sent = [
        random_factors(seed, out=11, in_=9, rank=rank, scale=16.0 / rank)
        for seed, rank in enumerate(ranks)
    ]
    before = state_of(99, full, full)
    received = sorted({*ranks, full})
    w_OI = dense_ranges(sent, weights, before, received)
    size = float(w_OI.norm() + change(before).norm()) + sum(float(delta(s).norm()) for s in sent)
    results = [
        aggregate(METHOD, *shuffled, received, before=before, block_clients=block_clients)
        for shuffled in ((sent, weights), (sent[::-1], weights[::-1]))
    ]
    s = torch.linalg.svdvals(w_OI)
    for result in results:
        left = float((w_OI - change(result.state)).norm())
        assert left <= float(s[full:].norm()) + FLOAT32 * size
        expected, slack = s[:full], FLOAT32 * size
        torch.testing.assert_close(result.state["S"].double(), expected, rtol=1e-5, atol=slack)
        for rank in received:
            can_train(METHOD.module_adapter(module="m", state=result.state, rank=rank))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_where_nobody_trained_nothing_changes(data: st.DataObject) -> None:
    full = data.draw(st.integers(1, 8), label="the state's rank")
    before = state_of(1, data.draw(st.integers(1, full)), full)
    ranks = data.draw(st.lists(st.integers(1, full), min_size=1, max_size=5), label="ranks")
    weights = [float(data.draw(st.integers(1, 50))) for _ in ranks]
    sent = [METHOD.module_adapter(module="m", state=before, rank=rank) for rank in ranks]
    after = aggregate(METHOD, sent, weights, [*ranks, full], before=before)
    size = float(change(before).norm())
    assert float((change(after.state) - change(before)).norm()) <= FLOAT32 * size
    assert sum(part.energy_lost for part in after.diagnostics.partitions) == 0


def test_at_equal_ranks_it_is_flexlora() -> None:
    sent = [random_factors(seed, out=11, in_=9, rank=5) for seed in range(3)]
    ours, flexlora = (aggregate(m, sent, [1, 2, 4], [5]).state for m in (METHOD, FLEXLORA))
    torch.testing.assert_close(change(ours), change(flexlora), rtol=1e-5, atol=1e-5)


def test_two_clients_by_hand() -> None:
    # rank 1 sends diag(6, 0, 0), rank 3 diag(0, 2, 5), weights 1 and 3
    eye = torch.eye(3)
    low = Factors(a_RI=eye[:1], b_OR=6 * eye[:, :1] / 16, scale=16.0)
    high = Factors(a_RI=eye, b_OR=torch.diag(torch.tensor([0.0, 2.0, 5.0])), scale=1.0)
    before = {"U": eye, "S": torch.tensor([4.0, 2.0, 1.0]), "Vh": eye}
    result = aggregate(METHOD, [low, high], [1.0, 3.0], [1, 3], before=before)
    # direction 1: (1 * 6 + 3 * 0) / 4; directions 2 and 3: the large client alone
    exact = torch.diag(torch.tensor([1.5, 2.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(change(result.state), exact, rtol=1e-6, atol=1e-6)
    assert [part.reach for part in result.diagnostics.partitions] == [1.0, 0.75]
    # without the large client its range stays as it was
    result = aggregate(METHOD, [low], [1.0], [1, 3], before=before)
    exact = torch.diag(torch.tensor([6.0, 2.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(change(result.state), exact, rtol=1e-6, atol=1e-6)
    assert [part.reach for part in result.diagnostics.partitions] == [1.0, 0.0]
    assert [part.energy for part in result.diagnostics.partitions] == pytest.approx([36.0, 5.0])
