"""Laws of the factor mean."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.aggregation.route_types import Partial, Problem
from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors, ModuleShape, delta, initial_a
from fedllm.methods.pairs.factor_mean import FactorMean
from fedllm.methods.protocol import Method, ModuleAggregate, ServerStep
from tests.lora.adapters import random_factors
from tests.methods.aggregating import aggregate, block_of, part_of

METHOD: Method = FactorMean(seed=3, alpha=16.0)
SHAPE = ModuleShape(out=10, in_=7)


def client(seed: int, *, rank: int = 4, scale: float = 4.0) -> Factors:
    return random_factors(seed, out=10, in_=7, rank=rank, scale=scale)


def aggregated(updates: list[Factors], weights: list[float], ranks: list[int]) -> ModuleAggregate:
    return aggregate(METHOD, updates, weights, ranks)


def test_two_clients_by_hand() -> None:
    # weights 1 and 3: A = (1 (1, 3) + 3 (5, 7)) / 4 = (4, 6)
    # and B = (1 (4, 0) + 3 (0, 8)) / 4 = (1, 6)
    sent = [
        Factors(a_RI=torch.tensor([[1.0, 3.0]]), b_OR=torch.tensor([[4.0], [0.0]]), scale=16.0),
        Factors(a_RI=torch.tensor([[5.0, 7.0]]), b_OR=torch.tensor([[0.0], [8.0]]), scale=16.0),
    ]
    state = aggregated(sent, [1.0, 3.0], [1]).state
    assert state["A"].tolist() == [[4.0, 6.0]]
    assert state["B"].tolist() == [[1.0], [6.0]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_a_and_b_are_averaged_separately(rows: list[int]) -> None:
    weights = METHOD.weigh([n + 1 for n in rows])
    updates = [client(seed) for seed in range(len(rows))]
    result = aggregated(updates, weights, [4])
    pairs = [(u, w / sum(weights)) for u, w in zip(updates, weights, strict=True)]
    torch.testing.assert_close(
        result.state["A"], torch.stack([p * u.a_RI for u, p in pairs]).sum(0)
    )
    torch.testing.assert_close(
        result.state["B"], torch.stack([p * u.b_OR for u, p in pairs]).sum(0)
    )


def test_no_block_is_held_while_the_next_one_is_made() -> None:
    before = METHOD.start_module(module="m", shape=SHAPE, rank=4)
    step = ServerStep(
        modules=["m"],
        problem=Problem(out=10, in_=7, stacked_rank=16, rank=4),
        total=4.0,
        before=[before],
        ranks=[4],
        round=1,
    )
    made: list[weakref.ref[Tensor]] = []

    def fold(seed: int) -> Partial:
        assert not any(block() is not None for block in made[2:])
        partial = METHOD.fold(block_of([client(seed)], [1.0]), step)
        made.extend(weakref.ref(tensor) for tensor in partial.values())
        return partial

    METHOD.finish((fold(seed) for seed in range(4)), step)
    assert len(made) == 8


def test_the_diagnostics_are_those_of_the_product() -> None:
    result = aggregated([client(1), client(2)], [0.5, 0.5], [4])
    adapter = METHOD.module_adapter(module="m", state=result.state, rank=4)
    true_s = torch.linalg.svdvals(delta(adapter))
    assert result.diagnostics.spectrum == pytest.approx(true_s[:4].tolist(), rel=1e-5)
    assert result.diagnostics.total_energy == pytest.approx(float(true_s.square().sum()), rel=1e-5)
    assert result.diagnostics.ranks[0].energy_kept == pytest.approx(1.0)


def test_one_client_gets_back_what_it_sent() -> None:
    sent = client(1)
    back = METHOD.module_adapter(module="m", state=aggregated([sent], [1.0], [4]).state, rank=4)
    assert torch.equal(back.a_RI, sent.a_RI)
    assert torch.equal(back.b_OR, sent.b_OR)
    assert back.scale == sent.scale == 16.0 / 4


def test_a_client_of_another_scale_sends_the_same_product() -> None:
    sent = client(1, scale=1.0)
    back = METHOD.module_adapter(module="m", state=aggregated([sent], [1.0], [4]).state, rank=4)
    assert back.scale == 4.0
    torch.testing.assert_close(delta(back), delta(sent))


def test_round_0_changes_nothing_and_starts_from_the_seeded_a() -> None:
    state = METHOD.start_module(module="m", shape=SHAPE, rank=4)
    assert {name: part_of(part) for name, part in state.items()} == METHOD.parts(SHAPE, 4)
    assert not state["B"].any()
    assert torch.equal(state["A"], initial_a(seed=3, module="m", rank=4, shape=SHAPE))
    assert METHOD.base_delta(state) is None


def test_mixed_ranks_are_refused_with_the_key_and_the_remedy() -> None:
    assert METHOD.refuse([{"attention": 8, "mlp": 30}, {"attention": 8, "mlp": 30}]) is None
    assert METHOD.refuse([{"attention": 8}, {"mlp": 30}]) is None
    reason = METHOD.refuse([{"attention": 8, "mlp": 30}, {"attention": 8, "mlp": 200}])
    assert reason is not None
    assert "clients.tiers gives mlp the ranks 30, 200" in reason
    assert "set all to 30, or use flexlora" in reason


@pytest.mark.parametrize(
    ("updates", "ranks", "words"),
    [
        ([client(1), client(2, rank=3)], [4], "of one shape and rank, got ranks 3, 4 for rank 4"),
        ([client(1)], [3], "got ranks 4 for rank 3"),
        ([client(1)], [3, 4], r"m: factor_mean has one rank for all, got \[3, 4\]"),
    ],
)
def test_updates_that_have_no_mean_are_refused(
    updates: list[Factors], ranks: list[int], words: str
) -> None:
    with pytest.raises(AdapterError, match=words):
        aggregated(updates, [1.0] * len(updates), ranks)


def test_a_client_without_the_module_counts_as_zero() -> None:
    sent = client(1)
    nothing = Factors(a_RI=torch.zeros(0, 7), b_OR=torch.zeros(10, 0), scale=4.0)
    state = aggregated([nothing, sent, nothing], [1.0, 1.0, 2.0], [4]).state
    torch.testing.assert_close(state["A"], 0.25 * sent.a_RI)
    torch.testing.assert_close(state["B"], 0.25 * sent.b_OR)


def test_the_state_gives_only_its_own_rank() -> None:
    state = METHOD.start_module(module="m", shape=SHAPE, rank=4)
    for rank in (3, 5):
        with pytest.raises(AdapterError, match=f"^m: rank {rank} asked .* ask for 4"):
            METHOD.module_adapter(module="m", state=state, rank=rank)


def test_the_overlap_is_that_of_the_products_of_two_rounds() -> None:
    first = aggregated([client(1)], [1.0], [4])
    assert first.diagnostics.overlap is None
    # the same product, of other factors
    turned = Factors(a_RI=2 * client(1).a_RI.flip(0), b_OR=client(1).b_OR.flip(1) / 2, scale=4.0)
    again = aggregate(METHOD, [turned], [1.0], [4], before=first.state)
    assert again.diagnostics.overlap == pytest.approx(1.0)
    other = aggregate(METHOD, [client(2)], [1.0], [4], before=first.state)
    rows = [torch.linalg.svd(delta(client(seed))).Vh[:4] for seed in (1, 2)]
    expected = float((rows[0] @ rows[1].mT).square().sum()) / 4
    assert other.diagnostics.overlap == pytest.approx(expected)
