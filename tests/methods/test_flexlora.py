"""Laws of FlexLoRA, against dense float64 sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.aggregation.route_types import Problem
from fedllm.errors import AdapterError
from fedllm.lora.factors import FactorBlock, Factors, ModuleShape, delta, initial_a
from fedllm.methods.protocol import Method, ModuleAggregate, ModuleState, ServerStep
from fedllm.methods.spectral.flexlora import FlexLora
from tests.lora.adapters import Cohort, cohorts, random_factors
from tests.methods.aggregating import aggregate, block_of, can_train, part_of

METHOD: Method = FlexLora(seed=3, alpha=16.0)
SHAPE = ModuleShape(out=10, in_=7)
FLOAT32 = 2e-6  # relative rounding of a state carried in float32


def aggregated(cohort: Cohort, ranks: list[int], method: Method = METHOD) -> ModuleAggregate:
    return aggregate(method, cohort.factors, cohort.weights, ranks)


def received(state: ModuleState, rank: int, method: Method = METHOD) -> Factors:
    return method.module_adapter(module="m", state=state, rank=rank)


def test_two_clients_of_unequal_ranks_by_hand() -> None:
    # weights 1 and 3: (1 diag(8, 0) + 3 diag(0, 4)) / 4 = diag(2, 3), at rank 1 diag(0, 3)
    sent = [
        Factors(a_RI=torch.tensor([[1.0, 0.0]]), b_OR=torch.tensor([[8.0], [0.0]]), scale=1.0),
        Factors(
            a_RI=torch.tensor([[0.0, 2.0], [1.0, 1.0]]),
            b_OR=torch.tensor([[0.0, 0.0], [1.0, 0.0]]),
            scale=2.0,
        ),
    ]
    state = aggregate(METHOD, sent, [1.0, 3.0], [1, 2]).state
    assert state["S"].tolist() == pytest.approx([3.0, 2.0])
    for rank, wanted in ((1, [[0.0, 0.0], [0.0, 3.0]]), (2, [[2.0, 0.0], [0.0, 3.0]])):
        found = delta(received(state, rank))
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype))


@settings(max_examples=60, deadline=None)
@given(
    cohort=cohorts(largest_side=12), scaling=st.sampled_from(["fixed", "proportional", "rslora"])
)
def test_at_full_rank_the_adapter_is_the_weighted_mean(cohort: Cohort, scaling: str) -> None:
    method = FlexLora(seed=3, alpha=16.0, scaling=scaling)
    full = cohort.shape.largest_rank
    state = aggregated(cohort, [full], method).state
    error = (delta(received(state, full, method)) - cohort.dense()).norm()
    assert float(error) <= FLOAT32 * cohort.size() + 1e-37


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts(largest_side=12), data=st.data())
def test_every_client_receives_the_best_adapter_of_its_rank(
    cohort: Cohort, data: st.DataObject
) -> None:
    largest = data.draw(st.integers(1, cohort.shape.largest_rank), label="largest rank")
    result = aggregated(cohort, list(range(1, largest + 1)))
    w_OI = cohort.dense()
    true_s = torch.linalg.svdvals(w_OI)
    slack = FLOAT32 * cohort.size() + 1e-37
    for row in result.diagnostics.ranks:
        left_out = float((w_OI - delta(received(result.state, row.rank))).norm())
        optimal = float(true_s[row.rank :].norm())
        assert left_out <= optimal + slack
        assert row.truncation_error * float(w_OI.norm()) == pytest.approx(optimal, abs=slack)
        assert 0 <= row.energy_kept <= 1
        assert row.energy_kept + row.truncation_error**2 == pytest.approx(1.0)


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts(largest_side=8), data=st.data())
def test_every_received_direction_can_train(cohort: Cohort, data: st.DataObject) -> None:
    full = cohort.shape.largest_rank
    state = aggregated(cohort, [full]).state
    can_train(received(state, data.draw(st.integers(1, full), label="rank")))


def test_a_low_rank_update_trains_at_a_higher_rank() -> None:
    update = random_factors(1, out=10, in_=7, rank=2)
    state = aggregated(Cohort(factors=[update], weights=[1.0]), [6]).state
    assert state["S"][2:].tolist() == [0.0] * 4
    can_train(received(state, 6))


def test_round_0_changes_nothing_and_all_ranks_start_alike() -> None:
    state = METHOD.start_module(module="m", shape=SHAPE, rank=6)
    highest = received(state, 6)
    assert not delta(highest).any()
    can_train(highest)
    for rank in (1, 3, 6):
        client = received(state, rank)
        assert client.scale == 16.0 / rank
        assert torch.equal(client.a_RI, initial_a(seed=3, module="m", rank=rank, shape=SHAPE))
    assert {name: part_of(part) for name, part in state.items()} == METHOD.parts(SHAPE, 6)


def test_the_state_has_room_for_the_largest_rank_and_is_float32() -> None:
    cohort = Cohort(factors=[random_factors(1, out=10, in_=7, rank=2)], weights=[1.0])
    result = aggregated(cohort, [2, 5, 2])
    specs = {name: part_of(part) for name, part in result.state.items()}
    assert specs == METHOD.parts(SHAPE, 5)
    assert {spec.dtype for spec in specs.values()} == {torch.float32}
    assert all(part.is_contiguous() for part in result.state.values())
    assert [row.rank for row in result.diagnostics.ranks] == [2, 5]
    assert (result.diagnostics.stacked_rank, result.diagnostics.route) == (2, "factored")
    assert len(result.diagnostics.spectrum) == 5


def test_an_adapter_sent_back_untrained_changes_nothing() -> None:
    cohort = Cohort(factors=[random_factors(1, out=10, in_=7, rank=4)], weights=[1.0])
    before = aggregated(cohort, [4]).state
    after = aggregated(
        Cohort(factors=[received(before, 4)] * 3, weights=[0.2, 0.3, 0.5]), [4]
    ).state
    for part in before:
        torch.testing.assert_close(after[part], before[part], rtol=1e-5, atol=1e-5)


def test_bf16_updates_are_summed_in_full() -> None:
    updates = [random_factors(s, out=10, in_=7, rank=3, dtype=torch.bfloat16) for s in range(20)]
    cohort = Cohort(factors=updates, weights=[0.05] * 20)
    error = (delta(received(aggregated(cohort, [7]).state, 7)) - cohort.dense()).norm()
    assert float(error) <= FLOAT32 * cohort.size()


def test_zero_updates_give_a_state_that_trains() -> None:
    nothing = Factors(a_RI=torch.zeros(3, 7), b_OR=torch.zeros(10, 3), scale=2.0)
    result = aggregated(Cohort(factors=[nothing], weights=[1.0]), [7])
    assert not result.state["S"].any()
    assert result.diagnostics.ranks[0].energy_kept == 1.0
    assert result.diagnostics.ranks[0].truncation_error == 0.0
    can_train(received(result.state, 7))


def test_a_sum_beyond_float32_is_refused_by_module() -> None:
    huge = random_factors(1, out=10, in_=7, rank=3, size=1e25)
    with pytest.raises(AdapterError, match=r"^m: the aggregated S does not fit float32"):
        aggregated(Cohort(factors=[huge], weights=[1.0]), [3])


def test_more_than_the_state_holds_is_refused_by_module() -> None:
    state = METHOD.start_module(module="m", shape=SHAPE, rank=3)
    with pytest.raises(AdapterError, match=r"^m: got rank 4, the state has 3"):
        received(state, 4)


def test_any_mix_of_ranks_works_and_the_base_stays() -> None:
    assert METHOD.refuse([{"attention": 2, "mlp": 8}, {"attention": 200, "mlp": 30}]) is None
    state: dict[str, Tensor] = {}
    assert METHOD.base_delta(state) is None
    assert METHOD.weigh([1, 3]) == [1.0, 3.0]


@settings(max_examples=25, deadline=None)
@given(cohort=cohorts(largest_side=12), factor=st.sampled_from([0.001, 3.0, 1e6]))
def test_only_the_weights_proportions_matter(cohort: Cohort, factor: float) -> None:
    full = cohort.shape.largest_rank
    scaled = Cohort(factors=cohort.factors, weights=[factor * w for w in cohort.weights])
    one, other = (received(aggregated(each, [full]).state, full) for each in (cohort, scaled))
    assert float((delta(one) - delta(other)).norm()) <= FLOAT32 * cohort.size() + 1e-37


def test_modules_of_one_shape_are_aggregated_together_as_each_alone() -> None:
    modules = [
        [random_factors(10 * m + c, out=10, in_=7, rank=2) for c in range(3)] for m in (1, 2)
    ]
    problem = Problem(out=10, in_=7, stacked_rank=6, rank=4)
    blocks = [block_of(factors, [1.0, 2.0, 3.0]) for factors in modules]
    together = FactorBlock(
        a_GRI=torch.cat([block.a_GRI for block in blocks]),
        b_GOR=torch.cat([block.b_GOR for block in blocks]),
        ranks=blocks[0].ranks,
        scales_GC=torch.cat([block.scales_GC for block in blocks]),
        weights_GC=torch.cat([block.weights_GC for block in blocks]),
    )
    step = ServerStep(
        modules=["m", "n"],
        problem=problem,
        total=6.0,
        before=[METHOD.start_module(module=m, shape=SHAPE, rank=4) for m in "mn"],
        ranks=[4],
        round=1,
    )
    found = METHOD.finish([METHOD.fold(together, step)], step)
    for result, factors in zip(found, modules, strict=True):
        alone = aggregate(METHOD, factors, [1.0, 2.0, 3.0], [4], block_clients=3)
        torch.testing.assert_close(result.state["S"], alone.state["S"])
        torch.testing.assert_close(
            delta(received(result.state, 4)), delta(received(alone.state, 4))
        )


def test_what_was_found_before_changes_nothing_on_a_direct_route() -> None:
    cohort = Cohort(factors=[random_factors(1, out=10, in_=7, rank=4)], weights=[1.0])
    fresh = aggregated(cohort, [4]).state
    for before in (METHOD.start_module(module="m", shape=SHAPE, rank=4), fresh):
        again = aggregate(METHOD, cohort.factors, cohort.weights, [4], before=before).state
        assert all(torch.equal(again[part], fresh[part]) for part in fresh)


@settings(max_examples=40, deadline=None)
@given(cohort=cohorts(largest_side=12), data=st.data())
def test_the_diagnostics_are_those_of_the_weighted_mean(
    cohort: Cohort, data: st.DataObject
) -> None:
    largest = data.draw(st.integers(1, cohort.shape.largest_rank), label="largest rank")
    smallest = data.draw(st.integers(1, largest), label="smallest rank")
    found = aggregated(cohort, [largest, smallest]).diagnostics
    s = torch.linalg.svdvals(cohort.dense())
    energy = float(s.square().sum())
    assert found.total_energy == pytest.approx(energy, rel=1e-9, abs=1e-12 * cohort.size() ** 2)
    assert [row.rank for row in found.ranks] == sorted({smallest, largest})
    beyond = float(s[smallest:].square().sum()) / energy if energy else 0.0
    noise = 1e-9 * cohort.size() ** 2 / energy if energy else 0.0
    assert found.beyond_smallest_rank == pytest.approx(beyond, abs=1e-9 + noise)
    assert 0 <= found.effective_rank <= cohort.shape.largest_rank + 1e-6
    assert bool(found.effective_rank) == bool(found.spectrum[0])
    left_out = float(s[largest:].square().sum())
    assert found.residual_energy == pytest.approx(left_out, abs=1e-9 * cohort.size() ** 2)
    assert found.overlap is None  # nothing was trained before


def test_the_overlap_with_the_round_before_is_of_the_smallest_ranks_space() -> None:
    one, two = (random_factors(seed, out=10, in_=7, rank=5) for seed in (1, 2))
    first = aggregate(METHOD, [one], [1.0], [2, 5])
    same = aggregate(METHOD, [one], [7.0], [2, 5], before=first.state)
    assert same.diagnostics.overlap == pytest.approx(1.0, abs=1e-5)
    other = aggregate(METHOD, [two], [1.0], [2, 5], before=first.state)
    leading = [torch.linalg.svd(delta(sent)).Vh[:2] for sent in (one, two)]
    expected = float((leading[0] @ leading[1].mT).square().sum()) / 2
    assert other.diagnostics.overlap == pytest.approx(expected, abs=1e-5)


def test_dead_directions_have_no_overlap() -> None:
    poor = random_factors(1, out=10, in_=7, rank=1)
    rich = random_factors(2, out=10, in_=7, rank=5)
    of_poor, of_rich = (aggregate(METHOD, [sent], [1.0], [2, 5]) for sent in (poor, rich))
    for sent, before in ((rich, of_poor), (poor, of_rich)):
        found = aggregate(METHOD, [sent], [1.0], [2, 5], before=before.state)
        assert found.diagnostics.overlap is None
