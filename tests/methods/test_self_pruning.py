"""HetLoRA's self-pruning: clients lower their own ranks, which are part of the state."""

from pathlib import Path

import pytest
import torch

from fedllm.cli.execution import start
from fedllm.lora.factors import Adapter, Factors
from fedllm.methods.options import HetLoraOptions
from fedllm.methods.pairs.hetlora import HetLora
from fedllm.methods.protocol import UsedClients
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import AggregateRecord, CohortRecord
from fedllm.storage.updates import read_update
from tests.lora.adapters import random_factors
from tests.methods.aggregating import aggregate, can_train
from tests.tiny import Tiny

PLAIN = HetLora(seed=3, alpha=16.0)
METHOD = HetLora(seed=3, alpha=16.0, options=HetLoraOptions(pruning=0.5, penalty=0.25))


def of_tail(a: float, b: float) -> Factors:
    """An adapter of rank 2 whose second direction has these norms."""
    return Factors(
        a_RI=torch.tensor([[3.0, 0.0], [0.0, a]]),
        b_OR=torch.tensor([[5.0, 0.0], [0.0, b]]),
        scale=8.0,
    )


def told(begun: Factors, trained: Factors, method: HetLora = METHOD) -> object:
    begun_adapter: Adapter = {"m": begun}
    return method.client_notes(trained={"m": trained}, received=lambda: begun_adapter)


def test_a_client_prunes_a_tail_that_shrank() -> None:
    assert told(of_tail(2.0, 3.0), of_tail(2.5, 2.0)) == {"ranks": {"m": 1}}
    assert told(of_tail(2.0, 3.0), of_tail(2.0, 3.5)) == {}
    # before the first step B is zero: there is nothing that could shrink
    assert told(of_tail(2.0, 0.0), of_tail(2.0, 0.1)) == {}
    assert told(of_tail(2.0, 3.0), of_tail(2.5, 2.0), PLAIN) == {}


def test_two_clients_by_hand() -> None:
    # the first prunes itself: 8 * 15 against 8 * sqrt(15^2 + 4^2) of the second
    one, two = of_tail(2.5, 2.0), of_tail(2.0, 2.0)
    sent = METHOD.sent(module="m", trained=one, notes={"ranks": {"m": 1}})
    assert sent.a_RI.tolist() == [[3.0, 0.0], [0.0, 0.0]]
    assert sent.b_OR.tolist() == [[5.0, 0.0], [0.0, 0.0]]
    assert METHOD.sent(module="m", trained=two, notes={}) is two
    assert METHOD.sent(module="other", trained=two, notes={"ranks": {"m": 1}}) is two
    share = 241**0.5 / (15 + 241**0.5)
    state = aggregate(METHOD, [sent, two], [1.0, 9.0], [2]).state
    torch.testing.assert_close(state["A"], torch.tensor([[3.0, 0.0], [0.0, 2.0 * share]]))
    torch.testing.assert_close(state["B"], torch.tensor([[5.0, 0.0], [0.0, 2.0 * share]]))


def used(*told_ranks: int | None, held: int = 4) -> UsedClients:
    return UsedClients(
        round=2,
        clients=[f"c{n}" for n in range(len(told_ranks))],
        weights=[1.0] * len(told_ranks),
        ranks=[{"m": held, "n": 4}] * len(told_ranks),
        notes=[{"ranks": {"m": rank}} if rank else {} for rank in told_ranks],
    )


def test_the_state_holds_the_ranks_of_those_who_pruned_themselves() -> None:
    first = METHOD.next_notes(METHOD.start_notes(), used(2, None, 2))
    assert first == {"ranks": {"c0": {"m": 2}, "c2": {"m": 2}}}
    later = METHOD.next_notes(first, used(1, None, None, held=2))
    assert later == {"ranks": {"c0": {"m": 1}, "c2": {"m": 2}}}
    tier = {"m": 4, "n": 4}
    assert METHOD.assign(notes=later, client="c0", ranks=tier) == {"m": 1, "n": 4}
    assert METHOD.assign(notes=later, client="c1", ranks=tier) is tier
    assert PLAIN.next_notes({}, used(2)) == {}


@pytest.mark.parametrize(("said", "kept"), [(1, 2), (-7, 2), (2, 2), (3, 3), (99, 4)])
def test_a_client_cannot_tell_a_rank_that_it_does_not_reach(said: int, kept: int) -> None:
    assert METHOD.next_notes({}, used(said)) == {"ranks": {"c0": {"m": kept}}}


def test_a_direction_that_all_pruned_can_train_again() -> None:
    trained = [random_factors(seed, out=11, in_=9, rank=4, scale=4.0) for seed in range(2)]
    sent = [METHOD.sent(module="m", trained=own, notes={"ranks": {"m": 2}}) for own in trained]
    state = aggregate(METHOD, sent, [1.0, 2.0], [4]).state
    assert not state["B"][:, 2:].any() and state["A"][2:].any(1).all()
    can_train(METHOD.module_adapter(module="m", state=state, rank=4))


def test_without_pruning_the_bits_are_those_of_the_paper_form() -> None:
    trained = [
        random_factors(seed, out=11, in_=9, rank=r, scale=4.0) for seed, r in ((1, 2), (2, 4))
    ]
    states = [aggregate(m, trained, [1.0, 2.0], [2, 4]).state for m in (PLAIN, METHOD)]
    assert all(torch.equal(states[0][part], states[1][part]) for part in "AB")
    assert PLAIN.local_task(1).tail_penalty == 0
    task = METHOD.local_task(1)
    assert (task.tail_penalty, task.leading(4), task.leading(1)) == (0.25, 2, 1)


def test_ranks_fall_from_round_to_round_in_a_run(tiny: Tiny, tmp_path: Path) -> None:
    options = [
        *("method.name=hetlora", "method.options={pruning: 0.5, penalty: 100.0}", "rounds=3"),
        *("training.learning_rate=0.05", "training.max_steps=2", "evaluation.every=9"),
    ]
    run = RunPaths(root=start(tiny.config, options, tmp_path / "run"))
    own = 0
    for number in (2, 3):
        paths = run.round(number)
        before = AggregateRecord.read(run.round(number - 1).aggregate_record)
        cohort = CohortRecord.read(paths.cohort)
        for client in cohort.clients:
            assert client.ranks == before.assigned.get(client.id)
            own += client.ranks is not None
    ranks = {client.id: cohort.ranks_of(client) for client in cohort.clients}
    for path in run.round(3).updates.glob("*.safetensors"):
        for update in read_update(path):
            for module, rank in ranks[update.record.client].items():
                assert update.shapes[f"{module}|A"][0] == rank
    last = AggregateRecord.read(run.round(3).aggregate_record).assigned
    assert own and last
    assert all(1 <= rank <= 8 for of_client in last.values() for rank in of_client.values())
