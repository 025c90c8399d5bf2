"""Local workers: they take task after task, and their end is always noticed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedllm.config.loading import dump_config
from fedllm.errors import ConfigError, RunDirectoryError
from fedllm.scheduling.heap import SETTINGS, VARIABLE
from fedllm.scheduling.inline import InlineScheduler
from fedllm.scheduling.local import LocalScheduler
from fedllm.scheduling.schedulers import SCHEDULERS
from fedllm.scheduling.seam import Job, Scheduler, TaskState
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.publish import publish_bytes
from tests.planning.federations import config_of

WORKER = (sys.executable, str(Path(__file__).with_name("worker.py")))
LONG_SECONDS = 20.0


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[LocalScheduler]:
    made = LocalScheduler(workers=2, log_folder=tmp_path / "logs", serve=WORKER)
    yield made
    made.close()


def job(folder: Path, *argv: str, tasks: int = 1, processes: int = 1) -> Job:
    return Job(
        name="n",
        program="client",
        argv=argv,
        log_folder=folder / "0001",
        tasks=tasks,
        processes_per_task=processes,
    )


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LONG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def finish(scheduler: Scheduler, ids: list[str]) -> None:
    deadline = time.monotonic() + LONG_SECONDS
    while set(scheduler.states(ids).values()) != {TaskState.GONE}:
        assert time.monotonic() < deadline
        scheduler.wait(1.0)


def _failures(scheduler: Scheduler, ids: list[str]) -> dict[str, str]:
    return {id_: str(ending) for id_, ending in scheduler.endings(ids).items()}


def pids(folder: Path) -> dict[str, int]:
    """Return task -> the process that took it, from the tasks' logs."""
    logs = (folder / "0001").glob("*.log")
    lines = [line.split() for log in logs for line in log.read_text().splitlines()]
    return {task: int(pid) for pid, task in lines}


def pid_of(folder: Path, task: str) -> int:
    until(lambda: task in pids(folder), f"{task} did not start")
    return pids(folder)[task]


def is_running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_workers_stay_and_take_task_after_task(scheduler: LocalScheduler, tmp_path: Path) -> None:
    assert scheduler.capacity({}).free_slots == 2
    first = scheduler.submit(job(tmp_path, "exit", "0", tasks=5))
    assert len(set(first)) == 5
    finish(scheduler, first)
    second = scheduler.submit(job(tmp_path, "exit", "0", tasks=2))
    finish(scheduler, second)
    assert set(pids(tmp_path)) == {*first, *second}
    assert len(set(pids(tmp_path).values())) == 2
    assert _failures(scheduler, [*first, *second]) == {}
    assert {path.name for path in (tmp_path / "0001").iterdir()} == {"worker-1.log", "worker-2.log"}


def test_workers_start_with_the_settings_of_the_heap_and_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "glibc.malloc.check=0")
    says = (sys.executable, "-c", f"import os, sys; sys.exit(os.environ['{VARIABLE}'])")
    scheduler = LocalScheduler(workers=1, log_folder=tmp_path, serve=says)
    scheduler.submit(job(tmp_path, "exit", "0"))
    log = tmp_path / "worker-1.log"
    until(lambda: bool(log.read_text()), "nothing is said")
    assert log.read_text() == f"{SETTINGS}:glibc.malloc.check=0\n"
    scheduler.close()


def test_a_task_that_fails_at_once_is_gone_with_its_exit_code_and_log(
    scheduler: LocalScheduler, tmp_path: Path
) -> None:
    (task,) = scheduler.submit(job(tmp_path, "exit", "3"))
    finish(scheduler, [task])
    assert _failures(scheduler, [task]) == {task: f"exit 3; log {tmp_path / '0001/worker-1.log'}"}


def test_a_killed_worker_ends_its_task_and_a_new_one_takes_the_next(
    scheduler: LocalScheduler, tmp_path: Path
) -> None:
    ids = scheduler.submit(job(tmp_path, "sleep", tasks=3))
    killed = pid_of(tmp_path, ids[0])
    os.kill(killed, signal.SIGKILL)
    scheduler.wait(LONG_SECONDS)
    states = scheduler.states(ids)
    assert (states[ids[0]], states[ids[2]]) == (TaskState.GONE, TaskState.RUNNING)
    assert _failures(scheduler, ids) == {
        ids[0]: f"killed by signal 9; log {tmp_path / '0001/worker-1.log'}"
    }
    assert pid_of(tmp_path, ids[2]) not in {killed, pid_of(tmp_path, ids[1])}


