"""The coordinator's job on a real Slurm: started, requeued, ended, and known to the lease."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.models import (
    ClientsSection,
    Config,
    SbatchSection,
    SchedulerSection,
    TierSection,
)
from fedllm.errors import ConfigError, LeaseError
from fedllm.scheduling.seam import TaskState
from fedllm.scheduling.slurm.coordinator_job import (
    LinkStart,
    after_all,
    after_any,
    cancel_job,
    coordinator_jobs,
    holder_is_gone,
    job_is_gone,
    start_link,
    submit_coordinator,
    submit_sweep_coordinator,
)
from fedllm.storage.lease import boot_id, process_start_time
from fedllm.storage.paths import RunPaths, shipped
from fedllm.storage.records import CoordinatorJobRecord, LeaseRecord
from tests.slurm.cluster import Cluster, until

pytestmark = pytest.mark.slurm

# Stands where Python would: notes what it was called with, stays, notes that it was told to stop.
COORDINATOR = """#!/bin/bash
echo "$BY_SETUP:" "${@:4}" >> "$FEDLLM_TOLD/called"
trap 'echo stopped >> "$FEDLLM_TOLD/called"; exit 3' TERM
[ "$(wc -l < "$FEDLLM_TOLD/called")" -gt "${FEDLLM_DIES:-0}" ] || kill -KILL $$
sleep "${FEDLLM_STAYS:-60}" & wait
exit 3
"""


@pytest.fixture
def run_root(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: ARG001
    monkeypatch.setenv("FEDLLM_TOLD", str(tmp_path))
    stand_in(tmp_path / "python of mine")
    return tmp_path / "run"


def stand_in(path: Path) -> None:
    path.write_text(COORDINATOR)
    path.chmod(0o755)


def configured(run_root: Path, **sbatch: Any) -> Config:
    scheduler = SchedulerSection(
        kind="slurm",
        python=f"'{run_root.parent / 'python of mine'}'",
        setup=("export BY_SETUP='set up'",),
        sbatch=SbatchSection(coordinator=sbatch),
    )
    clients = ClientsSection(tiers={"all": TierSection(ranks=4)})
    return Config(clients=clients, scheduler=scheduler)


def submitted(run_root: Path, config: Config, run_id: str) -> str:
    return submit_coordinator(RunPaths(root=run_root), config, run_id)


def calls(run_root: Path) -> list[str]:
    path = run_root.parent / "called"
    return path.read_text().splitlines() if path.exists() else []


def test_a_submitted_coordinator_runs_the_resolved_configuration_and_starts_again_when_requeued(
    run_root: Path, cluster: Cluster
) -> None:
    config = configured(run_root, time=30, partition="high")
    job = submitted(run_root, config, "ab12")
    noted = CoordinatorJobRecord.read(RunPaths(root=run_root).coordinator_job)
    assert (noted.job, noted.mode) == (job, "resident")
    expected = f"set up: run {run_root}/config.yaml --run-dir {run_root}"
    until(lambda: calls(run_root) == [expected])
    asked = cluster.slurm("squeue", "-h", "-o", "%j|%P|%l")
    assert asked.strip() == "coordinator-fedllm-ab12|high|30:00"
    assert job_is_gone(job) is False
    assert coordinator_jobs("ab12") == {job: TaskState.RUNNING}
    assert coordinator_jobs("ab1") == {}
    with pytest.raises(LeaseError, match=f"its coordinator waits or runs as Slurm job {job}"):
        submitted(run_root, config, "ab12")
    # what Slurm sends two minutes before the time limit
    cluster.slurm("scancel", "--batch", "--signal=USR2", job)
    log = run_root / "logs" / f"coordinator-{job}.log"
    until(lambda: "the job is about to end: requeued" in log.read_text())
    assert job_is_gone(job) is False
    # no person starts it this time
    until(lambda: calls(run_root)[-1] == f"{expected} --unattended")
    cancel_job(job)
    until(lambda: job_is_gone(job))
    cancel_job(job)


def test_one_job_resumes_a_whole_sweep_also_when_it_is_requeued(
    run_root: Path, cluster: Cluster
) -> None:
    paths, config = RunPaths(root=run_root), configured(run_root)
    job = submit_sweep_coordinator(paths, config, "5eed")
    until(lambda: calls(run_root) == [f"set up: resume {run_root}"])
    with pytest.raises(LeaseError, match=f"runs as Slurm job {job}"):
        submit_sweep_coordinator(paths, config, "5eed")
    cluster.slurm("scancel", "--batch", "--signal=USR2", job)
    until(lambda: calls(run_root)[-1] == f"set up: resume {run_root} --unattended")
    cancel_job(job)
    until(lambda: job_is_gone(job))
    chained = config.scheduler.model_copy(update={"coordinator": "chained"})
    with pytest.raises(ConfigError, match=r"^scheduler\.coordinator: got chained, but one"):
        submit_sweep_coordinator(paths, config.model_copy(update={"scheduler": chained}), "5eed")


def test_a_cancelled_coordinator_is_told_to_stop(run_root: Path) -> None:
    job = submitted(run_root, configured(run_root), "cd34")
    until(lambda: calls(run_root))
    cancel_job(job)
    until(lambda: job_is_gone(job))
    assert calls(run_root)[-1] == "stopped"


def test_a_killed_coordinator_starts_again_in_its_job_but_not_for_ever(
    run_root: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLLM_DIES", "1")
    monkeypatch.setenv("FEDLLM_STAYS", "0")
    job = submitted(run_root, configured(run_root), "ab12")
    until(lambda: job_is_gone(job))
    expected = f"set up: run {run_root}/config.yaml --run-dir {run_root}"
    assert calls(run_root) == [expected, f"{expected} --unattended"]
    # the second said itself why it ended
    assert exit_status(cluster, job) == 3 << 8
    monkeypatch.setenv("FEDLLM_DIES", "99")
    job = submitted(run_root, configured(run_root), "ab12")
    until(lambda: job_is_gone(job))
    assert len(calls(run_root)) == 2 + 5
    assert exit_status(cluster, job) == (128 + signal.SIGKILL) << 8


def test_a_job_that_cannot_be_requeued_says_so_and_goes_on_while_it_may(
    run_root: Path, cluster: Cluster
) -> None:
    job = submitted(run_root, configured(run_root, requeue=False), "ab12")
    until(lambda: calls(run_root))
    cluster.slurm("scancel", "--batch", "--signal=USR2", job)
    log = run_root / "logs" / f"coordinator-{job}.log"
    until(lambda: "not requeued (see above): ends with its time" in log.read_text())
    assert job_is_gone(job) is False


def test_a_link_starts_after_all_arrays_or_after_one_or_later_if_it_has_not_yet(
    cluster: Cluster,
) -> None:
    def sbatch(*words: str) -> str:
        return cluster.slurm("sbatch", "--parsable", "--output=/dev/null", *words).strip()

    def asked(field: str) -> str:
        return cluster.slurm("squeue", "-h", "-j", link, "-o", field).strip()

    held = sbatch("--hold", "--job-name=link", "--wrap=true")
    other = sbatch("--hold", "--array=0-1", "--wrap=true")
    link = sbatch("--dependency=singleton", "--job-name=link", "--wrap=sleep 60")
    assert start_link(link, LinkStart(dependency=after_all([held, other])))
    expected = f"afterany:{held}(unfulfilled),afterany:{other}_*(unfulfilled),singleton"
    assert asked("%E").startswith(expected)
    assert start_link(link, LinkStart(dependency=after_any([held, other], minutes_after=(held, 7))))
    assert f"afterany:{other}_*(unfulfilled)?after:{held}+7(unfulfilled)" in asked("%E")
    cluster.slurm("scontrol", "release", other)
    until(lambda: asked("%T") == "RUNNING")
    # it runs already
    assert start_link(link, LinkStart(dependency="singleton", seconds=60))
    later = sbatch("--dependency=singleton", "--wrap=true")
    assert start_link(later, LinkStart(dependency="singleton", seconds=60))
    link = later
    until(lambda: asked("%r") == "BeginTime")


def exit_status(cluster: Cluster, job: str) -> int:
    return int(cluster.slurm("squeue", "-h", "-t", "all", "-j", job, "-O", "exit_code:"))


def test_the_script_finds_the_clone_it_lies_in_and_ends_as_the_run_did(
    cluster: Cluster, run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = run_root.parent / "clone"
    (clone / ".venv" / "bin").mkdir(parents=True)
    stand_in(clone / ".venv" / "bin" / "python")
    (clone / "slurm").mkdir()
    script = clone / "slurm" / "coordinator.sbatch"
    script.write_bytes(shipped("slurm/coordinator.sbatch").read_bytes())
    monkeypatch.setenv("BY_SETUP", "by hand")
    monkeypatch.setenv("FEDLLM_STAYS", "0")
    log = run_root.parent / "log"
    words = ("--parsable", f"--output={log}", str(script), "my config.yaml", "--set", "rounds=2")
    job = cluster.slurm("sbatch", *words, environment=os.environ).strip()
    until(lambda: job_is_gone(job))
    assert calls(run_root) == ["by hand: run my config.yaml --set rounds=2"], log.read_text()
    assert exit_status(cluster, job) == 3 << 8


def test_a_refused_option_is_named_with_its_key(run_root: Path) -> None:
    with pytest.raises(ConfigError, match=r"^scheduler\.sbatch\.coordinator\.partition: nope: "):
        submitted(run_root, configured(run_root, partition="nope"), "ef56")


def test_a_holder_is_gone_when_its_job_is_or_without_a_job_its_process(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def holder(job: str | None, *, pid: int = os.getpid()) -> LeaseRecord:
        return LeaseRecord(
            number=1,
            host=os.uname().nodename,
            boot_id=boot_id(),
            pid=pid,
            start_time=process_start_time(pid) or "ended",
            slurm_job=job,
        )

    waiting = cluster.slurm("sbatch", "--parsable", "--hold", "--wrap=true").strip()
    assert holder_is_gone(holder(waiting, pid=2**22)) is False
    assert holder_is_gone(holder("999999")) is True
    assert holder_is_gone(holder(None)) is False
    assert holder_is_gone(holder(None, pid=2**22)) is True
    # the same job, requeued
    monkeypatch.setenv("SLURM_JOB_ID", waiting)
    assert holder_is_gone(holder(waiting, pid=2**22)) is True
    assert holder_is_gone(holder(waiting)) is False
    # another process of the same machine cannot ask
    monkeypatch.setenv("PATH", "")
    assert holder_is_gone(holder("999999")) is None
