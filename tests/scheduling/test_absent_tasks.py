"""Laws of absence: a task is gone only if Slurm says so, whatever an answer leaves out."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config.models import SchedulerSection
from fedllm.scheduling.seam import CancelRefused, SchedulerUnreachable, TaskState
from fedllm.scheduling.slurm.command_output import MARK, marked_lines
from fedllm.scheduling.slurm.commands import CommandRefused
from fedllm.scheduling.slurm.executor import SlurmScheduler
from tests.scheduling.slurm_double import Answering

QUERY_SECONDS = 60.0
FORGOTTEN = CommandRefused("slurm_load_jobs error: Invalid job id specified")
STATES = ("RUNNING", "PENDING", "SUSPENDED", "COMPLETED")
OWN = "squeue --noheader --array -t all --user="
BY_ID = "squeue --noheader --array -t all --jobs="
SHOW = "scontrol --oneliner show job"


def line(task: str, state: str, reason: str = "None") -> str:
    return f"{MARK}{task}|{state}|lab|normal|low|{reason}\n"


def scheduler_of(**answers: str | Exception) -> tuple[SlurmScheduler, Answering]:
    slurm = Answering()
    names = {"own": OWN, "by_id": BY_ID, "show": SHOW, "scancel": "scancel"}
    slurm.answers |= {names[name]: said for name, said in answers.items()}
    section = SchedulerSection(query_seconds=QUERY_SECONDS)
    return SlurmScheduler(section=section, commands=slurm), slurm


@pytest.mark.parametrize("show", ["", "JobId=7 JobState=RUNNING\n", SchedulerUnreachable("away")])
def test_an_empty_answer_ends_no_task_until_slurm_says_that_it_knows_no_such_job(
    show: str | Exception,
) -> None:
    scheduler, slurm = scheduler_of(own="", by_id="", show=show)
    for _ in range(3):
        assert scheduler.states(["7_0", "7_1"]) == dict.fromkeys(["7_0", "7_1"], TaskState.UNKNOWN)
        trouble = scheduler.trouble()
        assert trouble
        assert "job 7" in trouble
        slurm.now += 2 * QUERY_SECONDS
    slurm.answers[SHOW] = FORGOTTEN
    assert set(scheduler.states(["7_0", "7_1"]).values()) == {TaskState.GONE}
    assert scheduler.trouble() is None


def test_tasks_of_another_member_of_the_group_are_asked_for_by_id() -> None:
    scheduler, slurm = scheduler_of(
        own=line("8_0", "RUNNING"),
        by_id=line("7_0", "RUNNING") + line("7_1", "PENDING", "JobHeldAdmin"),
    )
    ids = ["7_0", "7_1", "7_2", "8_0"]
    for _ in range(5):
        assert [state.value for state in scheduler.states(ids).values()] == [
            *("running", "waiting", "gone", "running")
        ]
        assert scheduler.waiting_for(ids) == {"7_1": "JobHeldAdmin"}
    assert (slurm.count(OWN), slurm.count(BY_ID), slurm.count(SHOW)) == (1, 1, 0)
    slurm.now += QUERY_SECONDS
    slurm.answers[BY_ID] = FORGOTTEN
    assert scheduler.states(["7_0"]) == {"7_0": TaskState.GONE}


PRIVATE = "PrivateData             = jobs,usage\n"
SOMEBODY = 1_000_007


@pytest.mark.parametrize("config", [PRIVATE, SchedulerUnreachable("away"), "cut"])
def test_a_job_that_slurm_may_hide_is_unknown_until_the_accounting_shows_its_end(
    config: str | Exception,
) -> None:
    scheduler, slurm = scheduler_of(own="", by_id=FORGOTTEN)
    slurm.answers["scontrol show config"] = config
    scheduler.attribute(["7_0", "7_1"], SOMEBODY)
    for said in ("", "x|7_0|COMPLETED\nx|7_1|RUNNING\n", "x|7_[0-1]|PREEMPTED\n"):
        slurm.answers["sacct "] = said
        slurm.now += QUERY_SECONDS
        assert set(scheduler.states(["7_0", "7_1", "8_0"]).values()) == {
            *(TaskState.UNKNOWN, TaskState.GONE)
        }
        assert scheduler.states(["8_0"]) == {"8_0": TaskState.GONE}
        scheduler.states(["7_0"])
        trouble = scheduler.trouble() or ""
        assert trouble.startswith("Slurm hides the jobs of other users here (PrivateData=jobs)")
        assert f"have user {SOMEBODY} resume this run" in trouble
    slurm.answers["sacct "] = "x|7_0|COMPLETED\nx|7_1|CANCELLED by 0\n"
    slurm.now += QUERY_SECONDS
    assert set(scheduler.states(["7_0", "7_1"]).values()) == {TaskState.GONE}
    assert scheduler.trouble() is None


def test_a_job_of_another_user_is_gone_where_slurm_hides_none() -> None:
    scheduler, slurm = scheduler_of(own="", by_id=FORGOTTEN)
    slurm.answers["scontrol show config"] = "PrivateData             = none\n"
    scheduler.attribute(["7_0"], SOMEBODY)
    assert scheduler.states(["7_0"]) == {"7_0": TaskState.GONE}


def test_tasks_that_ended_a_while_ago_are_asked_for_once() -> None:
    scheduler, slurm = scheduler_of(own="", by_id=FORGOTTEN)
    for _ in range(5):
        assert scheduler.states(["7_0", "7_1"]) == dict.fromkeys(["7_0", "7_1"], TaskState.GONE)
        slurm.now += QUERY_SECONDS
    assert (slurm.count(OWN), slurm.count(BY_ID)) == (5, 1)


def test_a_task_that_comes_back_is_alive_again() -> None:
    scheduler, slurm = scheduler_of(own=line("7_0", "COMPLETED"))
    assert scheduler.states(["7_0"]) == {"7_0": TaskState.GONE}
    slurm.now += QUERY_SECONDS
    slurm.answers[OWN] = line("7_0", "PENDING", "BeginTime")
    assert scheduler.states(["7_0"]) == {"7_0": TaskState.WAITING}


ANSWERS = st.lists(
    st.builds(lambda n, state: line(f"7_{n}", state), st.integers(0, 30), st.sampled_from(STATES)),
    min_size=1,
    max_size=6,
    unique_by=lambda text: text.partition("|")[0],
)


@given(answer=ANSWERS, data=st.data())
def test_no_cut_of_an_answer_takes_a_living_task_for_gone(
    answer: Sequence[str], data: st.DataObject
) -> None:
    whole = "".join(answer)
    living = [
        text.partition("|")[0].removeprefix(MARK) for text in answer if "COMPLETED" not in text
    ]
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    # the first answer is cut; asked by id, squeue answers in full
    scheduler, _ = scheduler_of(own=cut, by_id=whole)
    assert TaskState.GONE not in scheduler.states(living).values()
    # it answers nothing, and scontrol knows the job
    scheduler, _ = scheduler_of(own=cut, by_id="", show="JobId=7\n")
    assert TaskState.GONE not in scheduler.states(living).values()


@given(answer=ANSWERS, data=st.data())
def test_an_answer_cut_within_a_line_is_no_answer(
    answer: Sequence[str], data: st.DataObject
) -> None:
    whole = "".join(answer)
    end = data.draw(st.integers(1, len(whole) - 1))
    rest = whole[:end].rpartition("\n")[2]
    if MARK in rest:
        with pytest.raises(SchedulerUnreachable, match="was cut at"):
            marked_lines(whole[:end])
    else:
        assert marked_lines(whole[:end]) == marked_lines(whole[: end - len(rest)])


@given(noise=st.text(max_size=200))
def test_no_text_in_the_place_of_an_answer_is_an_error_of_fedllm(noise: str) -> None:
    for answers in ({"own": noise}, {"own": "", "by_id": noise, "show": noise}):
        scheduler, _ = scheduler_of(**answers)
        scheduler.states(["7_0"])
        scheduler.endings(["7_0"])
        scheduler.capacity({})


def test_a_refused_scancel_is_an_error_and_a_job_that_ended_is_none() -> None:
    scheduler, slurm = scheduler_of(scancel=CommandRefused("Kill job error on job id 7: gone"))
    scheduler.cancel(["7_0"])
    slurm.answers["scancel"] = CommandRefused(
        "Kill job error on job id 7: Access/permission denied"
    )
    with pytest.raises(CancelRefused, match="their owner or an admin has to end 7_"):
        scheduler.cancel(["7_0"])
