"""The chained coordinator: short jobs that hand a run on, whatever happens to one of them."""

import os
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from fedllm.rounds.chaining import Chain
from fedllm.storage.lease import Lease, current_lease
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import CoordinatorJobRecord, RunRecord
from tests.cli.commands import fedllm
from tests.rounds.simulation import config_of, states
from tests.slurm.cluster import Cluster, intercept, until
from tests.slurm.runs import (
    HELD,
    ON_CLUSTER,
    PATIENCE_SECONDS,
    Begun,
    arrays,
    each_trained_once,
    settings,
    state_of,
)

pytestmark = pytest.mark.slurm

AWAY = "Unable to contact slurm controller"
CHAINED = ("scheduler.coordinator=chained", "rounds=2", *ON_CLUSTER)


def submit(root: Path, *changes: str, path: str = os.environ["PATH"]) -> None:
    """Submit the first link."""
    done = fedllm("submit", root, *settings(*CHAINED, *changes), PATH=path)
    assert done.returncode == 0, done.stderr


def links(cluster: Cluster, root: Path, *states: str) -> list[str]:
    """Return the links of a run's chain that are in such a state, the oldest first."""
    name = f"coordinator-fedllm-{RunRecord.read(RunPaths(root=root).run).run_id}"
    words = ("squeue", "-h", f"--name={name}", f"--states={','.join(states) or 'all'}")
    return sorted(cluster.slurm(*words, "-o", "%i").split(), key=int)


def await_end(cluster: Cluster, root: Path) -> list[str]:
    """Wait until no link waits or runs; return all there were."""
    until(lambda: not links(cluster, root, "PD", "R", "CG"), seconds=PATIENCE_SECONDS)
    return links(cluster, root)


def log(root: Path) -> str:
    return (root / "logs" / "chain.log").read_text()


def never_more_than_two(cluster: Cluster, jobs: Sequence[str]) -> bool:
    """Say whether of any three links in a row the last was submitted when the first had ended."""
    shown = [cluster.slurm("scontrol", "show", "job", "--oneliner", job) for job in jobs]
    times = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in shown]
    return all(
        first["EndTime"] <= third["SubmitTime"]
        for first, third in zip(times, times[2:], strict=False)
    )


