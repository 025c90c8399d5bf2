"""A task of several processes on a real Slurm: as many as planned, each with its rank."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedllm.scheduling.log_names import log_of
from tests.slurm.cluster import program, until
from tests.slurm.workplace import Workplace

pytestmark = pytest.mark.slurm

# Who a process is, then the signals that it gets until the first of them has come to it.
SEVERAL = """
import json, os, pathlib, signal, sys, time
from dataclasses import asdict
from fedllm.scheduling.environment import TaskEnvironment
TaskEnvironment().require_planned_processes()
identity = TaskEnvironment().identity
place = pathlib.Path(sys.argv[1], f"{identity.task}.{identity.rank}.{os.getpid()}")
came = []
signal.signal(signal.SIGUSR2, lambda number, _frame: came.append(number))
told = {"cpus": len(os.sched_getaffinity(0)), "wanted": os.environ.get("SLURM_CPUS_PER_TASK")}
place.with_suffix(".told").write_text(json.dumps(asdict(identity) | told))
while not came:
    time.sleep(0.1)
place.with_suffix(".came").write_text(signal.Signals(came[0]).name)
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_task_of_two_processes_starts_exactly_two_and_usr2_reaches_both(
    make: Callable[..., Workplace], nodes: int
) -> None:
    work: Workplace = make()
    program(work.jobs, "client", SEVERAL)
    alone = work.job("several", **{"cpus-per-task": 2})
    job = replace(alone, processes_per_task=2, nodes_per_task=nodes)
    work.scheduler.check([job])
    (task,) = work.scheduler.submit(job)

    def found(kind: str) -> list[Path]:
        # in the order of their ranks
        return sorted(work.told.glob(f"{task}.*.{kind}"))

    until(lambda: len(found("told")) == 2 and all(p.stat().st_size for p in found("told")))
    told = [json.loads(path.read_text()) for path in found("told")]
    assert [each["rank"] for each in told] == [0, 1]
    assert [each["local_rank"] for each in told] == [0, 2 - nodes]
    assert [each["num_processes"] for each in told] == [2, 2]
    assert len({each["node"] for each in told}) == nodes
    assert [each["wanted"] for each in told] == ["2", "2"]
    assert told[0]["rendezvous"] == told[1]["rendezvous"] != ""
    assert [each["log"] for each in told] == [
        str(log_of(work.logs, task, process=rank)) for rank in (0, 1)
    ]
    subprocess.run(["scancel", "--signal=USR2", task], check=True)
    work.until_gone([task])
    assert [path.read_text() for path in found("came")] == ["SIGUSR2", "SIGUSR2"]
    assert len(found("told")) == 2
    assert work.scheduler.endings([task]) == {}
