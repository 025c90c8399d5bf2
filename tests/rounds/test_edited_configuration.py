"""`config.yaml` of a run directory, edited by hand."""

import json
from pathlib import Path

import pytest

from fedllm.errors import RunDirectoryError, UserError
from fedllm.process.session import Session
from fedllm.rounds.coordinate import advance_while_possible
from fedllm.rounds.opening import resumed_config
from fedllm.server.aggregate import aggregate_round
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import RunRecord
from tests.rounds.simulation import Simulation, complete, config_of, opened, states


def edit(paths: RunPaths, before: str, after: str) -> None:
    """Replace a line of `config.yaml`, as an editor does."""
    text = paths.config.read_text()
    assert before in text
    paths.config.write_text(text.replace(before, after))


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """Return a run of two rounds."""
    complete(tmp_path / "run", Simulation())
    return RunPaths(root=tmp_path / "run")


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("learning_rate: 0.0", "learning_rate: 0.5 #", "training.learning_rate"),
        ("seed: 3", "seed: 4", r"seed \(3 in the run, now 4\)"),
        ("dropout: 0.0", "dropout: 0.1", "lora.dropout"),
        ("count: 4", "count: 3", "clients.cohort.count"),
        ("rounds: 2", "rounds: 1", "rounds can only grow"),
    ],
)
def test_a_result_key_is_refused_by_name_and_nothing_changes(
    run: RunPaths, before: str, after: str, named: str
) -> None:
    edit(run, before, after)
    content = {path: path.read_bytes() for path in (run.run, run.config)}
    with pytest.raises(UserError, match=named):
        opened(run.root, Simulation(), resumed_config(run.root, []))
    assert {path: path.read_bytes() for path in content} == content


def test_an_edited_key_is_to_be_put_back_and_another_configuration_is_another_run(
    run: RunPaths,
) -> None:
    other = config_of(seed=4)
    with pytest.raises(RunDirectoryError, match="start another run: fedllm run CONFIG --run-dir"):
        opened(run.root, Simulation(), other)
    edit(run, "seed: 3", "seed: 4")
    with pytest.raises(RunDirectoryError, match=r"config\.yaml: .*put them back"):
        opened(run.root, Simulation(), resumed_config(run.root, []))


def test_a_coordinator_at_work_refuses_it(tmp_path: Path) -> None:
    paths = RunPaths(root=tmp_path / "run")
    simulation = Simulation()

    def edit_once(program: str, _target: Path) -> None:
        if program == "aggregate" and "alpha: 16" in paths.config.read_text():
            edit(paths, "alpha: 16", "alpha: 17")

    simulation.before = edit_once
    work = opened(paths.root, simulation)
    with pytest.raises(RunDirectoryError, match=r"lora\.alpha \(16.0 in the run, now 17.0\)"):
        while advance_while_possible(work) is not None:
            pass
    assert not paths.round(2).cohort.exists()


def test_every_job_refuses_it(run: RunPaths) -> None:
    edit(run, "learning_rate: 0.0", "learning_rate: 0.5 #")
    for job in (lambda: Session().config(run), lambda: aggregate_round(run.round(1))):
        with pytest.raises(RunDirectoryError, match=r"training\.learning_rate"):
            job()


def test_an_execution_key_is_recorded_as_if_it_were_set_on_resume(run: RunPaths) -> None:
    edit(run, "max_attempts: 3", "max_attempts: 7")
    complete(run.root, Simulation(), resumed_config(run.root, []))
    (change,) = RunRecord.read(run.run).changes
    assert (change.key, change.before, change.after) == ("scheduler.max_attempts", 3, 7)


def test_the_configuration_given_again_restores_the_file(run: RunPaths) -> None:
    edit(run, "learning_rate: 0.0", "learning_rate: 0.5 #")
    complete(run.root, Simulation(), config_of(rounds=3))
    complete(run.root.parent / "direct", Simulation(), config_of(rounds=3))
    assert states(run.root) == states(run.root.parent / "direct")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("emptied", "empty; `fedllm run CONFIG --run-dir .*makes it again"),
        ("removed", "not a run d"),
    ],
)
def test_a_lost_file_is_made_again_from_the_configuration_as_it_was_given(
    run: RunPaths, lost: str, said: str
) -> None:
    content = run.config.read_bytes()
    run.config.write_bytes(b"") if lost == "emptied" else run.config.unlink()
    with pytest.raises(UserError, match=said):
        resumed_config(run.root, [])
    complete(run.root, Simulation(), config_of())
    assert run.config.read_bytes() == content


def test_a_run_of_an_earlier_version_goes_on_and_is_protected_from_then_on(run: RunPaths) -> None:
    record = json.loads(run.run.read_bytes())
    del record["config"]
    run.run.write_text(json.dumps(record))
    complete(run.root, Simulation(), resumed_config(run.root, ["rounds=3"]))
    edit(run, "seed: 3", "seed: 4")
    with pytest.raises(RunDirectoryError, match="seed"):
        opened(run.root, Simulation(), resumed_config(run.root, []))
