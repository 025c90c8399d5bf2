"""Whatever is killed, the run goes on to the bits of one that nothing disturbed."""

import os
import signal
from pathlib import Path

import pytest

from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.records import SubmissionRecord
from tests.cli.commands import fedllm, start
from tests.rounds.simulation import states
from tests.slurm.cluster import Cluster, intercept, until
from tests.slurm.runs import (
    PATIENCE_SECONDS,
    Begun,
    arrays,
    claims,
    each_trained_once,
    published,
    python_of,
    state_of,
    stopped_workers,
)

pytestmark = pytest.mark.slurm


def second_round(root: Path) -> RoundPaths:
    return RunPaths(root=root).round(2)


def test_what_a_killed_and_a_cancelled_task_held_is_trained_by_the_next_attempt_and_only_that(
    begun: Begun, cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    root, log = begun.run("run", rounds=1), begun.folder / "log"
    process = start(*begun.words(root, "scheduler.max_parallel=3"), log=log)
    paths = second_round(root)
    killed, cancelled, survivor = stopped_workers(paths.attempt(1), 3)
    python_of(killed.task).kill()
    cluster.slurm("scancel", cancelled.task)
    python_of(survivor.task).resume()
    until(paths.attempt(2).submission.exists, seconds=PATIENCE_SECONDS)
    before = {path: path.stat().st_mtime_ns for path in paths.updates.glob("01-*")}
    assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
    first, second = (SubmissionRecord.read(paths.attempt(n).submission) for n in (1, 2))
    bundles = {bundle.number: bundle.clients for bundle in first.bundles}
    lost = [*bundles[killed.bundle], *bundles[cancelled.bundle]]
    assert sorted(c for bundle in second.bundles for c in bundle.clients) == sorted(lost)
    assert sorted(r.client for r in published(paths) if r.attempt == 2) == sorted(lost)
    assert len(before) == len(bundles) - 2
    assert before == {path: path.stat().st_mtime_ns for path in paths.updates.glob("01-*")}
    assert each_trained_once(paths)
    assert states(root) == undisturbed


def test_a_task_on_a_crashed_node_starts_again_and_goes_on_with_its_claim(
    begun: Begun, cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    root, log = begun.run("run", rounds=1), begun.folder / "log"
    # of four CPUs: a node a task
    process = start(*begun.words(root, "scheduler.sbatch.client.cpus-per-task=3"), log=log)
    paths = second_round(root)
    crashed, *_ = stopped_workers(paths.attempt(1), 1)
    cluster.devcluster("crash-node", crashed.node)
    cluster.slurm("scontrol", "update", f"nodename={crashed.node}", "state=down", "reason=crash")
    cluster.devcluster("start-node", crashed.node)
    assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
    assert crashed in claims(paths.attempt(1))
    trained_by = {record.bundle: record.task for record in published(paths)}
    assert trained_by[crashed.bundle] == crashed.task
    assert each_trained_once(paths)
    assert not paths.attempt(2).root.exists()
    assert states(root) == undisturbed


def killed_at_sbatch(begun: Begun, root: Path, script: str) -> None:
    """Begin the second round; `script`, in the place of sbatch, kills the coordinator."""
    path = intercept(begun.folder / "bin", "sbatch", script, os.environ)
    done = fedllm(*begun.words(root, "scheduler.max_parallel=1"), PATH=path)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    attempt = second_round(root).attempt(1)
    assert attempt.submission.exists()
    assert not attempt.jobs.exists()


def test_a_coordinator_killed_before_sbatch_submits_on_resume_and_a_late_array_finds_nothing_to_do(
    begun: Begun, cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    root, now = begun.run("run", rounds=1), begun.folder / "now"
    # the child of a killed process lives on: its array lands when nobody waits for it
    script = f'kill -9 $PPID; until [ -e "{now}" ]; do sleep 0.1; done; exec $REAL "$@"'
    killed_at_sbatch(begun, root, script)
    assert not arrays(cluster, root)
    resumed = fedllm("resume", root)
    assert resumed.returncode == 0, resumed.stderr
    assert states(root) == undisturbed
    paths = second_round(root)
    before = {path: path.stat().st_mtime_ns for path in paths.root.rglob("*")}
    name = SubmissionRecord.read(paths.attempt(1).submission).arrays[0].name
    now.touch()
    until(lambda: len(arrays(cluster, root)[name]) == 2, seconds=PATIENCE_SECONDS)
    late = max(arrays(cluster, root)[name], key=int)
    until(lambda: state_of(cluster, late) == "COMPLETED", seconds=PATIENCE_SECONDS)
    assert before == {path: path.stat().st_mtime_ns for path in paths.root.rglob("*")}
    assert each_trained_once(paths)


@pytest.mark.parametrize("cluster", ["accounting"], indirect=True)
def test_a_coordinator_killed_after_sbatch_finds_its_array_again_on_resume(
    begun: Begun, cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    root = begun.run("run", rounds=1)
    killed_at_sbatch(begun, root, '"$REAL" "$@"; kill -9 $PPID')
    submitted = arrays(cluster, root)
    assert [len(ids) for ids in submitted.values()] == [1]
    resumed = fedllm("resume", root)
    assert resumed.returncode == 0, resumed.stderr
    assert arrays(cluster, root, "r0002-a01") == submitted
    assert not second_round(root).attempt(2).root.exists()
    assert each_trained_once(second_round(root))
    assert states(root) == undisturbed


def test_a_coordinator_killed_mid_round_goes_on_with_the_tasks_that_outlived_it(
    begun: Begun, cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    root = begun.run("run", rounds=1)
    process = start(*begun.words(root), log=begun.folder / "log")
    paths = second_round(root)
    worker, *_ = stopped_workers(paths.attempt(1), 1)
    process.kill()
    process.wait()
    submitted = arrays(cluster, root)
    python_of(worker.task).resume()
    resumed = fedllm("resume", root)
    assert resumed.returncode == 0, resumed.stderr
    assert arrays(cluster, root, "r0002-a01") == submitted
    assert not paths.attempt(2).root.exists()
    assert each_trained_once(paths)
    assert states(root) == undisturbed
