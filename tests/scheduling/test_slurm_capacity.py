"""Capacity of a cluster, from Slurm's output on limits and nodes."""

from typing import Any

import pytest

from fedllm.config.models import SchedulerSection
from fedllm.errors import ConfigError, UserError
from fedllm.planning.capacity import Capacity, TaskSize
from fedllm.scheduling.seam import SchedulerUnreachable
from fedllm.scheduling.slurm.commands import CommandRefused
from fedllm.scheduling.slurm.executor import SlurmScheduler
from fedllm.scheduling.slurm.nodes import NODE_COLUMNS
from tests.scheduling.slurm_double import ACCOUNTS, CONFIG, NODES, PARTITIONS, QOS, Answering

ENVIRONMENT = ("SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS")


@pytest.fixture(autouse=True)
def _no_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def capacity(slurm: Answering | None = None, *, most: int = 16, **options: Any) -> Capacity:
    section = SchedulerSection(max_parallel=most)
    return SlurmScheduler(section=section, commands=slurm or Answering()).capacity(options)


def slurm_with(**answers: str) -> Answering:
    """Return Slurm's commands with other answers, each named by a word of its command."""
    slurm = Answering()
    for word, said in answers.items():
        slurm.answers[next(begin for begin in slurm.answers if word in begin)] = said
    return slurm


def test_limits_of_association_account_and_cluster_are_taken_together() -> None:
    # MaxSubmitJobs 5, one job runs, one place is kept; GrpJobs 3 of `team`, above `lab`
    assert capacity() == Capacity(
        free_slots=3, max_parallel=3, largest_array=10, free_tasks=3, max_minutes=None
    )


def test_an_association_of_a_partition_comes_before_one_of_all() -> None:
    short = capacity(partition="short")
    # MaxSubmitJobs 2; the job that runs is counted elsewhere
    assert short.free_tasks == 1
    assert short.max_minutes == 30


def test_a_qos_comes_before_the_association() -> None:
    big = capacity(qos="big")
    # MaxSubmitPU 8, of which none is used; GrpSubmitJobs 9 of `team`, of which one is
    assert big.free_tasks == 7
    assert big.max_minutes == 120


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ("big|6|8|2||||||||", 2),
        ("big|6|8|||1|||||", 1),
        # 6 GiB and 4 CPUs for all jobs of the user, 2 of these each
        ("big|9|8|9||||||cpu=4,mem=6G||".replace("||||||cpu", "|||||cpu"), 2),
    ],
)
def test_what_may_run_at_once_is_the_least_of_all_limits(limits: str, most: int) -> None:
    slurm = slurm_with(qos=limits + "\n", assoc=ACCOUNTS.replace("3|9|cpu=6,gres/gpu=3", "|9|"))
    found = capacity(slurm, qos="big", cpus_per_task=2, mem=100)
    assert found.max_parallel == most


def test_the_qos_of_a_partition_comes_before_that_of_the_job() -> None:
    slurm = slurm_with(
        partition=PARTITIONS.replace("QoS=N/A", "QoS=part"), qos=QOS + "part|2|4|||||00:10:00|||\n"
    )
    found = capacity(slurm, qos="big")
    # one job is in this partition
    assert (found.max_parallel, found.free_tasks, found.max_minutes) == (2, 2, 10)


def test_options_come_before_the_environment_and_that_before_the_default_account(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", "root")
    assert capacity().free_tasks is None
    assert capacity(account="lab").free_tasks == 3


def test_tasks_just_submitted_count_before_slurm_lists_them() -> None:
    slurm = Answering()
    scheduler = SlurmScheduler(section=SchedulerSection(), commands=slurm)
    assert scheduler.capacity({}).free_tasks == 3
    scheduler._queue.expect(["7_0", "7_1"])
    assert scheduler.capacity({}).free_tasks == 1
    scheduler._queue.expect(["8_0", "8_1", "8_2"])
    assert scheduler.capacity({}).free_tasks == 0


def test_without_enforcement_no_limit_counts_and_none_is_asked_for() -> None:
    slurm = slurm_with(config=CONFIG.replace("associations,limits,qos", "none"))
    found = capacity(slurm)
    assert (found.free_tasks, found.max_parallel, found.largest_array) == (None, 16, 10)
    assert slurm.count("sacctmgr") == 0


def test_an_array_is_never_larger_than_a_folder_should_be() -> None:
    large = CONFIG.replace("= 10", "= 100001")
    assert capacity(slurm_with(config=large)).largest_array == 400
    throttled = large.replace("bf_continue", "max_array_tasks=50")
    assert capacity(slurm_with(config=throttled)).largest_array == 50


@pytest.mark.parametrize(
    ("size", "options", "slots"),
    [
        # n1 has 2 CPUs and a GPU free, n2 has 4 and 2
        (TaskSize(processes=2), {"mem": 1}, 3),
        (TaskSize(processes=2, nodes=2), {"mem": 1}, 2),
        (TaskSize(processes=4, nodes=2), {"mem": 1}, 1),
        (TaskSize(processes=6, nodes=2), {"mem": 1}, 0),
        (TaskSize(processes=2, nodes=2), {"mem": 1, "gpus-per-task": 1}, 1),
        (TaskSize(processes=3, nodes=3), {"mem": 1}, 0),
    ],
)
def test_a_task_of_several_nodes_needs_room_on_each(
    size: TaskSize, options: dict[str, Any], slots: int
) -> None:
    section = SchedulerSection(max_parallel=16)
    scheduler = SlurmScheduler(section=section, commands=slurm_with(**UNLIMITED))
    assert scheduler.capacity(options, size).free_slots == slots


UNLIMITED = {"config": CONFIG.replace("associations,limits,qos", "none")}


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        # n1 has 2 CPUs, 3000 MiB and a GPU free; n2 has 4, 4000 and 2
        ({"mem": 100}, 6),
        ({"mem": 1000}, 6),
        ({"mem": "1500M"}, 4),
        ({"mem": "2G"}, 2),
        ({"mem-per-cpu": 800, "cpus-per-task": 2}, 3),
        ({"mem": 0}, 1),
        ({"cpus-per-task": 3, "mem": 1}, 1),
        ({"cpus-per-task": 5, "mem": 1}, 0),
        ({"gpus": 1, "mem": 1}, 3),
        ({"gres": "gpu:2", "mem": 1}, 1),
        ({"gpus-per-task": "a100:1", "mem": 1}, 0),
        ({"gpus": 1, "mem-per-gpu": 3500}, 1),
        ({"N": 1, "G": 2, "c": 2, "mem": 1}, 1),
        ({"gpus": 1, "cpus-per-gpu": 4, "mem": 1}, 1),
        ({"exclusive": True, "mem": 1}, 1),
        ({"constraint": "a100&ib", "mem": 1}, 4),
        ({"constraint": "v100|ib", "mem": 1}, 4),
        ({"constraint": "v100", "mem": 1}, 0),
        # what only Slurm understands leaves the nodes in
        ({"constraint": "[a100*2&ib]", "mem": 1}, 6),
        ({"nodelist": "n[1-1]", "mem": 1}, 2),
        ({"exclude": "n2", "mem": 1}, 2),
        # 200 MiB a CPU
        ({}, 6),
        # as many as may run
        ({"reservation": "mine"}, 16),
        ({"cpus-per-task": "many"}, 16),
    ],
)
def test_free_slots_are_what_fits_the_idle_resources(options: dict[str, Any], slots: int) -> None:
    assert capacity(slurm_with(**UNLIMITED), **options).free_slots == slots


