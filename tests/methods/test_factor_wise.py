"""Laws of the methods that average A and B of mixed ranks, each by itself: RBLA and HetLoRA."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors, ModuleShape, delta, initial_a
from fedllm.methods.pairs.factor_mean import FactorMean
from fedllm.methods.pairs.hetlora import HetLora
from fedllm.methods.pairs.pair_state import PairMethod
from fedllm.methods.pairs.rbla import Rbla
from fedllm.methods.protocol import ModuleState
from tests.lora.adapters import random_factors
from tests.methods.aggregating import aggregate

RBLA, HETLORA = Rbla(seed=3, alpha=16.0), HetLora(seed=3, alpha=16.0)
MEAN = FactorMean(seed=3, alpha=16.0)
SHAPE = ModuleShape(out=11, in_=9)
BOTH = pytest.mark.parametrize("method", [RBLA, HETLORA], ids=lambda method: method.name)


def sent_by(ranks: list[int]) -> list[Factors]:
    return [
        random_factors(seed, out=11, in_=9, rank=rank, scale=16.0 / rank)
        for seed, rank in enumerate(ranks)
    ]


def state_of(seed: int, rank: int) -> ModuleState:
    pair = random_factors(seed, out=11, in_=9, rank=rank)
    return {"A": pair.a_RI, "B": pair.b_OR}


def padded(parts: list[Tensor], shape: tuple[int, int]) -> list[Tensor]:
    found = []
    for part in parts:
        full = torch.zeros(shape, dtype=torch.float64)
        full[: part.shape[0], : part.shape[1]] = part
        found.append(full)
    return found


def mean(parts: list[Tensor], weights: list[float]) -> Tensor:
    return sum(
        (w / sum(weights) * part for w, part in zip(weights, parts, strict=True)), torch.zeros(1)
    )


@settings(max_examples=50, deadline=None)
@given(data=st.data(), block_clients=st.integers(1, 4))
def test_rbla_averages_each_direction_over_the_clients_that_reach_it(
    data: st.DataObject, block_clients: int
) -> None:
    full = data.draw(st.integers(1, 8), label="the state's rank")
    ranks = data.draw(st.lists(st.integers(1, full), min_size=1, max_size=5), label="ranks")
    weights = [float(data.draw(st.integers(1, 50))) for _ in ranks]
    sent, before = sent_by(ranks), state_of(99, full)
    received = sorted({*ranks, full})
    for clients, amounts in ((sent, weights), (sent[::-1], weights[::-1])):
        state = aggregate(
            RBLA, clients, amounts, received, before=before, block_clients=block_clients
        ).state
        for j in range(full):
            reach = [n for n, rank in enumerate(ranks) if rank > j]
            if not reach:
                assert torch.equal(state["A"][j], before["A"][j])
                assert torch.equal(state["B"][:, j], before["B"][:, j])
                continue
            shares = [weights[n] for n in reach]
            scales = [sent[n].scale / (16.0 / full) for n in reach]
            a = mean([sent[n].a_RI[j].double() for n in reach], shares)
            columns = [s * sent[n].b_OR[:, j].double() for n, s in zip(reach, scales, strict=True)]
            torch.testing.assert_close(state["A"][j].double(), a, rtol=1e-5, atol=1e-5)
            b = mean(columns, shares)
            torch.testing.assert_close(state["B"][:, j].double(), b, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), block_clients=st.integers(1, 4))
def test_hetlora_averages_padded_factors_by_the_norms_of_the_changes(
    data: st.DataObject, block_clients: int
) -> None:
    ranks = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=5), label="ranks")
    sent, full = sent_by(ranks), max(ranks)
    norms = [float(delta(item).norm()) for item in sent]
    a = mean(padded([item.a_RI.double() for item in sent], (full, 9)), norms)
    b = mean(
        padded([item.scale * full / 16.0 * item.b_OR.double() for item in sent], (11, full)), norms
    )
    for clients in (sent, sent[::-1]):
        # the rows that a client trained on do not count
        rows = [float(data.draw(st.integers(1, 50))) for _ in ranks]
        state = aggregate(HETLORA, clients, rows, sorted(set(ranks)), block_clients=block_clients)
        torch.testing.assert_close(state.state["A"].double(), a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.state["B"].double(), b, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_rbla_changes_nothing_where_nobody_trained(data: st.DataObject) -> None:
    full = data.draw(st.integers(1, 8), label="the state's rank")
    ranks = data.draw(st.lists(st.integers(1, full), min_size=1, max_size=5), label="ranks")
    before = state_of(1, full)
    sent = [RBLA.module_adapter(module="m", state=before, rank=rank) for rank in ranks]
    after = aggregate(RBLA, sent, [3.0] * len(ranks), [*ranks, full], before=before)
    for part in before:
        torch.testing.assert_close(after.state[part], before[part], rtol=1e-6, atol=1e-6)
    assert sum(part.energy_lost for part in after.diagnostics.partitions) == 0


def test_rbla_at_equal_ranks_is_the_factor_mean() -> None:
    sent = sent_by([5, 5, 5])
    ours, factor_mean = (aggregate(m, sent, [1, 2, 4], [5]).state for m in (RBLA, MEAN))
    for part in ours:
        torch.testing.assert_close(ours[part], factor_mean[part])


@BOTH
def test_a_client_receives_a_prefix_of_the_state_at_its_own_scale(method: PairMethod) -> None:
    state = state_of(1, 6)
    whole = method.module_adapter(module="m", state=state, rank=6)
    for rank in (1, 4, 6):
        got = method.module_adapter(module="m", state=state, rank=rank)
        assert got.scale == 16.0 / rank
        prefix = Factors(a_RI=whole.a_RI[:rank], b_OR=whole.b_OR[:, :rank], scale=whole.scale)
        torch.testing.assert_close(delta(got), delta(prefix), rtol=1e-6, atol=1e-6)
    with pytest.raises(AdapterError, match=r"^m: got rank 7, the state has 6"):
        method.module_adapter(module="m", state=state, rank=7)


@BOTH
def test_the_first_round_starts_all_ranks_from_one_seeded_a(method: PairMethod) -> None:
    state = method.start_module(module="m", shape=SHAPE, rank=6)
    for rank in (1, 6):
        got = method.module_adapter(module="m", state=state, rank=rank)
        assert torch.equal(got.a_RI, initial_a(seed=3, module="m", rank=rank, shape=SHAPE))
        assert not got.b_OR.any()
    assert method.refuse([{"m": 1}, {"m": 6}]) is None
    assert method.base_delta(state) is None


@BOTH
def test_an_adapter_of_a_higher_rank_than_the_states_is_refused(method: PairMethod) -> None:
    words = f"{method.name} cannot hold an adapter of rank 5 in a state of rank 3: ask for 5"
    with pytest.raises(AdapterError, match=words):
        aggregate(method, sent_by([5, 2]), [1.0, 1.0], [3])


def two_by_hand() -> tuple[ModuleState, list[Factors]]:
    """A client of rank 1 and one of rank 2; all scales are 1 (`rslora` with alpha sqrt(rank))."""
    low = Factors(a_RI=torch.tensor([[1.0, 0.0]]), b_OR=torch.tensor([[3.0], [0.0]]), scale=2.0)
    high = Factors(a_RI=torch.tensor([[3.0, 0.0], [0.0, 2.0]]), b_OR=torch.eye(2), scale=1.0)
    return {"A": torch.ones(2, 2), "B": torch.ones(2, 2)}, [low, high]


def test_rbla_of_two_clients_by_hand() -> None:
    method = Rbla(seed=3, alpha=2.0)  # scales 2 at rank 1 and 1 at rank 2
    before, sent = two_by_hand()
    state = aggregate(method, sent, [1.0, 3.0], [1, 2], before=before).state
    # row 1: (1 [1, 0] + 3 [3, 0]) / 4, row 2 of the large client alone
    torch.testing.assert_close(state["A"], torch.tensor([[2.5, 0.0], [0.0, 2.0]]))
    # column 1: (1 * 2 [3, 0] + 3 [1, 0]) / 4: the small client's B at the state's scale
    torch.testing.assert_close(state["B"], torch.tensor([[2.25, 0.0], [0.0, 1.0]]))


def test_hetlora_of_two_clients_by_hand() -> None:
    method = HetLora(seed=3, alpha=2.0)
    before, sent = two_by_hand()
    result = aggregate(method, sent, [1.0, 3.0], [1, 2], before=before)
    # changes diag(6, 0) and diag(3, 2): norms 6 and sqrt(13)
    low, high = 6 / (6 + 13**0.5), 13**0.5 / (6 + 13**0.5)
    a = torch.tensor([[low + 3 * high, 0.0], [0.0, 2 * high]])
    b = torch.tensor([[6 * low + high, 0.0], [0.0, high]])
    torch.testing.assert_close(result.state["A"], a)
    torch.testing.assert_close(result.state["B"], b)
    second = result.diagnostics.partitions[1]
    # of [[1, 1], [1, 1]] direction 2 has the energy 4
    assert second.energy_kept == pytest.approx(4 * high**4)
    assert second.energy_lost == pytest.approx(4 - 4 * high**4)
    assert second.reach == 0.75
    kept = float(b[0, 0] * a[0, 0]) ** 2
    assert result.diagnostics.ranks[0].energy_kept == pytest.approx(
        kept / (kept + float(b[1, 1] * a[1, 1]) ** 2)
    )


def test_directions_that_no_client_holds_can_train_again_in_hetlora() -> None:
    before = state_of(1, 6)
    state = aggregate(HETLORA, sent_by([2, 2]), [1.0, 1.0], [2, 6], before=before).state
    assert torch.equal(state["A"][2:], initial_a(seed=3, module="m", rank=6, shape=SHAPE)[2:])
    assert not state["B"][:, 2:].any()


def test_where_no_client_changed_anything_hetlora_keeps_the_state() -> None:
    before = state_of(1, 4)
    nothing = Factors(a_RI=torch.ones(4, 9), b_OR=torch.zeros(11, 4), scale=4.0)
    after = aggregate(HETLORA, [nothing], [1.0], [4], before=before)
    assert all(torch.equal(after.state[part], before[part]) for part in before)
    # a client without rows does not count
    idle, trained = sent_by([4, 4])
    one, both = (
        aggregate(HETLORA, clients, weights, [4], before=before).state
        for clients, weights in (([trained], [1.0]), ([idle, trained], [0.0, 1.0]))
    )
    torch.testing.assert_close(one["A"], both["A"])
