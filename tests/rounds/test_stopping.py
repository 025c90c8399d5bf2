"""Early stopping: dev clients decide, by round number, and the decision outlives any restart."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config.loading import read_config
from fedllm.errors import ConfigError, FedllmError, StorageFull
from fedllm.rounds.coordinate import advance_while_possible
from fedllm.rounds.dispatch.in_flight import is_done
from fedllm.rounds.ending.stopping import stop_after
from fedllm.rounds.opening import resumed_config
from fedllm.rounds.retention import best_round
from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.records import EvaluationRecord, RunRecord, StopRecord
from tests.rounds.simulation import Simulation, complete, config_of, opened

# dev loss of rounds 0 to 7; the others' loss always falls
DEV = (9.0, 5.0, 4.0, 4.5, 4.2, 3.0, 2.0, 1.0)
STOPPING = {"rounds": 7, "stopping__patience": 2, "evaluation__clients": 1}


class Scored(Simulation):
    """Simulation whose dev clients have the losses of `DEV`."""

    def evaluate(self, paths: RoundPaths) -> None:
        super().evaluate(paths)
        record = EvaluationRecord.read(paths.evaluation_record)
        run = read_config(paths.run.config)
        clients = []
        for client in record.clients:
            loss = DEV[paths.number] if client.group == "dev" else 1.0 / (1 + paths.number)
            scores = client.as_deployed.model_copy(update={"loss": loss})
            clients.append(client.model_copy(update={"as_deployed": scores}))
        whole = paths.number in {0, run.rounds}
        changed = record.model_copy(update={"clients": clients, "complete": whole})
        changed.publish(paths.evaluation_record)


@pytest.mark.parametrize(
    ("losses", "patience", "gain", "last"),
    [
        (DEV, 1, 0.0, 3),
        (DEV, 2, 0.0, 4),
        (DEV, 3, 0.0, None),
        (DEV, 1, 2.0, 2),
        ((1.0, 1.0, 1.0), 2, 0.0, 2),
        ((1.0, float("nan"), float("nan")), 2, 0.0, 2),
    ],
)
def test_a_run_stops_after_so_many_evaluations_without_a_lower_loss(
    losses: tuple[float, ...], patience: int, gain: float, last: int | None
) -> None:
    assert stop_after(dict(enumerate(losses)), patience, gain) == last


def test_the_best_round_is_the_one_that_the_decision_found(tmp_path: Path) -> None:
    """The last round is scored again on all rows, so as many rounds have one set as the other."""
    simulation = Scored()
    keys = {**STOPPING, "stopping__patience": 1, "rounds": 4}
    complete(tmp_path / "run", simulation, config_of(**keys))
    paths = RunPaths(root=tmp_path / "run")
    config = read_config(paths.config)
    assert config.rounds == 3 and best_round(paths, config) == {2}
    assert paths.round(2).global_state.exists()


@given(st.lists(st.floats(0, 10), min_size=1), st.integers(1, 4))
def test_later_evaluations_never_change_the_decision(losses: list[float], patience: int) -> None:
    whole = stop_after(dict(enumerate(losses)), patience, 0.0)
    if whole is not None:
        assert stop_after(dict(enumerate(losses[: whole + 1])), patience, 0.0) == whole
        assert stop_after(dict(enumerate(losses[:whole])), patience, 0.0) is None


def test_a_run_ends_where_dev_clients_say_and_scores_its_last_round_completely(
    tmp_path: Path,
) -> None:
    simulation = Scored()
    lines = list[str]()
    simulation.log = lines.append
    complete(tmp_path / "run", simulation, config_of(**STOPPING))
    paths = RunPaths(root=tmp_path / "run")
    assert max(number for number, _ in simulation.trained) == 4
    assert sum("stopped after round 4" in line for line in lines) == 1
    assert StopRecord.read(paths.stop) == StopRecord(round=4, best_round=2, patience=2)
    config = read_config(paths.config)
    assert config.rounds == 4 and is_done(paths, config)
    assert EvaluationRecord.read(paths.round(4).evaluation_record).complete
    assert not paths.round(5).root.exists()
    assert best_round(paths, config) == {2}
    (change,) = RunRecord.read(paths.run).changes
    assert (change.key, change.before, change.after) == ("rounds", 7, 4)


def test_a_stopped_run_stays_stopped_until_its_patience_changes(tmp_path: Path) -> None:
    simulation, lines = Scored(), list[str]()
    root = tmp_path / "run"
    complete(root, simulation, config_of(**STOPPING))
    trained = len(simulation.trained)
    simulation.log = lines.append
    # the same file again still asks for seven rounds
    complete(root, simulation, config_of(**STOPPING))
    assert len(simulation.trained) == trained
    assert any("was stopped after round 4; to go on: --set" in line for line in lines)
    more = resumed_config(root, ["stopping.patience=null", "rounds=7"])
    complete(root, simulation, more)
    assert max(number for number, _ in simulation.trained) == 7


def test_a_kill_anywhere_stops_after_the_same_round(tmp_path: Path) -> None:
    simulation, count = Scored(), 0

    def stop(_program: str, _target: Path) -> "int | None":
        nonlocal count
        count += 1
        if count % 2:
            raise StorageFull("no space left")
        return None

    simulation.before = stop
    for _ in range(60):
        try:
            advance_while_possible(opened(tmp_path / "run", simulation, config_of(**STOPPING)))
            break
        except FedllmError:
            continue
    paths = RunPaths(root=tmp_path / "run")
    assert StopRecord.read(paths.stop).round == 4
    assert is_done(paths, read_config(paths.config))


def test_patience_needs_dev_clients_and_evaluations() -> None:
    with pytest.raises(ConfigError, match=r"stopping\.patience: needs dev clients"):
        config_of(clients__dev=0, stopping__patience=1)
    with pytest.raises(ConfigError, match=r"needs evaluations, but evaluation\.every is 0"):
        config_of(evaluation__every=0, stopping__patience=1)