def test_a_worker_that_dies_in_its_task_is_noticed_every_time(
    scheduler: LocalScheduler, tmp_path: Path
) -> None:
    ids = scheduler.submit(job(tmp_path, "die", tasks=4))
    finish(scheduler, ids)
    assert all("killed by signal 9" in reason for reason in _failures(scheduler, ids).values())
    assert len(set(pids(tmp_path).values())) == 4


def test_a_worker_that_died_idle_is_given_no_task(
    scheduler: LocalScheduler, tmp_path: Path
) -> None:
    first = scheduler.submit(job(tmp_path, "exit", "0", tasks=2))
    finish(scheduler, first)
    for pid in set(pids(tmp_path).values()):
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: not is_running(pid), "it lives")  # type: ignore[misc]
    second = scheduler.submit(job(tmp_path, "exit", "0", tasks=2))
    finish(scheduler, second)
    assert _failures(scheduler, second) == {}


def test_the_end_of_a_worker_is_noticed_also_when_something_keeps_its_pipe_open(
    scheduler: LocalScheduler, tmp_path: Path
) -> None:
    (task,) = scheduler.submit(job(tmp_path, "sleep"))
    pid = pid_of(tmp_path, task)
    with Path(f"/proc/{pid}/fd/1").open("wb"):
        os.kill(pid, signal.SIGKILL)
        until(lambda: not is_running(pid), "it lives")
        assert scheduler.states([task]) == {task: TaskState.GONE}
    assert "killed by signal 9" in _failures(scheduler, [task])[task]


def test_a_program_that_cannot_start_says_why_in_the_workers_log(tmp_path: Path) -> None:
    broken = (sys.executable, "-c", "raise SystemExit('no such module')")
    scheduler = LocalScheduler(workers=1, log_folder=tmp_path / "logs", serve=broken)
    ids = scheduler.submit(job(tmp_path, "exit", "0", tasks=2))
    finish(scheduler, ids)
    scheduler.close()
    log = tmp_path / "logs/worker-1.log"
    assert _failures(scheduler, ids) == dict.fromkeys(ids, f"exit 1; log {log}")
    assert log.read_text() == "no such module\n" * 2


def test_a_worker_that_hears_no_more_is_ended(tmp_path: Path) -> None:
    scheduler = LocalScheduler(
        workers=1, log_folder=tmp_path / "logs", serve=WORKER, end_seconds=0.1
    )
    first = scheduler.submit(job(tmp_path, "deaf", "0"))
    finish(scheduler, first)
    time.sleep(0.1)
    second = scheduler.submit(job(tmp_path, "exit", "0"))
    finish(scheduler, second)
    assert "killed by signal 9" in _failures(scheduler, second)[second[0]]
    third = scheduler.submit(job(tmp_path, "exit", "0"))
    finish(scheduler, third)
    assert _failures(scheduler, third) == {}
    scheduler.close()


def test_cancelling_a_running_task_ends_its_worker_and_no_other(
    scheduler: LocalScheduler, tmp_path: Path
) -> None:
    ids = scheduler.submit(job(tmp_path, "sleep", tasks=2))
    running = pid_of(tmp_path, ids[0])
    other = pid_of(tmp_path, ids[1])
    scheduler.cancel([ids[0]])
    assert not is_running(running)
    assert is_running(other)


def test_waiting_ends_with_a_task_or_with_the_time(
    scheduler: LocalScheduler, tmp_path: Path
) -> None:
    started = time.monotonic()
    scheduler.wait(0.05)
    scheduler.submit(job(tmp_path, "sleep"))
    scheduler.wait(0.05)
    assert 0.1 <= time.monotonic() - started < LONG_SECONDS
    scheduler.submit(job(tmp_path, "exit", "0"))
    scheduler.wait(60.0)
    assert time.monotonic() - started < LONG_SECONDS


