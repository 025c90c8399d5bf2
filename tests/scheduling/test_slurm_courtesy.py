"""Slurm is queried rarely; no answer and a refusal have their own errors."""

from pathlib import Path
from typing import Any

import pytest

from fedllm.config.models import SbatchSection, SchedulerSection
from fedllm.errors import ConfigError
from fedllm.scheduling.seam import Job, SchedulerFull, SchedulerUnreachable, TaskState
from fedllm.scheduling.slurm.command_output import MARK
from fedllm.scheduling.slurm.commands import CommandRefused, InstalledCommands
from fedllm.scheduling.slurm.executor import SlurmScheduler
from tests.scheduling.slurm_double import Answering

LISTED = (
    f"{MARK}7_0|RUNNING|lab|normal|low|None\n{MARK}7_1|PENDING|lab|normal|low|Priority\n"
    f"{MARK}7_2|COMPLETED|lab|normal|low|None\n"
)
AWAY = SchedulerUnreachable("squeue: Unable to contact slurm controller (connect failure)")


@pytest.fixture
def slurm() -> Answering:
    return Answering()


@pytest.fixture
def scheduler(slurm: Answering) -> SlurmScheduler:
    return SlurmScheduler(section=SchedulerSection(query_seconds=60), commands=slurm)


def job(folder: Path, *, tasks: int = 1, **options: Any) -> Job:
    return Job(
        name="fedllm-x", program="client", argv=(), tasks=tasks, log_folder=folder, options=options
    )


def test_states_and_reasons_come_from_one_query_a_minute(
    slurm: Answering, scheduler: SlurmScheduler
) -> None:
    slurm.answers["squeue"] = LISTED
    ids = ["7_0", "7_1", "7_2"]
    for now in range(0, 120, 10):
        slurm.now = float(now)
        assert [state.value for state in scheduler.states(ids).values()] == [
            *("running", "waiting", "gone")
        ]
        assert scheduler.waiting_for(ids) == {"7_1": "Priority"}
        assert scheduler.trouble() is None
    assert len(slurm.asked) == 2


def test_an_outage_is_reported_and_queries_become_rarer(
    slurm: Answering, scheduler: SlurmScheduler
) -> None:
    slurm.answers["squeue"] = AWAY
    asked = []
    for now in range(0, 3600, 10):
        slurm.now = float(now)
        before = len(slurm.asked)
        assert scheduler.states(["7_0"]) == {"7_0": TaskState.UNKNOWN}
        if len(slurm.asked) > before:
            asked.append(now)
            pause = {0: 120, 120: 240}.get(now, 480)
            assert scheduler.trouble() == (
                f"Slurm does not answer ({AWAY}); asking again in {pause} s"
            )
    assert asked == [0, 120, 360, *range(840, 3600, 480)]
    slurm.answers["squeue"] = LISTED
    slurm.now = 4000.0
    assert scheduler.states(["7_0"]) == {"7_0": TaskState.RUNNING}
    assert scheduler.trouble() is None


def test_endings_of_all_tasks_are_one_question_and_news_are_asked_at_once(
    slurm: Answering, scheduler: SlurmScheduler
) -> None:
    slurm.answers["squeue"] = (
        "me|7_0|FAILED|256|n1|\nme|7_1|COMPLETED|0|n1|\nme|8_0|NODE_FAIL|0|n2|\n"
    )
    ended = scheduler.endings(["7_0", "7_1", "8_0"])
    assert {task: str(ending) for task, ending in ended.items()} == {
        "7_0": "FAILED, exit code 1:0 on n1",
        "8_0": "NODE_FAIL, exit code 0:0 on n2",
    }
    scheduler.endings(["7_0", "7_1", "8_0"])
    assert (slurm.count("squeue"), slurm.count("sacct ")) == (1, 0)
    assert "--jobs=7,8" in slurm.asked[0]
    # Slurm does not know this task: queried again only after a while, unless there are new ones
    for _ in range(3):
        assert scheduler.endings(["9_0"]) == {}
    assert (slurm.count("squeue"), slurm.count("sacct ")) == (2, 1)
    scheduler.endings(["9_0", "9_1"])
    assert slurm.count("squeue") == 3
    slurm.now = 61.0
    slurm.answers["sacct "] = "|9_[0-1]|CANCELLED by 5|0:0|None assigned\n"
    assert set(scheduler.endings(["9_0", "9_1"])) == {"9_0", "9_1"}


