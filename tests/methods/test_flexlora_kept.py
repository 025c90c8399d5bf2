"""FlexLoRA with `truncated: keep`: what a client did not receive counts as unchanged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.errors import ConfigError
from fedllm.lora.factors import Factors, ModuleShape, delta
from fedllm.methods.catalog import build_method
from fedllm.methods.local_task import Recipient
from fedllm.methods.options import FlexLoraOptions
from fedllm.methods.protocol import ModuleAggregate, ModuleState
from fedllm.methods.spectral.flexlora import FlexLora
from tests.lora.adapters import dense_sum, random_factors
from tests.methods.aggregating import aggregate

DROP = FlexLora(seed=3, alpha=16.0)
KEEP = FlexLora(seed=3, alpha=16.0, options=FlexLoraOptions(truncated="keep"))
FLOAT32 = 4e-6  # relative rounding of a state carried in float32


def change(state: ModuleState) -> Tensor:
    return (state["U"].double() * state["S"].double()) @ state["Vh"].double()


def state_of(seed: int, *, out: int, in_: int, rank: int, full: int) -> ModuleState:
    """A state of rank `full` whose change has `rank` directions."""
    sent = random_factors(seed, out=out, in_=in_, rank=rank)
    return aggregate(DROP, [sent], [1.0], [full]).state


def received(state: ModuleState, rank: int) -> Factors:
    return KEEP.module_adapter(module="m", state=state, rank=rank)


def trained(state: ModuleState, rank: int, seed: int) -> Factors:
    """What a client of `rank` sends that moved both factors."""
    got = received(state, rank)
    moved = random_factors(seed, out=got.shape.out, in_=got.shape.in_, rank=rank, size=0.3)
    return Factors(a_RI=got.a_RI + moved.a_RI, b_OR=got.b_OR + moved.b_OR, scale=got.scale)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_where_nobody_trained_nothing_changes(data: st.DataObject) -> None:
    out, in_ = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    full = data.draw(st.integers(1, min(out, in_)), label="the state's rank")
    before = state_of(1, out=out, in_=in_, rank=data.draw(st.integers(1, full)), full=full)
    ranks = data.draw(st.lists(st.integers(1, full), min_size=1, max_size=5), label="ranks")
    weights = [float(data.draw(st.integers(1, 50))) for _ in ranks]
    sent = [received(before, rank) for rank in ranks]
    # the state has its rank because some tier does, whether or not it takes part
    after = aggregate(KEEP, sent, weights, [*ranks, full], before=before)
    size = float(change(before).norm())
    assert float((change(after.state) - change(before)).norm()) <= FLOAT32 * size
    parts = after.diagnostics.partitions
    assert sum(part.energy_lost for part in parts) == 0
    assert sum(part.energy_kept for part in parts) == pytest.approx(size**2, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), block_clients=st.integers(1, 4))
def test_the_state_is_the_best_of_the_sum_with_the_kept_directions(
    data: st.DataObject, block_clients: int
) -> None:
    full = data.draw(st.integers(2, 8), label="the state's rank")
    before = state_of(1, out=11, in_=9, rank=full, full=full)
    ranks = data.draw(st.lists(st.integers(1, full), min_size=1, max_size=5), label="ranks")
    weights = [float(data.draw(st.integers(1, 50))) for _ in ranks]
    sent = [trained(before, rank, seed) for seed, rank in enumerate(ranks)]
    shares = [weight / sum(weights) for weight in weights]
    missed = [change(before) - delta(received(before, rank)) for rank in ranks]
    w_OI = dense_sum(sent, shares) + sum(
        (share * lost for share, lost in zip(shares, missed, strict=True)), torch.zeros(11, 9)
    )
    after = aggregate(
        KEEP, sent, weights, [*ranks, full], before=before, block_clients=block_clients
    )
    s = torch.linalg.svdvals(w_OI)
    slack = FLOAT32 * float(w_OI.norm() + change(before).norm())
    assert float((w_OI - change(after.state)).norm()) <= float(s[full:].norm()) + slack
    torch.testing.assert_close(after.state["S"].double(), s[:full], rtol=1e-5, atol=slack)
    order = data.draw(st.permutations(range(len(ranks))), label="order")
    turned = aggregate(
        KEEP, [sent[n] for n in order], [weights[n] for n in order], [*ranks, full], before=before
    )
    torch.testing.assert_close(turned.state["S"], after.state["S"], rtol=1e-5, atol=slack)


@pytest.mark.parametrize("full", [4, 7])
def test_at_equal_ranks_it_is_the_papers_form_to_the_bit(full: int) -> None:
    before = state_of(1, out=10, in_=7, rank=full, full=full)
    sent = [trained(before, full, seed) for seed in range(3)]
    paper, kept = (aggregate(m, sent, [1, 2, 4], [full], before=before) for m in (DROP, KEEP))
    assert all(torch.equal(paper.state[part], kept.state[part]) for part in paper.state)
    assert paper.diagnostics == kept.diagnostics


def test_where_every_client_has_the_largest_rank_it_is_the_papers_form() -> None:
    before = state_of(1, out=10, in_=7, rank=5, full=5)
    sent = [trained(before, 5, seed) for seed in range(3)]
    paper, kept = (aggregate(m, sent, [1, 2, 4], [2, 5], before=before) for m in (DROP, KEEP))
    torch.testing.assert_close(change(kept.state), change(paper.state), rtol=1e-5, atol=1e-5)


def test_two_clients_by_hand() -> None:
    # W = diag(4, 2, 1); rank 1 trains to diag(6, 0, 0), rank 3 to diag(0, 2, 5), weights 1 and 3
    eye = torch.eye(3)
    before = {"U": eye, "S": torch.tensor([4.0, 2.0, 1.0]), "Vh": eye}
    low = Factors(a_RI=eye[:1], b_OR=6 * eye[:, :1] / 16, scale=16.0)
    high = Factors(a_RI=eye, b_OR=torch.diag(torch.tensor([0.0, 2.0, 5.0])), scale=1.0)

    def after(method: FlexLora) -> ModuleAggregate:
        return aggregate(method, [low, high], [1.0, 3.0], [1, 3], before=before)

    paper, kept = after(DROP), after(KEEP)
    # 1/4 diag(6, 0, 0) + 3/4 diag(0, 2, 5), and 1/4 diag(0, 2, 1) beside it
    exact = torch.diag(torch.tensor([1.5, 1.5, 3.75], dtype=torch.float64))
    torch.testing.assert_close(change(paper.state), exact, rtol=1e-6, atol=1e-6)
    exact = torch.diag(torch.tensor([1.5, 2.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(change(kept.state), exact, rtol=1e-6, atol=1e-6)
    rows = [(part.first, part.last, part.reach) for part in kept.diagnostics.partitions]
    assert rows == [(1, 1, 1.0), (2, 3, 0.75)]
    lost = [part.energy_lost for part in paper.diagnostics.partitions]
    assert lost == pytest.approx([0.0, 5.0 * (1 - 0.75**2)])
    assert [part.energy_lost for part in kept.diagnostics.partitions] == [0.0, 0.0]
    assert [part.energy for part in kept.diagnostics.partitions] == pytest.approx([16.0, 6.25])


def test_before_the_first_round_there_is_nothing_to_keep() -> None:
    shape = ModuleShape(out=10, in_=7)
    sent = [random_factors(seed, out=10, in_=7, rank=rank) for seed, rank in enumerate((1, 4))]
    start = KEEP.start_module(module="m", shape=shape, rank=4)
    paper, kept = (aggregate(m, sent, [1, 2], [1, 4], before=start) for m in (DROP, KEEP))
    torch.testing.assert_close(change(kept.state), change(paper.state), rtol=1e-5, atol=1e-5)
    assert [part.energy_kept for part in kept.diagnostics.partitions] == [0.0, 0.0]


def test_a_cohort_without_large_clients_erases_nothing() -> None:
    before = state_of(1, out=10, in_=7, rank=6, full=6)
    sent = [trained(before, 2, seed) for seed in range(3)]
    paper, kept = (aggregate(m, sent, [1, 1, 1], [2, 6], before=before) for m in (DROP, KEEP))
    beyond = change(before) - delta(received(before, 2))
    shares = [1 / 3] * 3
    wanted = dense_sum(sent, shares) + beyond
    s = torch.linalg.svdvals(wanted)
    left = float((wanted - change(kept.state)).norm())
    assert left <= float(s[6:].norm()) + FLOAT32 * float(wanted.norm())
    assert paper.diagnostics.partitions[1].reach == kept.diagnostics.partitions[1].reach == 0
    assert paper.diagnostics.partitions[1].energy_lost > 0


TAIL = FlexLora(seed=3, alpha=16.0, options=FlexLoraOptions(truncated="keep", frozen_tail=True))


@pytest.mark.parametrize("rank", [1, 3, 5, 6])
def test_with_its_frozen_tail_every_client_has_the_whole_model(rank: int) -> None:
    state = state_of(1, out=10, in_=7, rank=5, full=6)
    got = TAIL.hand_out(module="m", state=state, rank=rank, to=Recipient(client="a", round=1))
    assert got.rank == rank
    assert (got.frozen is None) == (rank >= 5)  # nothing lives beyond direction 5
    torch.testing.assert_close(delta(got), change(state), rtol=1e-6, atol=1e-6)
    own = received(state, rank)
    assert torch.equal(got.a_RI, own.a_RI) and torch.equal(got.b_OR, own.b_OR)


def test_without_the_option_nobody_receives_a_tail_and_the_aggregation_is_the_same() -> None:
    before = state_of(1, out=10, in_=7, rank=6, full=6)
    to = Recipient(client="a", round=1)
    for method in (DROP, KEEP):
        assert method.hand_out(module="m", state=before, rank=2, to=to).frozen is None
    sent = [trained(before, rank, rank) for rank in (2, 6)]
    kept, tail = (aggregate(m, sent, [1, 3], [2, 6], before=before) for m in (KEEP, TAIL))
    assert all(torch.equal(kept.state[part], tail.state[part]) for part in kept.state)


def test_a_tail_that_the_mean_would_erase_is_refused() -> None:
    words = r"^method.options.frozen_tail: got true beside truncated: drop; need truncated: keep$"
    with pytest.raises(ConfigError, match=words):
        build_method("flexlora", seed=1, alpha=1.0, scaling="fixed", options={"frozen_tail": True})
