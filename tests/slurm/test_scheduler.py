"""The scheduler seam on a real Slurm."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.config.models import SbatchSection
from fedllm.errors import ConfigError, UserError
from fedllm.scheduling.heap import SETTINGS
from fedllm.scheduling.log_names import log_of
from fedllm.scheduling.seam import Job, SchedulerUnreachable, TaskState
from fedllm.scheduling.slurm.coordinator_job import job_is_gone
from tests.slurm.cluster import Cluster, intercept, program, until
from tests.slurm.workplace import Workplace

pytestmark = pytest.mark.slurm

BOTH = pytest.mark.parametrize("cluster", ["plain", "accounting"], indirect=True)

# A program that submits two tasks of the other one and says which.
SUBMITTER = """
import pathlib, sys
from fedllm.config.models import SchedulerSection
from fedllm.scheduling.seam import Job
from fedllm.scheduling.slurm.executor import SlurmScheduler
jobs, logs, told = map(pathlib.Path, sys.argv[1:])
scheduler = SlurmScheduler(section=SchedulerSection(), jobs_folder=jobs)
argv = (str(told), "0", "0")
ids = scheduler.submit(Job(name="nested", program="client", argv=argv, tasks=2, log_folder=logs))
(told / "ids").write_text(" ".join(ids))
"""


def test_an_array_runs_our_program_once_per_task(
    make: Callable[..., Workplace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", "/a cache")
    work = make(setup=("export SLURM_BY_SETUP=yes",))
    ids = work.scheduler.submit(work.job("fedllm-x-r0001", tasks=6, **{"cpus-per-task": 2}))
    assert [id_.partition("_")[2] for id_ in ids] == ["0", "1", "2", "3", "4", "5"]
    work.until_gone(ids)
    for id_ in ids:
        told = work.until_started(id_)
        log = log_of(work.logs, id_)
        assert told["FEDLLM_LOG"] == str(log)
        assert log.read_text() == f"hello from {id_}\n"
        assert told["FEDLLM_CACHE"] == "/a cache"
        assert told["HF_HUB_OFFLINE"] == "1"
        assert told["GLIBC_TUNABLES"].startswith(SETTINGS)
        assert told["SLURM_BY_SETUP"] == "yes"
        assert told["SLURM_CPUS_PER_TASK"] == "2"
        assert told["SLURM_JOB_NAME"] == "fedllm-x-r0001"
    # one log per task, one sbatch file per array, nothing else
    assert len(list(work.logs.iterdir())) == len(ids) + 1


def test_no_more_than_max_parallel_tasks_run_at_once(
    make: Callable[..., Workplace], cluster: Cluster
) -> None:
    work = make(max_parallel=2)
    ids = work.scheduler.submit(work.job("throttled", tasks=5, seconds=60))
    work.until_started(ids[1])
    assert len(cluster.slurm("squeue", "-h", "-t", "running").splitlines()) == 2
    states = work.scheduler.states(ids)
    assert list(states) == ids
    assert sorted(s.value for s in states.values()) == ["running"] * 2 + ["waiting"] * 3


@BOTH
def test_a_submission_whose_ids_were_lost_is_found_by_its_name(
    make: Callable[..., Workplace],
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = make()
    assert work.scheduler.find("fedllm-lost") is None
    ids = work.scheduler.submit(work.job("fedllm-lost", tasks=3, code=4))
    others = work.scheduler.submit(work.job("fedllm-lost, too"))
    assert make().scheduler.find("fedllm-lost") == ids
    assert make().scheduler.find("fedllm-lost, too") == others
    work.until_gone(ids)
    assert make().scheduler.find("fedllm-lost") == ids
    reasons = make().scheduler.endings(ids)
    assert {str(ending).rpartition(" on ")[0] for ending in reasons.values()} == {
        "FAILED, exit code 4:0"
    }
    # slurmctld forgets ended jobs after MinJobAge
    forgetful = intercept(tmp_path / "bin", "squeue", "exit 0", {"PATH": "/usr/bin:/bin"})
    monkeypatch.setenv("PATH", forgetful)
    if cluster.accounting:
        until(lambda: make().scheduler.find("fedllm-lost") == ids)
        until(lambda: len(make().scheduler.endings(ids)) == 3)
        assert make().scheduler.endings(ids) == reasons
    else:
        assert make().scheduler.find("fedllm-lost") is None
        assert make().scheduler.endings(ids) == {}


def test_a_held_task_waits_until_it_is_cancelled(make: Callable[..., Workplace]) -> None:
    work = make()
    held = work.scheduler.submit(work.job("held", hold=True))
    assert work.states(held) == {TaskState.WAITING}
    work.scheduler.cancel(held)
    work.until_gone(held)


def test_between_two_questions_a_new_task_is_not_taken_for_gone(
    make: Callable[..., Workplace],
) -> None:
    work = make(query_seconds=1000)
    assert work.states(["999999_0"]) == {TaskState.GONE}
    ids = work.scheduler.submit(work.job("new"))
    assert work.states(ids) == {TaskState.WAITING}


def test_a_requeued_task_keeps_its_id_and_its_log_and_is_never_gone(
    make: Callable[..., Workplace], cluster: Cluster
) -> None:
    work = make()
    ids = work.scheduler.submit(work.job("requeued", tasks=2, seconds=60))
    work.until_started(ids[1])
    cluster.slurm("scontrol", "requeue", ids[1])
    seen = set[TaskState]()
    restarted = work.told / f"{ids[1]}.1"

    def has_restarted() -> bool:
        seen.update(work.states(ids))
        return restarted.exists()

    until(has_restarted)
    assert TaskState.GONE not in seen
    assert not (work.told / f"{ids[0]}.1").exists()
    assert work.until_started(ids[1], start=1)["FEDLLM_TASK"] == ids[1]
    assert log_of(work.logs, ids[1]).read_text().count(f"hello from {ids[1]}\n") == 2


def test_a_crashed_node_gives_its_tasks_back_to_the_queue(
    make: Callable[..., Workplace], cluster: Cluster
) -> None:
    work = make()
    ids = work.scheduler.submit(work.job("crashed", seconds=60, nodelist="n2"))
    work.until_started(ids[0])
    cluster.devcluster("crash-node", "n2")
    cluster.slurm("scontrol", "update", "nodename=n2", "state=down", "reason=crash")
    until(lambda: work.states(ids) == {TaskState.WAITING})
    cluster.devcluster("start-node", "n2")
    work.until_started(ids[0], start=1)


def test_a_task_can_submit_as_if_it_were_none(make: Callable[..., Workplace]) -> None:
    work = make()
    program(work.jobs, "prepare", SUBMITTER)
    outer = Job(
        name="outer",
        program="prepare",
        argv=(str(work.jobs), str(work.logs), str(work.told)),
        log_folder=work.logs,
        options={"cpus-per-task": 3},
    )
    (outer_id,) = work.scheduler.submit(outer)
    work.until_gone([outer_id])
    ids = work.told / "ids"
    assert ids.exists(), log_of(work.logs, outer_id).read_text()
    inner = ids.read_text().split()[1]
    told = work.until_started(inner)
    assert told["FEDLLM_TASK"] == inner
    assert told["SLURM_JOB_NAME"] == "nested"
    assert told["SLURM_CPUS_ON_NODE"] == "1"
    assert "SLURM_CPUS_PER_TASK" not in told


def test_what_sbatch_refuses_is_one_line_that_names_option_and_key(
    make: Callable[..., Workplace],
) -> None:
    sbatch = SbatchSection(tiers={"big": {"partition": "nope"}}, client={"frobnicate": 1})
    work = make(sbatch=sbatch)
    with pytest.raises(ConfigError) as caught:
        work.scheduler.submit(work.job("refused", partition="nope"))
    assert str(caught.value) == (
        "scheduler.sbatch.tiers.big.partition: nope: refused by sbatch (invalid partition "
        "specified: nope; Batch job submission failed: Invalid partition name specified); change it"
    )
    with pytest.raises(ConfigError, match=r"^scheduler\.sbatch\.client\.frobnicate: 1: .*unrecog"):
        work.scheduler.submit(work.job("refused", frobnicate=1))
    with pytest.raises(ConfigError, match=r"^scheduler\.max_parallel: .*MaxArraySize"):
        work.scheduler.submit(work.job("refused", tasks=5000))
    assert work.scheduler.find("refused") is None


def test_a_controller_that_does_not_answer_is_unreachable_and_says_nothing_about_tasks(
    make: Callable[..., Workplace],
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = make()
    ids = work.scheduler.submit(work.job("unheard", seconds=60))
    assert work.states(ids) <= {TaskState.WAITING, TaskState.RUNNING}
    conf = tmp_path / "slurm.conf"
    text = cluster.conf.read_text().replace("MessageTimeout=10", "MessageTimeout=1")
    conf.write_text(text.replace(f"SlurmctldPort={cluster.port}", "SlurmctldPort=1"))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    assert work.states(ids) == {TaskState.UNKNOWN}
    for ask in (
        lambda: work.scheduler.submit(work.job("unheard too")),
        lambda: work.scheduler.find("unheard"),
        lambda: work.scheduler.cancel(ids),
    ):
        with pytest.raises(SchedulerUnreachable, match="Unable to contact slurm controller"):
            ask()
    assert job_is_gone(ids[0]) is None
    assert work.scheduler.endings(ids) == {}
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    until(lambda: TaskState.UNKNOWN not in work.states(ids))


def test_tasks_outlive_a_controller_that_is_killed_and_started_again(
    make: Callable[..., Workplace], cluster: Cluster
) -> None:
    work = make()
    ids = work.scheduler.submit(work.job("outliving", tasks=2, seconds=60))
    work.until_started(ids[1])
    # slurmctld saves what it knows every few seconds
    saved, started = cluster.root / "state" / "slurmctld" / "job_state", time.time()
    until(lambda: saved.exists() and saved.stat().st_mtime > started)
    cluster.devcluster("stop-controller")
    cluster.devcluster("start-controller")
    until(lambda: work.states(ids) == {TaskState.RUNNING})


def test_without_slurm_the_remedy_is_named(
    make: Callable[..., Workplace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^sbatch: not found; scheduler\.kind slurm needs"):
        work.scheduler.submit(work.job("nowhere"))