def test_a_chain_makes_the_states_of_an_undisturbed_run_and_leaves_no_job(
    begun: Begun, cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    root = begun.folder / "run"
    words = ("submit", begun.tiny.config, "--run-dir", root)
    submitted = fedllm(*words, *settings("evaluation.every=0", *CHAINED))
    assert submitted.returncode == 0, submitted.stderr
    jobs = await_end(cluster, root)
    assert states(root) == undisturbed, log(root)
    # prepare, state 0, two rounds of training and aggregation, and one successor too many
    assert len(jobs) == 8, log(root)
    assert state_of(cluster, jobs[-2]) == "COMPLETED"
    assert state_of(cluster, jobs[-1]) == "CANCELLED"
    assert never_more_than_two(cluster, jobs)
    assert each_trained_once(RunPaths(root=root).round(2))
    # one start by a person
    _, holder = current_lease(RunPaths(root=root))
    assert holder
    assert holder.origin == 1


def killing(done: Path, command: str, words: str, doing: str, *, path: str, after: Path) -> str:
    """Return a PATH on which `command`, called with `words`, does something else, once."""
    script = f"""
if [[ -e "{after}" && "$*" == *{words}* ]] && mkdir "{done}"; then {doing}; exit; fi
exec "$REAL" "$@"
"""
    return intercept(done.with_suffix(".bin"), command, script, {"PATH": path})


def test_links_killed_first_last_and_in_between_are_followed_by_one_that_goes_on(
    begun: Begun, cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    root, path = begun.run("run", rounds=1), os.environ["PATH"]
    kills = [
        # its successor is submitted, and not recorded
        ("first", "sbatch", "afterany:", '"$REAL" "$@"; kill -9 $PPID'),
        # its arrays are submitted, and not recorded
        ("second", "sbatch", "r02-train-fedllm-*-a01", '"$REAL" "$@"; kill -9 $PPID'),
        # its arrays are recorded, its successor waits for itself alone
        ("third", "scontrol", "dependency=afterany:", "kill -9 $PPID"),
        ("fourth", "scontrol", "dependency=afterany:", f"echo {AWAY} >&2; exit 1"),
    ]
    after = begun.folder
    for name, command, words, doing in kills:
        done = begun.folder / name
        path = killing(done, command, words, doing, path=path, after=after)
        after = done
    submit(root, path=path)
    jobs = await_end(cluster, root)
    assert [state_of(cluster, job) for job in jobs[:4]] == [*["FAILED"] * 3, "COMPLETED"], log(root)
    assert f"{AWAY}; asking again in 0 s" in log(root)
    assert states(root) == undisturbed, log(root)
    assert each_trained_once(RunPaths(root=root).round(2))
    assert [len(ids) for ids in arrays(cluster, root, "r0002-a0").values()] == [1]
    assert never_more_than_two(cluster, jobs)


def test_a_link_that_is_requeued_and_one_that_is_cancelled_are_followed_by_one_that_goes_on(
    begun: Begun, cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    root, wait = begun.run("run", rounds=1), begun.folder / "wait"
    wait.touch()
    # a link stays at its end
    script = f'while [[ "$*" == *dependency* && -e "{wait}" ]]; do sleep 0.1; done; exec $REAL "$@"'
    submit(root, HELD, path=intercept(begun.folder / "bin", "scontrol", script, os.environ))
    first = until_stuck(cluster, root)
    cluster.slurm("scontrol", "requeue", first)
    until(lambda: current_lease(RunPaths(root=root))[0] > 3, seconds=PATIENCE_SECONDS)
    # it found the successor that it had submitted
    assert until_stuck(cluster, root) == first
    second = links(cluster, root, "PD")[0]
    cluster.slurm("scancel", first)
    until(lambda: links(cluster, root, "R") == [second], seconds=PATIENCE_SECONDS)
    wait.unlink()
    ((array,),) = arrays(cluster, root, "r0002-a0").values()
    until(lambda: len(links(cluster, root, "PD")) == 1 and not links(cluster, root, "R", "CG"))
    cluster.slurm("scontrol", "release", array)
    jobs = await_end(cluster, root)
    assert states(root) == undisturbed, log(root)
    assert never_more_than_two(cluster, jobs)


def until_stuck(cluster: Cluster, root: Path) -> str:
    """Wait until a link has submitted its array and its successor; return it."""
    until(lambda: arrays(cluster, root, "r0002-a0"), seconds=PATIENCE_SECONDS)
    until(lambda: len(links(cluster, root, "R")) == len(links(cluster, root, "PD")) == 1)
    return links(cluster, root, "R")[0]


def test_where_slurm_refuses_to_change_a_link_none_starts_within_a_minute_of_the_last(
    begun: Begun, cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    root = begun.run("run", rounds=1)
    script = """[ "$1" = update ] && { echo "update error: Access/permission denied" >&2; exit 1; }
exec "$REAL" "$@"
"""
    submit(root, path=intercept(begun.folder / "bin", "scontrol", script, os.environ))
    waits: dict[str, float] = {}

    def is_through() -> bool:
        if links(cluster, root, "R", "CG", "CF"):
            return False
        waiting = links(cluster, root, "PD")
        for job in waiting:
            if job not in waits:
                # nothing else would hold a link back once the tasks it waits for are through
                waits[job] = waiting_seconds(cluster, job)
                cluster.slurm("scontrol", "update", f"jobid={job}", "starttime=now")
        # asked at once: a link may have begun since the first question
        return not links(cluster, root, "PD", "R", "CG", "CF")

    until(is_through, seconds=PATIENCE_SECONDS)
    assert states(root) == undisturbed, log(root)
    # the first link is nobody's successor
    successors = {job: seconds for job, seconds in waits.items() if job != links(cluster, root)[0]}
    assert len(successors) >= 2, log(root)
    assert min(successors.values()) >= 60, successors
    assert log(root).count("(--begin)") == len(successors)


def waiting_seconds(cluster: Cluster, job: str) -> float:
    """Return how long after its submission a waiting job may start."""
    shown = cluster.slurm("scontrol", "show", "job", "--oneliner", job)
    fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    start, submitted = (fields[name] for name in ("StartTime", "SubmitTime"))
    if start == "Unknown":
        return 0.0
    return (datetime.fromisoformat(start) - datetime.fromisoformat(submitted)).total_seconds()


def test_a_run_that_cannot_go_on_ends_its_chain(begun: Begun, cluster: Cluster) -> None:
    root = begun.run("run", rounds=1)
    submit(root, "scheduler.sbatch.client.partition=nope")
    jobs = await_end(cluster, root)
    assert [state_of(cluster, job) for job in jobs] == ["FAILED", "CANCELLED"]
    assert "fedllm: scheduler.sbatch.client.partition: nope: refused by sbatch" in log(root)
    # a chain whose links keep dying without a word
    submit(root, "scheduler.sbatch.client.partition=low", "scheduler.sbatch.coordinator.hold=true")
    (held,) = links(cluster, root, "PD")
    noted = RunPaths(root=root).coordinator_job
    assert CoordinatorJobRecord.read(noted) == CoordinatorJobRecord(
        job=held, mode="chained", user=os.geteuid()
    )
    CoordinatorJobRecord(job=held, mode="chained", lost=10).publish(noted)
    cluster.slurm("scontrol", "release", held)
    assert await_end(cluster, root) == [*jobs, held]
    assert state_of(cluster, held) == "FAILED"
    assert "10 links of the chain in a row were killed before they could record why" in log(root)


def test_cancel_ends_the_chain_and_the_tasks_of_its_run_and_of_no_other(
    begun: Begun, cluster: Cluster
) -> None:
    root, other = begun.run("run", rounds=1), begun.run("other", rounds=1)

    def none_left(run: Path) -> bool:
        return not links(cluster, run, "R", "CG")

    for each in (other, root):
        submit(each, HELD)
    for each in (other, root):
        until(partial(arrays, cluster, each, "r0002-a0"), seconds=PATIENCE_SECONDS)
        until(partial(none_left, each), seconds=PATIENCE_SECONDS)
    (second,) = links(cluster, root, "PD")
    done = fedllm("cancel", root)
    assert done.stdout == f"coordinator job {second} cancelled\n2 tasks cancelled\n", done.stderr
    ((of_other,),) = arrays(cluster, other, "r0002-a0").values()
    left = set(cluster.slurm("squeue", "-h", "-o", "%F").split())
    assert left == {of_other, *links(cluster, other, "PD")}
    assert "2 tasks" in fedllm("cancel", other).stdout
    assert not cluster.slurm("squeue", "-h")


def test_cron_advances_a_run_without_staying_and_leaves_it_to_whoever_holds_it(
    begun: Begun, cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    root = begun.run("run", rounds=1)
    fedllm("submit", root, *settings(*CHAINED, "scheduler.sbatch.coordinator.hold=true", HELD))
    lease = Lease.acquire(RunPaths(root=root))
    held = fedllm("advance", root)
    assert held.returncode == 3
    assert f"coordinator {lease.number} holds this run" in held.stdout
    assert len(held.stdout.splitlines()) == 1
    assert not held.stderr
    # so does a link, and leaves its successor
    (link,) = links(cluster, root, "PD")
    cluster.slurm("scontrol", "release", link)
    until(lambda: state_of(cluster, link) == "COMPLETED", seconds=PATIENCE_SECONDS)
    assert f"coordinator {lease.number} holds this run" in log(root)
    assert len(links(cluster, root, "PD")) == 1
    lease.release()
    assert fedllm("advance", root).stdout.splitlines()[-1] == "not done yet; advance again later"
    ((array,),) = arrays(cluster, root, "r0002-a0").values()
    cluster.slurm("scontrol", "release", array)
    until(lambda: fedllm("advance", root).returncode == 0, seconds=PATIENCE_SECONDS)
    number, last = current_lease(RunPaths(root=root))
    assert last
    assert last.origin == lease.number
    assert states(root) == undisturbed
    # done: cron goes on calling
    assert fedllm("advance", root).stdout == "done\n"
    assert current_lease(RunPaths(root=root))[0] == number


def test_a_link_keeps_one_successor_and_waits_until_no_other_runs(
    cluster: Cluster, tmp_path: Path
) -> None:
    def named(*words: str) -> str:
        name = "--job-name=coordinator-fedllm-ab12"
        return cluster.slurm("sbatch", "--parsable", "--output=/dev/null", name, *words).strip()

    def end_the_other(_seconds: float) -> None:
        cluster.slurm("scancel", running)
        until(lambda: state_of(cluster, running) == "CANCELLED")

    running = named("--wrap=sleep 60")
    until(lambda: state_of(cluster, running) == "RUNNING")
    # a stalled sbatch of a killed link landed late
    successor, surplus = named("--hold", "--wrap=true"), named("--hold", "--wrap=true")
    chain = Chain(
        paths=RunPaths(root=tmp_path),
        config=config_of(),
        run_id="ab12",
        job="999999",
        say=print,
        wait=end_the_other,
    )
    assert chain.successor() == successor
    assert state_of(cluster, surplus) == "CANCELLED"
    assert state_of(cluster, running) == "CANCELLED"
    noted = CoordinatorJobRecord.read(chain.paths.coordinator_job)
    assert noted == CoordinatorJobRecord(job=successor, mode="chained", lost=1, user=os.geteuid())
    chain.record_orderly_end(successor)
    assert CoordinatorJobRecord.read(chain.paths.coordinator_job).lost == 0
    chain.end()
    assert state_of(cluster, successor) == "CANCELLED"
