"""Advance: the course of a run, its failures and its recovery, without a language model."""

import json
import shutil
from pathlib import Path

import pytest

from fedllm.errors import FedllmError, RunDirectoryError, RunFailed, StorageFull, UserError
from fedllm.reporting.status.status import run_status
from fedllm.rounds.coordinate import advance_while_possible, coordinate
from fedllm.rounds.opening import open_run, resumed_config
from fedllm.scheduling.inline import InlineScheduler
from fedllm.storage.paths import AttemptPaths, RunPaths
from fedllm.storage.records import (
    AggregateRecord,
    CollectionRecord,
    ErrorRecord,
    RoundRecord,
    RunRecord,
    SubmissionRecord,
)
from tests.rounds.simulation import Simulation, complete, config_of, opened, states


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """States of an undisturbed run."""
    root = tmp_path_factory.mktemp("undisturbed") / "run"
    complete(root, Simulation())
    return states(root)


def test_a_run_draws_trains_collects_aggregates_and_evaluates_every_round(tmp_path: Path) -> None:
    simulation = Simulation()
    complete(tmp_path / "run", simulation)
    paths = RunPaths(root=tmp_path / "run")
    for number in (1, 2):
        collection = CollectionRecord.read(paths.round(number).collection)
        trained = [client for round_, client in simulation.trained if round_ == number]
        assert sorted(trained) == [update.client for update in collection.updates]
        assert RoundRecord.read(paths.round(number).record).clients == 4
    assert len(paths.metrics.read_text().splitlines()) == 3
    assert run_status(paths).state == "done"


def test_every_round_records_how_its_update_spreads_and_overlaps_the_one_before(
    tmp_path: Path,
) -> None:
    root = tmp_path / "run"
    complete(root, Simulation())
    paths = RunPaths(root=root)
    first, second = (AggregateRecord.read(paths.round(n).aggregate_record) for n in (1, 2))
    assert all(module.overlap is None for module in first.modules.values())
    for record in (first, second):
        for module in record.modules.values():
            assert module.ranks[0].rank == 2
            assert module.beyond_smallest_rank == pytest.approx(1 - module.ranks[0].energy_kept)
            # more than two directions of random factors, and at most the stack's
            assert 2 < module.effective_rank <= module.stacked_rank
            left_out = module.total_energy - sum(s**2 for s in module.spectrum)
            assert module.residual_energy == pytest.approx(left_out, rel=1e-6)
    assert all(0 < module.overlap < 1 for module in second.modules.values() if module.overlap)
    assert all(module.overlap is not None for module in second.modules.values())
    rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    assert [row.get("overlap") is None for row in rows] == [True, True, False]
    assert rows[2]["energy_kept_rank_2"] == pytest.approx(1 - rows[2]["beyond_smallest_rank"])


def test_a_client_without_training_rows_is_never_drawn(tmp_path: Path) -> None:
    simulation = Simulation()
    complete(tmp_path / "run", simulation, config_of(rounds=6))
    assert "client/9 é" not in {client for _, client in simulation.trained}


def test_advancing_a_run_that_is_done_changes_nothing(tmp_path: Path) -> None:
    complete(tmp_path / "run", Simulation())
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/rounds").rglob("*") if p.is_file()}
    again = Simulation()
    assert advance_while_possible(opened(tmp_path / "run", again)) is None
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/rounds").rglob("*") if p.is_file()}
    assert before == after
    assert not again.trained


def test_bundling_does_not_change_the_result(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    complete(tmp_path / "run", Simulation(), config_of(scheduler__clients_per_bundle=1))
    assert states(tmp_path / "run") == undisturbed


def test_more_rounds_and_execution_keys_may_change_on_resume(tmp_path: Path) -> None:
    root = tmp_path / "run"
    complete(root, Simulation(), config_of(rounds=1))
    complete(root, Simulation(), resumed_config(root, ["rounds=2", "scheduler.max_attempts=5"]))
    changed = {change.key for change in RunRecord.read(RunPaths(root=root).run).changes}
    assert changed == {"rounds", "scheduler.max_attempts"}


def test_result_keys_are_frozen_and_named(tmp_path: Path) -> None:
    root = tmp_path / "run"
    complete(root, Simulation(), config_of(rounds=1))
    with pytest.raises(RunDirectoryError, match=r"lora\.alpha .*training\.learning_rate"):
        changed = resumed_config(root, ["training.learning_rate=0.5", "lora.alpha=3"])
        opened(root, Simulation(), changed)


def test_result_keys_may_change_before_the_first_round(tmp_path: Path) -> None:
    root = tmp_path / "run"
    simulation = Simulation()
    simulation.before = lambda program, _target: 1 if program == "aggregate" else None
    with pytest.raises(RunFailed):
        complete(root, simulation, config_of(seed=1, scheduler__max_attempts=1))
    complete(root, Simulation(), config_of(seed=3))
    complete(tmp_path / "direct", Simulation(), config_of(seed=3))
    assert states(root) == states(tmp_path / "direct")


def test_fewer_rounds_are_refused(tmp_path: Path) -> None:
    complete(tmp_path / "run", Simulation())
    with pytest.raises(RunDirectoryError, match="rounds can only grow"):
        opened(tmp_path / "run", Simulation(), config_of(rounds=1))


def test_a_folder_that_is_not_a_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirectoryError, match="not a run"):
        opened(tmp_path, Simulation())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_diverged_client_fails_the_round_and_is_named(tmp_path: Path) -> None:
    probe = Simulation()
    complete(tmp_path / "probe", probe)
    client = probe.trained[0][1]
    with pytest.raises(RunFailed, match=f"3 valid updates of 4 clients.*{client}: non-finite"):
        complete(tmp_path / "run", Simulation(diverging=[client]))