def test_closing_ends_all_workers_also_those_that_will_not(tmp_path: Path) -> None:
    scheduler = LocalScheduler(
        workers=2, log_folder=tmp_path / "logs", serve=WORKER, grace_seconds=0.3
    )
    ids = [*scheduler.submit(job(tmp_path, "stubborn")), *scheduler.submit(job(tmp_path, "sleep"))]
    running = [pid_of(tmp_path, task) for task in ids]
    time.sleep(0.1)
    scheduler.close()
    assert not any(is_running(pid) for pid in running)
    assert scheduler.states(ids) == dict.fromkeys(ids, TaskState.GONE)
    scheduler.close()


def test_a_second_ctrl_c_while_it_waits_for_workers_kills_them(tmp_path: Path) -> None:
    scheduler = LocalScheduler(workers=1, log_folder=tmp_path / "logs", serve=WORKER)
    (task,) = scheduler.submit(job(tmp_path, "stubborn"))
    running = pid_of(tmp_path, task)
    time.sleep(0.1)

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            scheduler.close()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not is_running(running)


def test_a_log_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    scheduler = LocalScheduler(workers=1, log_folder=tmp_path / "logs", serve=WORKER)
    with pytest.raises(RunDirectoryError, match=r"worker-1.log: cannot be written"):
        scheduler.submit(job(tmp_path, "exit", "0"))


# --- the real worker

COORDINATOR = """
import sys, time
from pathlib import Path
from fedllm.scheduling.local import LocalScheduler
from fedllm.scheduling.seam import Job
folder = Path(sys.argv[1])
scheduler = LocalScheduler(workers=1, log_folder=folder / "logs")
def submit(program, *argv):
    job = Job(name="n", program=program, argv=argv, log_folder=folder / "logs/0001")
    return scheduler.submit(job)
(failing,) = submit("aggregate", str(folder / "other/rounds/0001"), "--job", str(folder / "job"))
scheduler.wait(60.0)
print(scheduler.endings([failing]).get(failing), flush=True)
submit("client", str(folder / "rounds/0001/attempts/01"))
print(scheduler._pool[0].processes[0].popen.pid, flush=True)
time.sleep(60)
"""


