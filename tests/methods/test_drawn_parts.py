"""Methods whose clients train some of the rank-one parts of the state."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors, ModuleShape, delta
from fedllm.methods.local_task import Recipient
from fedllm.methods.pairs.drawn_parts import DrawnParts
from fedllm.methods.pairs.factor_mean import FactorMean
from fedllm.methods.pairs.fed_plora import FedPLora
from fedllm.methods.pairs.fslora import FsLora
from fedllm.methods.protocol import ModuleState
from tests.lora.adapters import random_factors
from tests.methods.aggregating import aggregate

SHAPE = ModuleShape(out=11, in_=9)
FSLORA, PLORA = FsLora(seed=3, alpha=16.0), FedPLora(seed=3, alpha=16.0)
METHODS: list[DrawnParts] = [
    *(FSLORA, PLORA),
    *(kind(seed=3, alpha=16.0, scaling="proportional") for kind in (FsLora, FedPLora)),
]
R = 6


def of(method: DrawnParts) -> str:
    return f"{method.name}-{method.scaling}"


def state(rank: int = R) -> ModuleState:
    found = random_factors(1, out=11, in_=9, rank=rank)
    return {"A": found.a_RI, "B": found.b_OR}


def received(method: DrawnParts, before: ModuleState, rank: int, client: str) -> Factors:
    to = Recipient(client=client, round=1)
    return method.hand_out(module="m", state=before, rank=rank, to=to)


def places(method: DrawnParts, rank: int, client: str, held: int = R) -> list[int]:
    found: list[int] = method.drawn(
        rank=rank, held=held, to=Recipient(client=client, round=1)
    ).tolist()
    return found


def moved(got: Factors, seed: int) -> Factors:
    by = random_factors(seed, out=got.shape.out, in_=got.shape.in_, rank=got.rank, size=0.3)
    return Factors(a_RI=got.a_RI + by.a_RI, b_OR=got.b_OR + by.b_OR, scale=got.scale)


def after(
    method: DrawnParts,
    sent: Mapping[str, Factors],
    weights: Sequence[float],
    before: ModuleState,
    block_clients: int = 2,
) -> ModuleState:
    rank = before["A"].shape[0]
    return aggregate(
        method,
        list(sent.values()),
        weights,
        sorted({rank, *(f.rank for f in sent.values())}),
        before=before,
        clients=list(sent),
        block_clients=block_clients,
    ).state


@pytest.mark.parametrize("method", METHODS, ids=of)
def test_parts_are_drawn_by_round_and_client_and_are_all_drawn_in_time(method: DrawnParts) -> None:
    assert places(method, 2, "a") == places(method, 2, "a")
    drawn = [places(method, 2, str(client)) for client in range(60)]
    assert all(len(set(each)) == 2 and each == sorted(each) for each in drawn)
    assert {place for each in drawn for place in each} == set(range(R))
    other = method.drawn(rank=2, held=R, to=Recipient(client="a", round=2))
    assert places(method, R, "a") == list(range(R))
    assert len({tuple(each) for each in drawn}) > 5 and len(other) == 2


def test_a_sketch_is_the_model_on_average() -> None:
    before = state(3)
    scale = FSLORA.scale(3)
    whole = delta(Factors(a_RI=before["A"], b_OR=before["B"], scale=scale))
    sketches = [delta(received(FSLORA, before, 1, str(client))) for client in range(3000)]
    mean = torch.stack(sketches).mean(0)
    assert float((mean - whole).norm() / whole.norm()) < 0.1


@pytest.mark.parametrize("method", [m for m in METHODS if m.name == "fed_plora"], ids=of)
@pytest.mark.parametrize("rank", [1, 4, R])
def test_a_client_of_parts_has_the_whole_model(method: DrawnParts, rank: int) -> None:
    before = state()
    got = received(method, before, rank, "a")
    whole = delta(Factors(a_RI=before["A"], b_OR=before["B"], scale=method.scale(R)))
    torch.testing.assert_close(delta(got), whole, rtol=1e-6, atol=1e-6)
    assert got.rank == rank and (got.frozen is None) == (rank == R)
    assert got.scale == method.scale(rank)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), block_clients=st.integers(1, 4))
def test_where_nobody_trained_nothing_changes(data: st.DataObject, block_clients: int) -> None:
    before = state()
    ranks = data.draw(st.lists(st.integers(1, R), min_size=1, max_size=5))
    weights = [float(data.draw(st.integers(1, 50))) for _ in ranks]
    for method in METHODS:
        sent = {str(n): received(method, before, r, str(n)) for n, r in enumerate(ranks)}
        found = after(method, sent, weights, before, block_clients)
        for part in "AB":
            torch.testing.assert_close(found[part], before[part], rtol=2e-6, atol=2e-6)


def drawn_as(method: DrawnParts, wanted: list[int], held: int = 2) -> str:
    """A client that draws these parts."""
    names = map(str, range(1000))
    return next(n for n in names if places(method, len(wanted), n, held) == wanted)


@pytest.mark.parametrize("method", [FSLORA, PLORA], ids=of)
def test_two_clients_by_hand(method: DrawnParts) -> None:
    # A = 1, B = (1, 2) on a weight of 1 x 1; weights 1 and 3
    before = {"A": torch.ones(2, 1), "B": torch.tensor([[1.0, 2.0]])}
    one, both = drawn_as(method, [0]), "both"
    # scale 16 / r: the factor of a part of B is 1 for a sketch, 8 / 16 for a part of Fed-PLoRA
    unit = 1.0 if method is FSLORA else 0.5
    got = received(method, before, 1, one)
    assert got.b_OR.tolist() == [[unit]] and got.scale == 16.0
    sent = {
        one: Factors(a_RI=torch.tensor([[5.0]]), b_OR=torch.tensor([[9.0 * unit]]), scale=16.0),
        both: Factors(
            a_RI=torch.tensor([[1.0], [3.0]]), b_OR=torch.tensor([[1.0, 6.0]]), scale=8.0
        ),
    }
    found = after(method, sent, [1.0, 3.0], before)
    if method is FSLORA:
        # B_1: 1 + (1 * 8 + 3 * 0) / 4; B_2: 2 + 3 * 4 / 4; A_1: 1 + 4 / 4; A_2: 1 + 3 * 2 / 4
        assert found["B"].tolist() == [[3.0, 5.0]]
        assert found["A"].tolist() == [[2.0], [2.5]]
    else:
        # B_1: (9 + 3 * 1) / 4; B_2: 6, of the one who trained it; A_1: (5 + 3) / 4; A_2: 3
        assert found["B"].tolist() == [[3.0, 6.0]]
        assert found["A"].tolist() == [[2.0], [3.0]]


def test_a_part_that_nobody_trained_stays() -> None:
    before = state(2)
    one = drawn_as(PLORA, [0])
    sent = {one: moved(received(PLORA, before, 1, one), 5)}
    found = after(PLORA, sent, [3.0], before)
    assert torch.equal(found["A"][1], before["A"][1])
    assert torch.equal(found["B"][:, 1], before["B"][:, 1])
    assert not torch.equal(found["A"][0], before["A"][0])


@pytest.mark.parametrize("method", METHODS, ids=of)
def test_order_and_grouping_change_nothing(method: DrawnParts) -> None:
    before = state()
    ranks = {"a": 2, "b": 6, "c": 3, "d": 1}
    sent = {n: moved(received(method, before, r, n), r) for n, r in ranks.items()}
    weights = [1.0, 5.0, 2.0, 4.0]
    found = after(method, sent, weights, before)
    turned = dict(reversed(sent.items()))
    for other in (
        after(method, turned, weights[::-1], before),
        after(method, sent, weights, before, 4),
    ):
        for part in "AB":
            torch.testing.assert_close(found[part], other[part], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=of)
def test_at_one_rank_they_are_the_factor_mean(method: DrawnParts) -> None:
    before = state()
    sent = {n: moved(received(method, before, R, n), ord(n)) for n in "abc"}
    found = after(method, sent, [1.0, 2.0, 4.0], before)
    mean = FactorMean(seed=3, alpha=16.0, scaling=method.scaling)
    known = aggregate(mean, list(sent.values()), [1.0, 2.0, 4.0], [R], before=before).state
    for part in "AB":
        torch.testing.assert_close(found[part], known[part], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=of)
def test_any_ranks_up_to_the_states_are_taken(method: DrawnParts) -> None:
    assert method.refuse([{"m": 2}, {"m": 4}]) is None
    with pytest.raises(AdapterError, match="got rank 7, the state has 6"):
        received(method, state(), 7, "a")