def test_a_quorum_lets_the_round_go_on_without_a_diverged_client(tmp_path: Path) -> None:
    probe = Simulation()
    complete(tmp_path / "probe", probe)
    client = probe.trained[0][1]
    complete(tmp_path / "run", Simulation(diverging=[client]), config_of(clients__quorum=0.75))
    collection = CollectionRecord.read(RunPaths(root=tmp_path / "run").round(1).collection)
    assert list(collection.failed) == [client]
    assert len(collection.updates) == 3


def poisoned(folder: Path, count: int = 1) -> tuple[Simulation, list[str]]:
    """Make clients of the first round send values that are not finite, as valid updates."""
    probe = Simulation()
    complete(folder / "probe", probe, config_of(rounds=1))
    clients = sorted(client for _, client in probe.trained)[:count]
    simulation = Simulation()
    simulation.poisoned = set(clients)
    return simulation, clients


@pytest.mark.parametrize("count", [1, 2])
def test_a_client_whose_values_are_not_finite_is_left_out_where_the_quorum_allows(
    tmp_path: Path, count: int
) -> None:
    simulation, clients = poisoned(tmp_path, count)
    said = list[str]()
    simulation.log = said.append
    config = config_of(clients__quorum=2, rounds=1, aggregation__block_clients=1)
    complete(tmp_path / "run", simulation, config)
    assert len(simulation.trained) == 4  # nobody trained again
    collection = CollectionRecord.read(RunPaths(root=tmp_path / "run").round(1).collection)
    assert list(collection.failed) == clients
    assert collection.replaces == count
    assert sum(mix.used for mix in collection.tiers.values()) == 4 - count
    for client in clients:
        reason = f"client {client}: layer.up_proj A holds nan at [0, 1]"
        assert reason in collection.failed[client]
        assert any(f"{client} is left out: " in line and reason in line for line in said)
    without = Simulation(diverging=clients)
    complete(tmp_path / "other", without, config)
    assert states(tmp_path / "run")["0001"] == states(tmp_path / "other")["0001"]


def test_clients_of_one_block_that_are_not_finite_are_left_out_together(tmp_path: Path) -> None:
    simulation, clients = poisoned(tmp_path, 2)
    complete(tmp_path / "run", simulation, config_of(clients__quorum=2, rounds=1))
    collection = CollectionRecord.read(RunPaths(root=tmp_path / "run").round(1).collection)
    assert list(collection.failed) == clients
    assert collection.replaces == 1


def test_values_that_are_not_finite_end_a_run_below_its_quorum_however_often_it_is_resumed(
    tmp_path: Path,
) -> None:
    simulation, (client,) = poisoned(tmp_path)
    for _ in range(2):
        words = (
            f"3 valid updates of 4 clients.*quorum needs 4; {client}: .*layer.up_proj A holds nan"
        )
        with pytest.raises(RunFailed, match=words):
            complete(tmp_path / "run", simulation)


@pytest.mark.parametrize("unattended", [True, False])
@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_coordinator_killed_while_it_leaves_a_client_out_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, unattended: bool
) -> None:
    simulation, clients = poisoned(tmp_path)
    config = config_of(clients__quorum=3, rounds=1)
    rename, moved = Path.rename, list[str]()

    def killed(path: Path, target: Path) -> Path:
        if ".replaced-" in target.name:
            moved.append(path.name)
            if len(moved) == killed_at:
                raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            complete(tmp_path / "run", simulation, config)
    run = open_run(
        tmp_path / "run",
        config,
        make_scheduler=lambda _paths, _config: InlineScheduler(execute=simulation),
        say=print,
        unattended=unattended,
    )
    coordinate(run)
    collection = CollectionRecord.read(run.paths.round(1).collection)
    assert list(collection.failed) == clients
    assert len(collection.updates) == 3


