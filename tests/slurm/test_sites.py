"""Sites as people have them: what wraps Slurm's commands, counts threads or sets variables."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.models import SchedulerSection
from fedllm.errors import ConfigError
from fedllm.scheduling.log_names import log_of
from fedllm.scheduling.seam import Job, SubmissionUnknown, TaskState
from fedllm.scheduling.slurm.coordinator_job import coordinator_jobs, job_is_gone
from fedllm.scheduling.slurm.executor import SlurmScheduler
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import ErrorRecord, RunRecord
from tests.cli.commands import fedllm
from tests.rounds.simulation import states
from tests.slurm.cluster import DAEMONS, Cluster, intercept, until
from tests.slurm.runs import (
    ON_CLUSTER,
    PATIENCE_SECONDS,
    Begun,
    arrays,
    each_trained_once,
    settings,
)
from tests.slurm.workplace import Workplace
from tests.tiny import Tiny

pytestmark = pytest.mark.slurm

Make = Callable[..., Workplace]
BANNER = """echo '--- Welcome to Cluster3 | 12 users | load = 7 ---'
echo 'This is job 3 of at most 100 in your queue'
"""


def ran_once(work: Workplace, ids: list[str]) -> None:
    """Wait for tasks, and see that each was one process that wrote one log."""
    work.until_gone(ids)
    for id_ in ids:
        told = work.until_started(id_)
        assert (told["SLURM_STEP_NUM_TASKS"], told["FEDLLM_PROCESSES"]) == ("1", "1")
        assert log_of(work.logs, id_).read_text() == f"hello from {id_}\n"
    logs = [path.name for path in work.logs.glob("*_log.out")]
    assert sorted(logs) == sorted(f"{id_}_0_log.out" for id_ in ids)


@pytest.mark.parametrize("cluster", ["threads"], indirect=True)
def test_a_task_is_one_process_whatever_its_allocation_is_made_of(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # of an interactive job that somebody submits from
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    work = make()
    options: tuple[dict[str, int | bool], ...] = (
        {"cpus-per-task": 1},
        {"cpus-per-task": 3, "gpus-per-task": 1},
        {"cpus-per-task": 1, "exclusive": True},
        {"exclusive": True},
        {"ntasks-per-node": 1, "N": 1},
    )
    jobs = [work.job(f"sized-{number}", **given) for number, given in enumerate(options)]
    ran_once(work, [id_ for job in jobs for id_ in work.scheduler.submit(job)])


def test_a_step_that_a_site_makes_larger_ends_with_one_line_and_does_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    larger = """srun() {
  local word words=()
  for word; do [[ $word == --ntasks=* ]] || words+=("$word"); done
  command srun --ntasks=2 --overcommit "${words[@]}"
}"""
    section = SchedulerSection(query_seconds=1e-6, setup=(larger,), python=sys.executable)
    scheduler = SlurmScheduler(section=section)
    record = tmp_path / "job"
    words = (str(tmp_path / "run/rounds/0001"), "--job", str(record))
    job = Job(name="doubled", program="aggregate", argv=words, log_folder=tmp_path / "logs")
    ids = scheduler.submit(job)
    until(lambda: set(scheduler.states(ids).values()) == {TaskState.GONE}, seconds=120)
    # with 2, or by the signal that ends the other process
    assert scheduler.endings(ids)[ids[0]].state == "FAILED"
    told = ErrorRecord.read(record / "error.json")
    assert told.exit_code == 2
    assert "of 2 that srun started" in told.message
    assert cluster.slurm("squeue", "-h") == ""


@pytest.mark.parametrize("answer", ["$said on cluster nautilus", "${said##* }", "${said##* };here"])
def test_the_id_is_sbatchs_and_not_the_banners(
    answer: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'{BANNER}said=$("$REAL" "$@") || exit; echo "{answer}"\n{BANNER}'
    monkeypatch.setenv("PATH", intercept(tmp_path / "bin", "sbatch", script, os.environ))
    work = make()
    ids = work.scheduler.submit(work.job(tmp_path.name, tasks=2))
    assert work.scheduler.find(tmp_path.name) == ids
    ran_once(work, ids)


def test_an_answer_without_an_id_is_looked_up_and_nothing_is_sent_twice(
    make: Make, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mute = intercept(tmp_path / "bin", "sbatch", f'"$REAL" "$@" >&2\n{BANNER}', os.environ)
    monkeypatch.setenv("PATH", mute)
    work = make()
    ids = work.scheduler.submit(work.job("mute", tasks=2, hold=True))
    assert len(ids) == 2
    assert set(cluster.slurm("squeue", "-h", "-o", "%F").split()) == {ids[0].partition("_")[0]}
    monkeypatch.setenv("PATH", intercept(tmp_path / "bin", "sbatch", BANNER, os.environ))
    with pytest.raises(SubmissionUnknown, match=r"names no job \(.*Cluster3.*\), and the queue"):
        work.scheduler.submit(work.job("lost"))
    far = intercept(tmp_path / "bin", "sbatch", "echo '77;far'", os.environ)
    monkeypatch.setenv("PATH", far)
    with pytest.raises(SubmissionUnknown, match=r"job 77 went to cluster far, .* no job away;"):
        work.scheduler.submit(work.job("away"))


def test_what_squeue_and_sacct_are_wrapped_in_is_passed_over(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make()
    ids = work.scheduler.submit(work.job("announced", tasks=2, seconds=60))
    work.until_started(ids[1])
    for command in ("squeue", "sacct", "scontrol", "sinfo"):
        noise = f'{BANNER}printf Maintenance\n"$REAL" "$@"\nstatus=$?\n{BANNER}exit $status'
        monkeypatch.setenv("PATH", intercept(tmp_path / "bin", command, noise, os.environ))
    assert make().states(ids) == {TaskState.RUNNING}
    assert make().scheduler.find("announced") == ids
    assert job_is_gone(ids[0].partition("_")[0]) is False
    assert coordinator_jobs("none") == {}
    assert make().scheduler.capacity({"mem": 100}).largest_array == 400
    work.scheduler.cancel(ids)
    work.until_gone(ids)
    assert job_is_gone("999999") is True
    ended = make().scheduler.endings(ids)
    assert {ending.state for ending in ended.values()} == {"CANCELLED"}
    # the first line stands behind an announcement without an end
    assert ids[1] in ended


def test_variables_of_the_submitters_shell_and_export_none_change_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        **{"SBATCH_ARRAY_INX": "0-9", "SBATCH_EXPORT": "NONE", "SLURM_EXPORT_ENV": "NONE"},
        **{"SBATCH_WAIT": "1", "SBATCH_TEST_ONLY": "1", "SBATCH_PARSABLE": "1"},
        **{"SBATCH_OPEN_MODE": "truncate", "SLURM_NPROCS": "3", "SBATCH_SIGNAL": "KILL@60"},
        **{"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2", "FEDLLM_PROCESSES": "3"},
    }.items():
        monkeypatch.setenv(name, value)
    work = make()
    ids = work.scheduler.submit(work.job("clean"))
    ids += work.scheduler.submit(work.job("bare", export="NONE"))
    ran_once(work, ids)


@pytest.mark.parametrize("run", ["50%j größe (a)", "lr=%u%A", 'ana\'s "run" & $HOME'])
def test_logs_lie_in_the_run_directory_however_it_is_called(make: Make, run: str) -> None:
    work = make(run=run)
    ids = work.scheduler.submit(work.job("odd", tasks=2))
    ran_once(work, ids)
    assert work.until_started(ids[0])["FEDLLM_LOG"] == str(log_of(work.logs, ids[0]))


def test_jobs_for_another_cluster_are_refused_by_name(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make()
    for option in ("clusters", "M"):
        named: dict[str, Any] = {option: "far"}
        with pytest.raises(ConfigError, match=r"client\.clusters: got far; fedllm sets"):
            work.scheduler.submit(work.job("far", **named))
    monkeypatch.setenv("SLURM_CLUSTERS", "devcluster")
    work.scheduler.check([work.job("here")])
    monkeypatch.setenv("SBATCH_CLUSTERS", "far")
    with pytest.raises(ConfigError, match=r"^SBATCH_CLUSTERS: got far; .* on, devcluster; .*unset"):
        make().scheduler.check([work.job("far")])


def test_a_chain_goes_through_noise_an_odd_folder_and_an_empty_environment(
    tiny: Tiny, cluster: Cluster, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    # `--parsable`, and what a site prints: of every link, whose sbatch is wrapped, too
    for command in ("sbatch", "squeue"):
        noise = f'{BANNER}"$REAL" "$@"\nstatus=$?\n{BANNER}exit $status'
        path = intercept(tmp_path / "bin", command, noise, os.environ)
    folder = tmp_path / "50%j gr\u00f6\u00dfe (a)'s"
    folder.mkdir()
    begun = Begun(tiny=tiny, folder=folder)
    root = begun.run("run", rounds=1)
    wrapped = f"scheduler.setup=['export PATH={tmp_path}/bin:{DAEMONS}:/usr/bin:/bin']"
    changes = ("scheduler.coordinator=chained", "scheduler.sbatch.default.export=NONE", wrapped)
    words = settings("rounds=2", *ON_CLUSTER, *changes)
    done = fedllm("submit", root, *words, PATH=path)
    assert done.returncode == 0, done.stderr
    name = f"coordinator-fedllm-{RunRecord.read(RunPaths(root=root).run).run_id}"
    there = ("squeue", "-h", f"--name={name}")
    until(lambda: not cluster.slurm(*there), seconds=PATIENCE_SECONDS)
    assert states(root) == undisturbed, (root / "logs" / "chain.log").read_text()
    assert each_trained_once(RunPaths(root=root).round(2))
    assert [len(ids) for ids in arrays(cluster, root, "r0002-a0").values()] == [1]
