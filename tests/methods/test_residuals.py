"""Methods that change the base: what adapters do not hold is in the weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.aggregation.route_types import Problem, Start
from fedllm.lora.factors import Factors, ModuleShape, base_delta_of, delta
from fedllm.methods.options import FedMomentumOptions, FloristOptions
from fedllm.methods.pairs.factor_mean import FactorMean
from fedllm.methods.protocol import Method, ModuleState
from fedllm.methods.residuals import held_energy
from fedllm.methods.residuals.fedex import FedEx
from fedllm.methods.residuals.fedmomentum import FedMomentum
from fedllm.methods.residuals.flora import Flora
from fedllm.methods.residuals.florist import Florist
from fedllm.methods.spectral.flexlora import FlexLora
from tests.lora.adapters import dense_sum, random_factors
from tests.methods.aggregating import aggregate, block_of, can_train, part_of

FLORA, FEDEX = Flora(seed=3, alpha=16.0), FedEx(seed=3, alpha=16.0)
EXACT_FLORIST = Florist(seed=3, alpha=16.0, options=FloristOptions(threshold=1.0))
EXACT_MOMENTUM = FedMomentum(seed=3, alpha=16.0, options=FedMomentumOptions(energy=1.0))
EXACT: list[Method] = [FLORA, EXACT_FLORIST, FEDEX, EXACT_MOMENTUM]
ONE_RANK: list[Method] = [FEDEX, EXACT_MOMENTUM]


def of(method: Method) -> str:
    return method.name


def in_base(method: Method, state: ModuleState) -> Tensor:
    """What the base gets, float64."""
    change = method.base_delta(state)
    if change is None:
        return torch.zeros((), dtype=torch.float64)
    return base_delta_of(change)


def whole(method: Method, state: ModuleState, rank: int) -> Tensor:
    """What the base and the adapter together add to the first weights."""
    adapter = method.module_adapter(module="m", state=state, rank=rank)
    return in_base(method, state) + delta(adapter)


def by_hand() -> list[Factors]:
    """Two clients of rank 1, scale 16, on a weight of 2 x 2: 16 (1, 0)^T (1, 0) and its other."""
    return [
        Factors(a_RI=torch.tensor([e]), b_OR=torch.tensor([e]).T, scale=16.0)
        for e in ((1.0, 0.0), (0.0, 1.0))
    ]


def test_flora_adds_the_mean_of_two_clients_to_the_base() -> None:
    # weights 1 and 3: 16 (1/4 diag(1, 0) + 3/4 diag(0, 1)) = diag(4, 12)
    state = aggregate(FLORA, by_hand(), [1.0, 3.0], [1]).state
    assert in_base(FLORA, state).tolist() == [[4.0, 0.0], [0.0, 12.0]]
    assert not state["B"].any()
    # the next round comes in addition
    again = aggregate(FLORA, by_hand(), [3.0, 1.0], [1], before=state, round_number=2).state
    assert in_base(FLORA, again).tolist() == [[16.0, 0.0], [0.0, 16.0]]
    assert not torch.equal(again["A"], state["A"])


def test_florist_keeps_the_directions_that_hold_the_energy() -> None:
    # diag(4, 12): the second direction holds 144 / 160 = 0.9 of the energy
    for threshold, kept in ((0.9, [0.0, 12.0]), (0.91, [4.0, 12.0]), (0.1, [0.0, 12.0])):
        method = Florist(seed=3, alpha=16.0, options=FloristOptions(threshold=threshold))
        found = aggregate(method, by_hand(), [1.0, 3.0], [1])
        exact = torch.diag(torch.tensor(kept, dtype=torch.float64))
        torch.testing.assert_close(in_base(method, found.state), exact, atol=1e-5, rtol=1e-6)
        shares = [row.energy_kept for row in found.diagnostics.ranks]
        assert shares == pytest.approx([sum(s * s for s in kept) / 160])


def test_fedex_adds_what_the_product_of_the_means_misses() -> None:
    # A = (1/4, 3/4), B = A^T: 16 B A = ((1, 3), (3, 9)); diag(4, 12) less that
    state = aggregate(FEDEX, by_hand(), [1.0, 3.0], [1]).state
    assert state["A"].tolist() == [[0.25, 0.75]]
    assert in_base(FEDEX, state).tolist() == [[3.0, -3.0], [-3.0, 3.0]]


def test_fedmomentum_splits_the_mean_at_its_rank() -> None:
    # diag(4, 12) at rank 1: 12 to the adapter, sqrt(12 / 16) in A and in B; 4 to the base
    state = aggregate(EXACT_MOMENTUM, by_hand(), [1.0, 3.0], [1]).state
    expected = torch.diag(torch.tensor([4.0, 0.0]).double())
    torch.testing.assert_close(in_base(EXACT_MOMENTUM, state), expected)
    adapter = EXACT_MOMENTUM.module_adapter(module="m", state=state, rank=1)
    root = (12 / 16) ** 0.5
    assert adapter.a_RI.abs().tolist() == [pytest.approx([0.0, root], abs=1e-6)]
    assert adapter.b_OR.abs().flatten().tolist() == pytest.approx([0.0, root], abs=1e-6)
    torch.testing.assert_close(delta(adapter), torch.diag(torch.tensor([0.0, 12.0]).double()))


def test_fedmomentum_drops_what_is_beyond_its_energy() -> None:
    method = FedMomentum(seed=3, alpha=16.0, options=FedMomentumOptions(energy=0.9))
    state = aggregate(method, by_hand(), [1.0, 3.0], [1]).state
    assert not in_base(method, state).any()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), block_clients=st.integers(1, 4))
def test_base_and_adapter_are_the_mean_of_products(data: st.DataObject, block_clients: int) -> None:
    # 4 clients of rank 3 on a weight of 40 x 30 are stacked, on one of 11 x 9 they are formed
    out, in_ = data.draw(st.sampled_from([(11, 9), (40, 30)]), label="shape")
    ranks = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4), label="ranks")
    weights = [float(data.draw(st.integers(1, 50))) for _ in ranks]
    shares = [weight / sum(weights) for weight in weights]
    for method in EXACT:
        own = [3] * len(ranks) if method in ONE_RANK else ranks
        sent = [random_factors(s, out=out, in_=in_, rank=r, scale=2.0) for s, r in enumerate(own)]
        wanted = dense_sum(sent, shares)
        received = sorted({*own, 3})
        for clients, amounts in ((sent, weights), (sent[::-1], weights[::-1])):
            found = aggregate(method, clients, amounts, received, block_clients=block_clients)
            got = whole(method, found.state, 3)
            torch.testing.assert_close(got, wanted, atol=2e-5 * float(wanted.norm()), rtol=0)
            can_train(method.module_adapter(module="m", state=found.state, rank=3))


def test_the_change_of_the_base_grows_by_every_round() -> None:
    # at 60 x 50, 55 columns take twice the bytes of the matrix; fedex adds 15 a round, others 12
    for (out, in_), forms in (((11, 9), "WWW"), ((60, 50), "BBBWBB"), ((120, 200), "BBB")):
        sent = [random_factors(seed, out=out, in_=in_, rank=3, scale=2.0) for seed in range(4)]
        for method in EXACT:
            before = method.start_module(module="m", shape=sent[0].shape, rank=3)
            terms: ModuleState = {}
            changes, kinds = [], ""
            wanted = forms if method is FEDEX else forms.replace("BBBW", "BBBBW")[: len(forms)]
            for number in range(1, len(forms) + 1):
                shapes = {name: tuple(part.shape) for name, part in before.items()}
                before = aggregate(
                    method, sent, [1.0, 2.0, 4.0, 1.0], [3], before=before, round_number=number
                ).state
                plan = method.next_parts(sent[0].shape, 3, before=shapes, stacked_rank=12)
                assert {n: part_of(t) for n, t in before.items()} == plan
                changes.append(in_base(method, before))
                kinds += "W" if f"base/{number}/W" in before else "B"
                # earlier terms are taken over as they are, or in the one matrix
                assert kinds.endswith("W") or {n: before[n] for n in terms} == terms
                terms = {n: t for n, t in before.items() if n.startswith("base/")}
            assert kinds == wanted
            for number, change in enumerate(changes, 1):
                torch.testing.assert_close(change, number * changes[0], atol=1e-4, rtol=1e-5)


def test_a_state_of_an_earlier_version_goes_on_with_its_matrix() -> None:
    sent = [random_factors(seed, out=60, in_=50, rank=3, scale=2.0) for seed in range(4)]
    first = aggregate(FLORA, sent, [1.0, 2.0, 4.0, 1.0], [3]).state
    old = {"A": first["A"], "B": first["B"], "D": in_base(FLORA, first).float()}
    torch.testing.assert_close(in_base(FLORA, old), in_base(FLORA, first), atol=1e-5, rtol=1e-5)
    after = aggregate(FLORA, sent, [1.0, 2.0, 4.0, 1.0], [3], before=old, round_number=2).state
    assert after.keys() == {"A", "B", "base/1/W"}
    twice = 2 * in_base(FLORA, first)
    torch.testing.assert_close(in_base(FLORA, after), twice, atol=1e-4, rtol=1e-5)


def test_clients_that_are_left_out_leave_columns_of_zeros() -> None:
    # the route and the shapes follow from the whole cohort
    sent = [random_factors(seed, out=60, in_=50, rank=3, scale=2.0) for seed in range(4)]
    for method in EXACT:
        found = aggregate(method, sent[:2], [1.0, 2.0], [3], stacked_rank=12)
        plan = method.next_parts(sent[0].shape, 3, before={}, stacked_rank=12)
        assert {n: part_of(t) for n, t in found.state.items()} == plan
        wanted = dense_sum(sent[:2], [1 / 3, 2 / 3])
        torch.testing.assert_close(whole(method, found.state, 3), wanted, atol=1e-4, rtol=1e-5)


def test_a_sum_that_cancels_stays_within_its_columns() -> None:
    one = random_factors(0, out=60, in_=50, rank=3, scale=2.0)
    other = Factors(a_RI=-one.a_RI, b_OR=one.b_OR, scale=2.0)
    for method in EXACT:
        state = aggregate(method, [one, other], [1.0, 1.0], [3]).state
        assert float(whole(method, state, 3).norm()) < 1e-4 * float(delta(one).norm())


def test_in_their_adapters_they_are_the_known_methods() -> None:
    sent = [random_factors(seed, out=11, in_=9, rank=3, scale=2.0) for seed in range(3)]
    mean = aggregate(FactorMean(seed=3, alpha=16.0), sent, [1.0, 2.0, 4.0], [3]).state
    state = aggregate(FEDEX, sent, [1.0, 2.0, 4.0], [3]).state
    assert all(torch.equal(state[part], mean[part]) for part in mean)
    flex = aggregate(FlexLora(seed=3, alpha=16.0), sent, [1.0, 2.0, 4.0], [3]).state
    state = aggregate(EXACT_MOMENTUM, sent, [1.0, 2.0, 4.0], [3]).state
    adapters = [
        delta(m.module_adapter(module="m", state=s, rank=3))
        for m, s in ((EXACT_MOMENTUM, state), (FlexLora(seed=3, alpha=16.0), flex))
    ]
    torch.testing.assert_close(*adapters, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", EXACT, ids=of)
def test_before_training_nothing_is_changed(method: Method) -> None:
    state = method.start_module(module="m", shape=ModuleShape(out=11, in_=9), rank=4)
    assert not whole(method, state, 4).any()
    can_train(method.module_adapter(module="m", state=state, rank=4))
    specs = {n: p.shape for n, p in method.parts(ModuleShape(out=11, in_=9), 4).items()}
    assert specs == {n: tuple(part.shape) for n, part in state.items()}


@pytest.mark.parametrize("method", ONE_RANK, ids=of)
def test_mixed_ranks_are_refused_where_all_share_an_adapter(method: Method) -> None:
    assert "set all to 2" in str(method.refuse([{"m": 2}, {"m": 4}]))
    assert FLORA.refuse([{"m": 2}, {"m": 4}]) is None


@pytest.mark.parametrize("shape", [(11, 9), (9, 11), (40, 30)], ids=["tall", "wide", "factored"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999, 1.0])
def test_the_fewest_triplets_that_hold_a_share_are_found(
    shape: tuple[int, int], share: float
) -> None:
    sent = [random_factors(s, out=shape[0], in_=shape[1], rank=3, scale=2.0) for s in range(4)]
    problem = Problem(out=shape[0], in_=shape[1], stacked_rank=12, rank=2)
    partial = held_energy.fold(block_of(sent, [1.0, 2.0, 3.0, 4.0]), problem, share)
    (found,) = held_energy.hold([partial], problem, share, total=10.0, start=Start())
    dense = dense_sum(sent, [0.1, 0.2, 0.3, 0.4])
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    energies = s.square().cumsum(0) / s.square().sum()
    count = min(len(s), 1 + int((energies < share * (1 - 1e-9)).sum()))
    best = (u[:, :count] * s[:count]) @ vh[:count]
    held = found.held.b_OK.double() @ found.held.a_KI.double()
    held = held if found.held.w_OI is None else held + found.held.w_OI
    torch.testing.assert_close(held, best, atol=1e-5, rtol=1e-5)
    assert found.energy == pytest.approx(float(s[:count].square().sum()), rel=1e-6)
    torch.testing.assert_close(found.leading.spectral.s_R.double(), s[:2], atol=1e-5, rtol=1e-6)
    assert found.leading.total_energy == pytest.approx(float(s.square().sum()), rel=1e-6)