def test_a_client_that_was_left_out_stays_out_when_an_update_is_damaged_later(
    tmp_path: Path,
) -> None:
    simulation, clients = poisoned(tmp_path)
    aggregations = 0

    def damage_at_the_second(program: str, target: Path) -> None:
        nonlocal aggregations
        aggregations += program == "aggregate" and target.name == "0001"
        if aggregations == 2:
            max(target.glob("updates/*.safetensors")).write_bytes(b"")
            simulation.before = lambda _program, _target: None

    simulation.before = damage_at_the_second
    complete(tmp_path / "run", simulation, config_of(clients__quorum=3, rounds=1))
    collection = CollectionRecord.read(RunPaths(root=tmp_path / "run").round(1).collection)
    assert (collection.replaces, list(collection.failed)) == (2, clients)
    assert len(collection.updates) == 3


@pytest.mark.parametrize("damage", ["truncated", "altered", "foreign", "empty"])
def test_a_damaged_update_is_named_and_its_clients_train_again(
    tmp_path: Path, undisturbed: dict[str, str], damage: str
) -> None:
    root, said = tmp_path / "run", list[str]()
    simulation = Simulation(log=said.append)

    def damage_one(program: str, target: Path) -> None:
        victim = next(iter(sorted(target.glob("updates/01-000-00.safetensors"))), None)
        if program == "aggregate" and victim:
            content = victim.read_bytes()
            altered = content[:-1] + bytes([content[-1] ^ 1])
            foreign = sorted(target.glob("updates/01-001-00.safetensors"))[0].read_bytes()
            changed = {"truncated": content[:-7], "altered": altered, "foreign": foreign}
            victim.write_bytes(changed.get(damage, b""))
            simulation.before = lambda _program, _target: None

    simulation.before = damage_one
    complete(root, simulation)
    assert states(root) == undisturbed
    assert any("01-000-00.safetensors" in line for line in said)
    trained = [client for number, client in simulation.trained if number == 1]
    assert len(trained) == 6


