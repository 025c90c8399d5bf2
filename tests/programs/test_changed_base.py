"""A run whose method changes the base: workers, evaluation and export have the change."""

import shutil
from pathlib import Path

import pytest
import torch

from fedllm.cli.execution import resume, start
from fedllm.config.loading import load_config
from fedllm.errors import AdapterError, ConfigError, RunDirectoryError
from fedllm.lora.factors import Factors, base_delta_of, delta, terms_of
from fedllm.model.base import load_base
from fedllm.process.server_state import read_state
from fedllm.process.session import Session
from fedllm.programs.evaluate import evaluate_state
from fedllm.programs.prepare import prepare
from fedllm.reporting.status.verification import verify_run
from fedllm.server.export import export_adapter, export_model, open_state
from fedllm.storage.paths import CachePaths, RunPaths
from fedllm.storage.records import AggregateRecord, CohortRecord, PreparedRecord, RunRecord
from fedllm.storage.updates import Origin, read_update
from tests.tiny import Tiny

OPTIONS = ["method.name=fedex", "clients.tiers.large.ranks=2", "training.max_steps=2"]


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    options = [*OPTIONS, "training.learning_rate=0.05", "clients.cohort.count=3"]
    root = tmp_path_factory.mktemp("changed") / "run"
    return RunPaths(root=start(tiny.config, [*options, "evaluation.every=9"], root))


def test_every_update_names_the_change_that_it_was_trained_on(run: RunPaths) -> None:
    changes = [AggregateRecord.read(run.round(n).aggregate_record).base_change for n in range(3)]
    # before training there is none
    assert changes[0] is None and len(set(changes)) == 3
    for number in (1, 2):
        cohort = CohortRecord.read(run.round(number).cohort)
        origin = Origin.of(RunRecord.read(run.run), cohort)
        assert cohort.base_change == changes[number - 1]
        for path in run.round(number).updates.glob("*.safetensors"):
            for update in read_update(path):
                assert update.record.base_change == cohort.base_change
                assert origin.problem(update.record) is None
                other = update.record.model_copy(update={"base_change": changes[number]})
                problem = origin.problem(other)
                assert problem is not None and "change of the base" in problem


def test_an_exported_model_has_adapter_and_change(run: RunPaths, tmp_path: Path) -> None:
    base = load_base(
        Path(PreparedRecord.read(run.prepared).model_path), dtype="float32", device="cpu"
    )
    forms = []
    for number in (1, 2):
        state, out = open_state(run, number), tmp_path / f"merged-{number}"
        export_model(state, out)
        merged = load_base(out, dtype="float32", device="cpu")
        for module, rank in state.ranks.items():
            parts = state.file.module(module)
            adapter = state.method.module_adapter(module=module, state=parts, rank=rank)
            before, after = (m.model.get_parameter(f"{module}.weight") for m in (base, merged))
            change = state.method.base_delta(parts)
            assert change is not None
            in_base = base_delta_of(change)
            assert in_base.any()
            added = delta(adapter) + in_base
            torch.testing.assert_close(
                after.double(), before.double() + added, atol=1e-6, rtol=1e-6
            )
            forms.append((number, tuple(type(term) for term in terms_of(change))))
    # the factors of the rounds; one matrix where a round has many columns
    assert {form for number, form in forms if number == 1} == {(Factors,), (torch.Tensor,)}
    assert {form for number, form in forms if number == 2} == {(Factors, Factors), (torch.Tensor,)}
    with pytest.raises(AdapterError, match=r"changes the base too.*--merge"):
        export_adapter(state, tmp_path / "adapter")


def test_a_state_needs_no_folder_but_its_own(run: RunPaths, tmp_path: Path) -> None:
    first, second = (AggregateRecord.read(run.round(n).aggregate_record) for n in (1, 2))
    assert second.earlier == {1: first.sha256} and not first.earlier
    assert run.round(2).earlier_state(1).samefile(run.round(1).global_state)
    # a copy without hard links, of which the earlier state was removed
    copied = RunPaths(root=tmp_path / "copy")
    shutil.copytree(run.root, copied.root)
    copied.round(1).global_state.unlink()
    with read_state(run.round(2)) as whole, read_state(copied.round(2)) as state:
        assert state.names == whole.names and len(state.terms) > 0
        assert all(torch.equal(state.get(name), whole.get(name)) for name in whole.names)
    link = copied.round(2).earlier_state(1)
    link.write_bytes(link.read_bytes()[:-4] + b"junk")
    with pytest.raises(RunDirectoryError, match=r"earlier/0001.*: damaged.*restore it"):
        read_state(copied.round(2))
    assert [found.path for found in verify_run(copied).findings] == [link]
    link.unlink()
    with pytest.raises(RunDirectoryError, match=r"earlier/0001.*: missing.*restore it"):
        read_state(copied.round(2))
    with pytest.raises(RunDirectoryError, match=r"earlier/0001.*: missing.*restore it"):
        resume(copied.root, [])
    assert [found.path for found in verify_run(copied).findings] == [link]


def test_an_evaluation_has_the_change_and_takes_it_off(
    run: RunPaths, tmp_path: Path, tiny: Tiny
) -> None:
    session = Session()
    scored = evaluate_state(run, 2, None, session)
    merged = tmp_path / "merged"
    export_model(open_state(run, None), merged)
    options = [*OPTIONS, f"model.path={merged}", "rounds=1", "clients.cohort.count=1"]
    alone = RunPaths(root=start(tiny.config, options, tmp_path / "alone"))
    # before training a run on the merged model has that model
    base = evaluate_state(alone, 0, None, Session())
    losses = [{c.client: c.as_deployed.loss for c in record.clients} for record in (scored, base)]
    common = losses[0].keys() & losses[1].keys()
    assert common
    for client in common:
        assert losses[0][client] == pytest.approx(losses[1][client], abs=1e-4)
    # the base of the session is the base again
    config, prepared = session.config(run), PreparedRecord.read(run.prepared)
    slots = session.slots(config, prepared)
    fresh = load_base(Path(prepared.model_path), dtype="float32", device="cpu")
    for module in prepared.modules:
        weight = slots.model.get_parameter(f"{module}.base_layer.weight")
        assert torch.equal(weight, fresh.model.get_parameter(f"{module}.weight"))


def test_a_base_that_is_divided_cannot_change(tiny: Tiny) -> None:
    pytest.importorskip("deepspeed")
    options = [*OPTIONS, "training.engine=zero", "training.processes=2", "training.zero.stage=3"]
    with pytest.raises(ConfigError, match=r"^training.zero.stage: got 3.*fedex changes the base"):
        prepare(load_config(tiny.config, options), CachePaths(root=tiny.cache))