def test_the_real_worker_fails_by_exit_code_and_ends_with_a_killed_parent_in_the_middle_of_a_task(
    tmp_path: Path,
) -> None:
    # on a cluster a worker waits for the cohort of its round to become visible
    config = config_of(scheduler__kind="slurm", model__path="x", data__path="x")
    publish_bytes(RunPaths(root=tmp_path).config, dump_config(config).encode())
    with subprocess.Popen(
        [sys.executable, "-c", COORDINATOR, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout
        log = tmp_path / "logs/0001/worker-1.log"
        assert parent.stdout.readline() == f"exit 2; log {log}\n"
        worker = int(parent.stdout.readline())
        time.sleep(0.2)
        assert is_running(worker)
        parent.kill()
    until(lambda: not is_running(worker), "the worker outlived its coordinator")
    assert "error: " in log.read_text()


# --- inline


def test_an_inline_task_is_done_when_its_submission_returns(tmp_path: Path) -> None:
    seen: list[tuple[str, tuple[str, ...], Path]] = []

    def execute(program: str, argv: tuple[str, ...], task: str, log: Path) -> int:
        del task
        seen.append((program, argv, log))
        return 0

    InlineScheduler(execute=execute).submit(job(tmp_path, "ATTEMPT", tasks=2))  # type: ignore[arg-type]
    assert seen == 2 * [("client", ("ATTEMPT",), tmp_path / "0001/inline.log")]


def test_every_kind_of_scheduler_has_its_own(tmp_path: Path) -> None:
    paths = RunPaths(root=tmp_path)
    config = config_of(scheduler__workers=3)
    made = {kind: make(config, paths, lambda *_: 0) for kind, make in SCHEDULERS.items()}
    assert set(made) == {"inline", "local", "slurm"}
    assert [made[kind].capacity({}).max_parallel for kind in ("inline", "local")] == [1, 3]


def task_environment(log: Path) -> dict[str, str]:
    """Return the variables that the last task wrote to its log."""
    found: dict[str, str] = json.loads(log.read_text().splitlines()[-1])
    return found


def test_a_task_of_several_processes_has_a_rank_for_each_and_one_place_to_meet(
    scheduler: LocalScheduler, tmp_path: Path
) -> None:
    alone = scheduler.submit(job(tmp_path, "tell", "0"))
    finish(scheduler, alone)
    first = tmp_path / "0001/worker-1.log"
    expected = {"FEDLLM_PROCESSES": "1", "FEDLLM_RANK": "0", "FEDLLM_LOCAL_RANK": "0"}
    assert task_environment(first) == {**expected, "FEDLLM_RENDEZVOUS": ""}
    ids = scheduler.submit(job(tmp_path, "tell", "0", tasks=2, processes=2))
    finish(scheduler, ids)
    assert _failures(scheduler, ids) == {}
    meet = set()
    for worker in ("worker-1", "worker-2"):
        one, other = (task_environment(tmp_path / f"0001/{worker}{n}.log") for n in ("", ".1"))
        assert (one["FEDLLM_PROCESSES"], other["FEDLLM_PROCESSES"]) == ("2", "2")
        assert (one["FEDLLM_RANK"], other["FEDLLM_LOCAL_RANK"]) == ("0", "1")
        assert one["FEDLLM_RENDEZVOUS"] == other["FEDLLM_RENDEZVOUS"]
        meet.add(one["FEDLLM_RENDEZVOUS"])
    assert len(meet) == 2
    # the worker's first process is still its first
    assert len({line.split()[0] for line in first.read_text().splitlines()[::2]}) == 1
    again = scheduler.submit(job(tmp_path, "tell", "0"))
    finish(scheduler, again)
    assert task_environment(first)["FEDLLM_PROCESSES"] == "1"


def test_a_process_that_fails_or_dies_ends_the_others_of_its_task(
    scheduler: LocalScheduler, tmp_path: Path
) -> None:
    log = tmp_path / "0001/worker-1.1.log"
    (task,) = scheduler.submit(job(tmp_path, "last fails", "0", processes=2))
    finish(scheduler, [task])
    assert _failures(scheduler, [task]) == {task: f"exit 4; log {log}"}
    (task,) = scheduler.submit(job(tmp_path, "sleep", "0", processes=2))
    until(lambda: log.exists() and task in log.read_text(), "the second did not start")
    os.kill(int(log.read_text().splitlines()[-1].split()[0]), signal.SIGKILL)
    finish(scheduler, [task])
    assert _failures(scheduler, [task]) == {task: f"killed by signal 9; log {log}"}
    (task,) = scheduler.submit(job(tmp_path, "tell", "0", processes=2))
    finish(scheduler, [task])
    assert _failures(scheduler, [task]) == {}


def test_a_process_that_goes_on_after_another_failed_is_killed(tmp_path: Path) -> None:
    scheduler = LocalScheduler(
        workers=1, log_folder=tmp_path / "logs", serve=WORKER, grace_seconds=0.1
    )
    (task,) = scheduler.submit(job(tmp_path, "stubborn", processes=2))
    log = tmp_path / "0001/worker-1.1.log"
    until(lambda: log.exists() and task in log.read_text(), "the second did not start")
    os.kill(int(log.read_text().split()[0]), signal.SIGKILL)
    finish(scheduler, [task])
    assert scheduler.states([task]) == {task: TaskState.GONE}
    scheduler.close()


def test_cancelling_and_closing_end_all_processes_of_a_task(
    scheduler: LocalScheduler, tmp_path: Path
) -> None:
    def both(task: str) -> list[int]:
        logs = [tmp_path / f"0001/worker-1{n}.log" for n in ("", ".1")]
        until(lambda: all(log.exists() and task in log.read_text() for log in logs), "not there")
        return [int(log.read_text().splitlines()[-1].split()[0]) for log in logs]

    (task,) = scheduler.submit(job(tmp_path, "sleep", processes=2))
    found = both(task)
    scheduler.cancel([task])
    assert not any(map(is_running, found))
    (task,) = scheduler.submit(job(tmp_path, "sleep", processes=2))
    found = both(task)
    scheduler.close()
    assert not any(map(is_running, found))


def test_inline_refuses_a_task_of_several_processes_in_one_line(tmp_path: Path) -> None:
    scheduler = InlineScheduler(execute=lambda *_: 0)
    several = job(tmp_path, "exit", processes=2)
    for refuse in (lambda: scheduler.check([several]), lambda: scheduler.submit(several)):
        with pytest.raises(ConfigError, match=r"scheduler\.kind: inline .* n has 2; need local"):
            refuse()