def test_tensors_altered_before_they_are_collected_are_found_by_the_aggregation(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    said, altered = list[str](), set[Path]()

    class Altering(Simulation):
        def work(self, attempt: AttemptPaths, worker_class: str, task: str) -> None:
            super().work(attempt, worker_class, task)
            sent = attempt.round.updates / "01-000-00.safetensors"
            if sent.exists() and sent not in altered:
                altered.add(sent)
                content = sent.read_bytes()
                sent.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    simulation = Altering(log=said.append)
    complete(tmp_path / "run", simulation)
    assert states(tmp_path / "run") == undisturbed
    lines = [line for line in said if "its clients train again" in line]
    assert len(lines) == 2  # once a round
    assert all("the checksum of" in line for line in lines)
    # the scan accepted them
    assert sum("collected 4 of 4 clients" in line for line in said) == 4


def test_a_coordinator_killed_while_it_sets_a_collection_aside_goes_on(
    tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = Simulation()

    def damage_one(program: str, target: Path) -> None:
        victim = next(iter(sorted(target.glob("updates/01-000-00.safetensors"))), None)
        if program == "aggregate" and victim:
            victim.write_bytes(b"")
            simulation.before = lambda _program, _target: None

    simulation.before = damage_one
    rename, moved = Path.rename, list[str]()

    def killed_after_the_second(path: Path, target: Path) -> Path:
        if ".replaced-" in target.name:
            moved.append(path.name)
        if moved and len(moved) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as killed:
        killed.setattr(Path, "rename", killed_after_the_second)
        with pytest.raises(KeyboardInterrupt):
            complete(tmp_path / "run", simulation)
    assert len(moved) == 2
    # not by a person: earlier failures would still count
    run = open_run(
        tmp_path / "run",
        config_of(),
        make_scheduler=lambda _paths, _config: InlineScheduler(execute=simulation),
        say=print,
        unattended=True,
    )
    coordinate(run)
    assert states(tmp_path / "run") == undisturbed


def test_a_worker_that_publishes_nothing_is_tried_again(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    simulation = Simulation()
    attempts: list[Path] = []

    def fail_twice(program: str, target: Path) -> int | None:
        if program == "client" and len(attempts) < 2:
            attempts.append(target)
            return 1
        return None

    simulation.before = fail_twice
    complete(tmp_path / "run", simulation)
    assert [path.name for path in attempts] == ["01", "02"]
    assert states(tmp_path / "run") == undisturbed


def test_whoever_goes_on_with_the_preparation_says_so(tmp_path: Path) -> None:
    ended = Simulation()
    ended.before = lambda program, _target: 1 if program == "prepare" else None
    with pytest.raises(RunFailed, match="prepare job ended early"):
        complete(tmp_path / "run", ended)
    said: list[str] = []
    complete(tmp_path / "run", Simulation(log=said.append))
    assert said[0].startswith("prepare: model ")
    assert sum(line.startswith("prepare: model ") for line in said) == 1


def test_attempts_without_progress_are_bounded(tmp_path: Path) -> None:
    simulation = Simulation()
    simulation.before = lambda program, _target: 1 if program == "client" else None
    with pytest.raises(
        RunFailed, match=r"no update from .* after 3 attempts \(inline-\d+: exit 1\); see"
    ):
        complete(tmp_path / "run", simulation)
    complete(tmp_path / "run", Simulation())


@pytest.mark.parametrize(("code", "kind"), [(2, UserError), (3, StorageFull)])
def test_the_error_of_a_task_ends_the_run_with_its_exit_code(
    tmp_path: Path, code: int, kind: type[FedllmError]
) -> None:
    simulation = Simulation()

    def refuse(program: str, target: Path) -> int | None:
        if program != "client":
            return None
        error = ErrorRecord(kind="x", message="the reason", exit_code=code, log="worker.log")
        error.publish(target / "tasks" / "1.error.json")
        return code

    simulation.before = refuse
    with pytest.raises(FedllmError, match=r"the reason; log worker\.log") as caught:
        complete(tmp_path / "run", simulation)
    assert caught.value.exit_code == kind.exit_code


def test_a_damaged_state_is_aggregated_again_on_resume(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    root, said = tmp_path / "run", list[str]()
    complete(root, Simulation())
    (root / "rounds/0002/aggregate/global.safetensors").write_bytes(b"\0" * 100)
    complete(root, Simulation(log=said.append))
    assert states(root) == undisturbed
    assert "aggregated again" in said[0]


def test_every_coordinator_record_carries_its_lease(tmp_path: Path) -> None:
    root = tmp_path / "run"
    complete(root, Simulation(), config_of(rounds=1))
    complete(root, Simulation(), config_of(rounds=2))
    plans = [SubmissionRecord.read(p) for p in sorted(root.glob("rounds/*/attempts/01/sub*"))]
    assert [plan.lease for plan in plans] == [1, 2]


def test_retention_keeps_the_last_states_and_the_updates_of_the_last_round(tmp_path: Path) -> None:
    root = tmp_path / "run"
    complete(root, Simulation(), config_of(rounds=5))
    assert list(states(root)) == ["0000", "0004", "0005"]
    assert [p.parts[-2] for p in root.glob("rounds/*/updates")] == ["0005"]
    hashes = [json.loads(p.read_text())["sha256"] for p in root.glob("rounds/*/aggregate/*.json")]
    assert len(hashes) == 6


def test_a_path_may_change_but_not_its_content(tmp_path: Path) -> None:
    root = tmp_path / "run"
    complete(root, Simulation(), config_of(rounds=1))
    moved = resumed_config(root, ["data.path=elsewhere", "rounds=2"])
    complete(root, Simulation(), moved)
    other = Simulation()
    other.data_fingerprint = "other data"
    with pytest.raises(RunDirectoryError, match=r"^data\.path: not what the first round"):
        complete(root, other, resumed_config(root, ["data.path=third", "rounds=3"]))
    complete(root, Simulation(), resumed_config(root, ["data.path=elsewhere"]))


def test_an_update_of_the_wrong_shape_is_not_counted(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    root, said = tmp_path / "run", list[str]()
    simulation = Simulation(log=said.append)
    simulation.misshapen = 1
    complete(root, simulation)
    assert states(root) == undisturbed
    assert any("has shape" in line for line in said)


class SendingTwice(Simulation):
    """Simulation that publishes the first bundle of a round again under another name."""

    def work(self, attempt: AttemptPaths, worker_class: str, task: str) -> None:
        super().work(attempt, worker_class, task)
        for path in attempt.round.updates.glob("01-000-00.safetensors"):
            shutil.copy(path, path.with_name("01-000-01.safetensors"))


def test_a_duplicate_update_is_logged_and_counts_once(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    said = list[str]()
    complete(tmp_path / "run", SendingTwice(log=said.append))
    assert states(tmp_path / "run") == undisturbed
    lines = [line for line in said if "sent another update" in line]
    assert len(lines) == 4
    assert lines[0].startswith("round 1: 01-000-01.safetensors: client ")
    assert lines[0].endswith("that of 01-000-00.safetensors counts")