@pytest.mark.parametrize(
    "state",
    ["PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "SUSPENDED", "STOPPED", "COMPLETING"],
)
def test_a_task_that_waits_runs_or_is_being_signalled_has_not_ended(
    slurm: Answering, scheduler: SlurmScheduler, state: str
) -> None:
    slurm.answers["squeue"] = f"me|7_0|{state}|0|n1|\n"
    slurm.answers["sacct "] = f"me|7_0|{state}|0:0|n1\n"
    assert scheduler.endings(["7_0"]) == {}


def test_endings_are_not_asked_for_again_and_again_while_slurm_is_away(
    slurm: Answering, scheduler: SlurmScheduler
) -> None:
    slurm.answers["squeue"] = slurm.answers["sacct "] = AWAY
    for number in range(10):
        assert scheduler.endings([f"{number}_0"]) == {}
    assert slurm.count("squeue") == 1
    slurm.now = 121.0
    slurm.answers["squeue"] = "me|3_0|FAILED|256|n1|\n"
    assert set(scheduler.endings(["3_0"])) == {"3_0"}


def test_a_site_without_accounting_is_asked_once(
    slurm: Answering, scheduler: SlurmScheduler
) -> None:
    slurm.answers["squeue"] = ""
    slurm.answers["sacct "] = CommandRefused("Slurm accounting storage is disabled")
    assert scheduler.find("a") is None
    assert scheduler.find("b") is None
    assert scheduler.endings(["7_0"]) == {}
    assert slurm.count("sacct ") == 1


def test_no_more_than_ten_submissions_fall_into_a_minute(
    slurm: Answering, scheduler: SlurmScheduler, tmp_path: Path
) -> None:
    times = []
    for _ in range(25):
        scheduler.submit(job(tmp_path))
        times.append(slurm.now)
    assert times == [0.0] * 10 + [60.0] * 10 + [120.0] * 5


@pytest.mark.parametrize(
    "said",
    [
        "AssocMaxSubmitJobLimit; Batch job submission failed: Job violates accounting/QOS policy "
        "(job submit limit, user's size and/or time limits)",
        "QOSMaxSubmitJobPerUserLimit; Batch job submission failed: Job violates accounting/QOS "
        "policy (job submit limit, user's size and/or time limits)",
    ],
)
def test_a_full_queue_is_no_fault_of_the_configuration(
    said: str, slurm: Answering, scheduler: SlurmScheduler, tmp_path: Path
) -> None:
    slurm.answers["sbatch"] = CommandRefused(said)
    with pytest.raises(SchedulerFull, match="SubmitJob"):
        scheduler.submit(job(tmp_path))
    # a test of jobs does not report this
    scheduler.check([job(tmp_path)])


def test_where_sbatch_gives_no_reason_the_limits_tell_whether_the_queue_is_full(
    slurm: Answering, scheduler: SlurmScheduler, tmp_path: Path
) -> None:
    said = "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, "
    slurm.answers["sbatch"] = CommandRefused(said + "user's size and/or time limits)")
    # 5 at most, one runs
    with pytest.raises(SchedulerFull):
        scheduler.submit(job(tmp_path, tasks=5))
    with pytest.raises(ConfigError, match=r"^scheduler\.sbatch\.client\.account: lab: refused"):
        scheduler.submit(job(tmp_path, tasks=4, account="lab"))


def test_all_that_is_wrong_with_all_jobs_is_told_together(slurm: Answering, tmp_path: Path) -> None:
    sbatch = SbatchSection(
        default={"partition": "nope"}, client={"array": "0-3"}, prepare={"time": "soon"}
    )
    section = SchedulerSection(sbatch=sbatch)
    scheduler = SlurmScheduler(section=section, commands=slurm)
    slurm.answers["sbatch --test-only --nodes=1 --ntasks=1 --time=soon"] = CommandRefused(
        "Invalid --time specification"
    )
    slurm.answers["sbatch"] = CommandRefused(
        "invalid partition specified: nope; allocation failure: Invalid partition name specified"
    )
    prepare = Job(
        name="p", program="prepare", argv=(), log_folder=tmp_path, options={"time": "soon"}
    )
    same = [job(tmp_path, partition="nope") for _ in range(3)]
    with pytest.raises(ConfigError) as caught:
        scheduler.check([prepare, *same, job(tmp_path, array="0-3")])
    assert str(caught.value).splitlines() == [
        "scheduler.sbatch.client.array: got 0-3; fedllm sets it (the number of tasks and "
        "scheduler.max_parallel decide it); remove it",
        "scheduler.sbatch.prepare.time: soon: refused by sbatch (Invalid --time specification); "
        "change it",
        "scheduler.sbatch.default.partition: nope: refused by sbatch (invalid partition "
        "specified: nope; allocation failure: Invalid partition name specified); change it; "
        "partitions here: high, low, short",
    ]


def test_a_check_says_so_when_slurm_is_away(
    slurm: Answering, scheduler: SlurmScheduler, tmp_path: Path
) -> None:
    slurm.answers = dict.fromkeys(slurm.answers, AWAY)
    with pytest.raises(SchedulerUnreachable):
        scheduler.check([job(tmp_path)])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"partition": "short", "time": "0-01:00"},
            "scheduler.sbatch.client.time: 0-01:00: partition short allows 30 minutes; "
            "ask for no more",
        ),
        (
            {"qos": "big", "time": 121},
            "scheduler.sbatch.client.time: 121: partition low with QOS big allows 120 minutes; "
            "ask for no more",
        ),
        ({"partition": "short", "time": 30}, None),
        ({"partition": "short", "time": None}, None),
    ],
)
def test_a_time_that_no_partition_allows_is_told_though_sbatch_takes_it(
    options: dict[str, Any], told: str | None, scheduler: SlurmScheduler, tmp_path: Path
) -> None:
    if told is None:
        scheduler.check([job(tmp_path, **options)])
        return
    with pytest.raises(ConfigError) as caught:
        scheduler.check([job(tmp_path, **options)])
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("Invalid account or account/partition combination specified", "may use: lab, root"),
        ("Invalid qos specification", "may use: big, normal"),
    ],
)
def test_a_refusal_names_what_there_is_instead(
    said: str, hint: str, slurm: Answering, scheduler: SlurmScheduler, tmp_path: Path
) -> None:
    slurm.answers["sbatch"] = CommandRefused(said)
    with pytest.raises(ConfigError, match=hint):
        scheduler.check([job(tmp_path)])


def test_jobs_of_equal_options_are_tested_once(
    slurm: Answering, scheduler: SlurmScheduler, tmp_path: Path
) -> None:
    scheduler.check([job(tmp_path, mem=1), job(tmp_path, mem=2), job(tmp_path, mem=1)])
    assert slurm.count("sbatch --test-only") == 2
    scheduler.check([job(tmp_path, mem=1)])
    assert slurm.count("sbatch --test-only") == slurm.count("sbatch") == 3


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("sleep 60", SchedulerUnreachable),
        # at MaxJobCount sbatch prints this for two minutes
        (
            "echo 'sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying' "
            ">&2; exec sleep 60",
            SchedulerFull,
        ),
        (
            "echo 'sbatch: error: Batch job submission failed: Resource temporarily unavailable' "
            ">&2; exit 1",
            SchedulerFull,
        ),
    ],
)
def test_a_call_returns_even_if_its_command_does_not(
    script: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "sbatch"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(error):
        InstalledCommands(timeout_seconds=1).call(["sbatch", "file"])