@pytest.mark.parametrize(
    ("state", "slots"),
    [("idle", 4), ("mixed", 4), ("idle~", 4), ("idle*", 0), ("drained", 0), ("reserved", 0)],
)
def test_a_node_takes_tasks_only_in_a_state_to_do_so(state: str, slots: int) -> None:
    assert len(NODE_COLUMNS) == NODES.splitlines()[1].rstrip("|").count("|") + 1
    line = NODES.splitlines()[1].replace("idle", state)
    assert capacity(slurm_with(**UNLIMITED, sinfo=line), mem=1).free_slots == slots


def test_whole_cores_are_taken_where_slurm_gives_them() -> None:
    nodes = "n1|idle|0/8/0/8|2|4000|0|(null)|(null)|(null)|\n"
    cores = UNLIMITED["config"].replace("CR_CPU_MEMORY", "CR_CORE_MEMORY")
    assert capacity(slurm_with(config=cores, sinfo=nodes), mem=1).free_slots == 4
    assert capacity(slurm_with(**UNLIMITED, sinfo=nodes), mem=1).free_slots == 8


def test_without_a_default_a_task_takes_all_memory_of_a_node() -> None:
    config = UNLIMITED["config"].replace("DefMemPerCPU            = 200\n", "")
    assert capacity(slurm_with(config=config)).free_slots == 1
    # this partition gives 2000 MiB
    assert capacity(slurm_with(config=config), partition="short").free_slots == 3
    assert capacity(slurm_with(config=config.replace("_MEMORY", ""))).free_slots == 6


@pytest.mark.parametrize(
    "error", [SchedulerUnreachable("away"), CommandRefused("no"), UserError("not found")]
)
@pytest.mark.parametrize("silent", ["scontrol", "sacctmgr", "sinfo"])
def test_what_slurm_does_not_tell_limits_nothing(silent: str, error: Exception) -> None:
    slurm = Answering()
    slurm.answers |= {begin: error for begin in slurm.answers if begin.startswith(silent)}
    found = capacity(slurm, mem=1)
    expected = {
        "scontrol": (16, 16, 400, None),
        "sacctmgr": (6, 16, 10, None),
        "sinfo": (3, 3, 10, 3),
    }
    measured = (found.free_slots, found.max_parallel, found.largest_array, found.free_tasks)
    assert measured == expected[silent]


def test_without_an_answer_about_the_queue_it_counts_as_empty() -> None:
    slurm = Answering()
    slurm.answers["squeue"] = SchedulerUnreachable("away")
    assert capacity(slurm).free_tasks == 4


def test_slurm_is_asked_once_in_a_while() -> None:
    slurm = Answering()
    scheduler = SlurmScheduler(section=SchedulerSection(query_seconds=60), commands=slurm)
    for _ in range(5):
        scheduler.capacity({"mem": 1})
        scheduler.capacity({"mem": 2})
    assert len(slurm.asked) == len(set(slurm.asked)) == 7
    slurm.now = 61.0
    scheduler.capacity({"mem": 1})
    assert slurm.count("scontrol show config") == 1
    assert slurm.count("sinfo") == slurm.count("squeue") == 2


def test_an_option_of_our_own_is_refused_here_too() -> None:
    with pytest.raises(ConfigError, match="array: got 0-3; fedllm sets it"):
        capacity(array="0-3")


def test_a_container_that_knows_no_users_asks_for_no_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 2)
    slurm = Answering()
    assert capacity(slurm).free_tasks is None
    assert slurm.count("sacctmgr") == 0
