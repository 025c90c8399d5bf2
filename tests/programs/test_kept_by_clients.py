"""A run whose clients keep a part of their adapter: FedSA-LoRA, of the method and of the run."""

from pathlib import Path

import pytest
import torch

from fedllm.cli.execution import start
from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors, ModuleShape
from fedllm.methods.local_task import Recipient
from fedllm.methods.pairs.factor_mean import FactorMean
from fedllm.methods.pairs.fedsa import FedSa
from fedllm.process.client_store import ClientStore
from fedllm.process.session import Session
from fedllm.process.state_adapters import received_adapter
from fedllm.programs.evaluate import evaluate_state
from fedllm.server.export import export_adapter, export_model, open_state
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import CohortRecord, PreparedRecord, RunRecord
from fedllm.storage.tensors import TensorFile
from fedllm.storage.updates import read_update
from tests.lora.adapters import random_factors
from tests.methods.aggregating import aggregate, can_train
from tests.tiny import Tiny

METHOD = FedSa(seed=3, alpha=16.0)
NOBODY = Recipient(client="a", round=1)
OPTIONS = [
    *("method.name=fedsa", "clients.tiers.large.ranks=2", "clients.cohort.count=3"),
    *("training.max_steps=2", "training.learning_rate=0.05", "evaluation.every=9", "rounds=3"),
]


def test_two_clients_by_hand() -> None:
    # A: (1 (4, 0) + 3 (0, 8)) / 4 = (1, 6); B of the state stays what it was
    trained = [
        Factors(a_RI=torch.tensor([a]), b_OR=torch.tensor([[b], [b]]), scale=16.0)
        for a, b in (((4.0, 0.0), 5.0), ((0.0, 8.0), 7.0))
    ]
    sent = [METHOD.sent(module="m", trained=own, notes={}) for own in trained]
    assert all(not own.b_OR.any() for own in sent)
    begun = METHOD.start_module(module="m", shape=ModuleShape(out=2, in_=2), rank=1)
    state = aggregate(METHOD, sent, [1.0, 3.0], [1], before=begun, clients="ab").state
    assert state["A"].tolist() == [[1.0, 6.0]]
    assert not state["B"].any()
    to = Recipient(client="b", round=2, kept=METHOD.kept(module="m", trained=trained[1]))
    back = METHOD.hand_out(module="m", state=state, rank=1, to=to)
    assert back.a_RI.tolist() == [[1.0, 6.0]] and back.b_OR.tolist() == [[7.0], [7.0]]
    new = METHOD.hand_out(module="m", state=state, rank=1, to=NOBODY)
    assert not new.b_OR.any()
    can_train(new)


def test_a_is_that_of_the_factor_mean_in_any_order_and_grouping() -> None:
    trained = [random_factors(seed, out=11, in_=9, rank=3, scale=2.0) for seed in range(4)]
    weights = [1.0, 5.0, 2.0, 4.0]
    mean = aggregate(FactorMean(seed=3, alpha=16.0), trained, weights, [3]).state
    sent = [METHOD.sent(module="m", trained=own, notes={}) for own in trained]
    for clients, amounts, size in ((sent, weights, 2), (sent[::-1], weights[::-1], 3)):
        found = aggregate(METHOD, clients, amounts, [3], block_clients=size, clients="abcd").state
        torch.testing.assert_close(found["A"], mean["A"], rtol=1e-6, atol=1e-6)
    assert "set all to 2" in str(METHOD.refuse([{"m": 2}, {"m": 4}]))


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    root = tmp_path_factory.mktemp("fedsa") / "run"
    return RunPaths(root=start(tiny.config, OPTIONS, root))


def trained_clients(run: RunPaths) -> dict[str, list[int]]:
    """Return client -> the rounds that it trained in."""
    found: dict[str, list[int]] = {}
    for number in (1, 2, 3):
        for client in CohortRecord.read(run.round(number).cohort).clients:
            found.setdefault(client.id, []).append(number)
    return found


def test_the_preparation_tells_what_each_client_keeps(run: RunPaths) -> None:
    stores = [path.stat().st_size for path in run.client_stores.rglob("*.safetensors")]
    for kept in PreparedRecord.read(run.prepared).kept_bytes.values():
        assert kept < min(stores) <= max(stores) < kept + 4000


def test_no_b_leaves_its_client(run: RunPaths) -> None:
    seen = 0
    for path in run.round(3).updates.glob("*.safetensors"):
        file = TensorFile(path)
        for update in read_update(path):
            seen += 1
            assert all(a > 0.0 and b == 0.0 for a, b in update.record.norms.values())
        assert not any(file.get(name).any() for name in file.names if name.endswith("|B"))
    assert seen == 3


def test_every_client_goes_on_with_its_own_b(run: RunPaths) -> None:
    store = ClientStore(paths=run, run=RunRecord.read(run.run))
    state = open_state(run, None)
    trained = trained_clients(run)
    assert max(map(len, trained.values())) > 1
    found = []
    for client in trained:
        kept = store.read(client, 4)
        to = Recipient(client=client, round=4)
        adapter = received_adapter(state.method, state.file, state.ranks, to, kept)
        for module, own in adapter.items():
            assert own.b_OR.any()
            assert torch.equal(own.b_OR, kept.tensors[module]["B"])
            assert torch.equal(own.a_RI, state.file.module(module)["A"])
        found.append(next(iter(adapter.values())).b_OR)
    assert not any(torch.equal(found[0], other) for other in found[1:])


def test_what_no_kept_state_needs_is_pruned(run: RunPaths) -> None:
    # with keep_states 2 the states of rounds 2 and 3 are kept, and that of round 0
    for client, numbers in trained_clients(run).items():
        ((_, files),) = run.client_store_files(client).items()
        needed = {max((n for n in numbers if n <= state), default=0) for state in (2, 3)}
        assert set(files) == needed - {0}


def test_a_client_is_scored_with_its_own_b(run: RunPaths) -> None:
    session = Session()
    first = {c.client: c for c in evaluate_state(run, 0, None, session).clients}
    record = evaluate_state(run, 3, None, session)
    trained = trained_clients(run)
    for scores in record.clients:
        assert scores.as_deployed == scores.at_largest_rank
        # without a B of its own a client has the base
        before = first[scores.client].as_deployed.loss
        changed = scores.as_deployed.loss != pytest.approx(before, abs=1e-6)
        assert changed == (scores.client in trained)
    assert any(scores.client not in trained for scores in record.clients)


def test_clients_keep_json_beside_their_tensors(tiny: Tiny, tmp_path: Path) -> None:
    method = "method.name=tests.programs.counting:Counting"
    run = RunPaths(root=start(tiny.config, [*OPTIONS, method], tmp_path / "run"))
    record, state = RunRecord.read(run.run), open_state(run, None)
    store = ClientStore(paths=run, run=record)
    counts = {client: len(rounds) for client, rounds in trained_clients(run).items()}
    assert 2 in counts.values()
    for client, count in counts.items():
        kept = store.read(client, 4)
        assert kept.notes == {"rounds": count, "modules": len(state.ranks)}
        to = Recipient(client=client, round=4)
        adapter = received_adapter(state.method, state.file, state.ranks, to, kept)
        assert all(bool(own.b_OR.any()) == (count != 2) for own in adapter.values())


def test_there_is_no_adapter_for_all(run: RunPaths, tmp_path: Path) -> None:
    state = open_state(run, None)
    for export in (export_adapter, export_model):
        with pytest.raises(AdapterError, match="fedsa: every client keeps a part"):
            export(state, tmp_path / "out")
    assert not (tmp_path / "out").exists()
