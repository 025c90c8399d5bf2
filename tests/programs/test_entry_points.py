"""Programs print an error in one line, record it for the coordinator, and exit with its code."""

from pathlib import Path

import pytest

from fedllm.process.session import Session
from fedllm.programs.entry_points import run
from fedllm.storage.records import ErrorRecord, PreparedRecord
from jobs import aggregate, client, coordinator, evaluate, prepare

PLANNED = "FEDLLM_PROCESSES"


@pytest.mark.parametrize("program", [prepare, aggregate, evaluate])
def test_a_directory_that_is_no_run_is_named(
    program: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    assert program.main([str(tmp_path / "a/b/c"), "--job", str(job)]) == 2  # type: ignore[attr-defined]
    (line,) = capfd.readouterr().err.splitlines()
    assert "not a run directory" in line
    found = ErrorRecord.read(job / "error.json")
    assert (found.kind, found.exit_code) == ("ConfigError", 2)
    assert line == f"error: {found.message}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: ATTEMPT"),
        (["x", "--client", "c"], "--client and --scratch go together"),
        (["x/first"], "first: not an attempt; need RUN/rounds/NNNN/attempts/NN"),
        (["x/01"], "not a run directory"),
    ],
)
def test_a_worker_without_an_attempt_leaves_nothing_behind(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert client.main(argv) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


TASK = {
    "FEDLLM_TASK": "7_0",
    "SLURM_ARRAY_JOB_ID": "7",
    "SLURM_ARRAY_TASK_ID": "0",
    "SLURM_JOB_ID": "9",
}


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        ({**TASK, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({**TASK, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({**TASK, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({**TASK, "SLURM_PROCID": "1"}, True),
        ({**TASK, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", PLANNED: "2"}, False),
        ({**TASK, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", PLANNED: "2"}, True),
        # by hand, in an allocation of one's own
        ({"SLURM_JOB_ID": "9", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_JOB_ID": "9", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, False),
        # a local worker, or an inline run, of a coordinator that is itself such a process
        ({"FEDLLM_TASK": "local:x", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, False),
        ({}, False),
    ],
)
def test_a_program_that_was_started_more_often_than_planned_ends_at_once(
    environment: dict[str, str],
    refused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in {*TASK, PLANNED, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    job = tmp_path / "job"
    assert aggregate.main([str(tmp_path / "a/b/c"), "--job", str(job)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    found = ErrorRecord.read(job / "error.json")
    assert line == f"error: {found.message}"
    assert ("each would do the same work" in line) is refused


class Broken(Session):
    """A session with a bug."""

    def prepared(self, path: Path) -> PreparedRecord:
        raise ZeroDivisionError(path.name)


def test_an_unexpected_error_is_exit_1_with_its_traceback_in_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = tmp_path / "run" / "rounds" / "0001"
    paths.mkdir(parents=True)
    config = "clients: {tiers: {all: {ranks: 2}}}\nmodel: {path: a}\ndata: {path: b}\n"
    (tmp_path / "run" / "config.yaml").write_text(config)
    job = tmp_path / "job"
    assert run("evaluate", [str(paths), "--job", str(job)], session=Broken()) == 1
    assert "ZeroDivisionError: prepared.json" in capfd.readouterr().err
    found = ErrorRecord.read(job / "error.json")
    assert (found.kind, found.message, found.exit_code) == ("ZeroDivisionError", "prepared.json", 1)


def test_an_error_that_cannot_be_recorded_is_still_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    argv = [str(tmp_path / "a/b/c"), "--job", str(tmp_path / "file")]
    assert run("aggregate", argv, session=Session()) == 2
    first, second = capfd.readouterr().err.splitlines()
    assert "not a run directory" in first
    assert "could not be recorded" in second


def test_the_coordinator_is_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert coordinator.main([str(tmp_path)]) == 2
    assert "no run here" in capfd.readouterr().err
    assert coordinator.main([str(tmp_path / "missing.yaml")]) == 2
    assert "no such configuration file" in capfd.readouterr().err
