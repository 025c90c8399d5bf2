"""The environment of a process tells its task, its job and its ranks."""

import os
from collections.abc import Mapping

import pytest

from fedllm.errors import UserError
from fedllm.scheduling.environment import TaskEnvironment, TaskIdentity, become_task

ARRAY = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "15"}


def given(variables: Mapping[str, str]) -> TaskEnvironment:
    return TaskEnvironment(variables=variables)


def test_a_task_is_what_slurm_or_its_starter_calls_it() -> None:
    node = {"SLURMD_NODENAME": "n1", "SLURM_JOB_NAME": "a01"}
    assert given(ARRAY | node).identity == TaskIdentity(task="12_3", node="n1", log="", array="a01")
    assert given({"SLURM_JOB_ID": "15"}).identity.task == "15"
    named = given(ARRAY | {"FEDLLM_TASK": "mine", "FEDLLM_LOG": "l"}).identity
    assert (named.task, named.log) == ("mine", "l")
    here = given({}).identity.task
    assert here.startswith("local:")
    assert f":{os.getpid()}:" in here
    assert given({}).identity.task == here


def test_the_job_is_that_of_the_batch_system_and_none_elsewhere() -> None:
    assert given(ARRAY).job == "15"
    assert given({"FEDLLM_TASK": "local-1"}).job is None


def test_only_a_task_of_an_array_of_ours_may_requeue_itself() -> None:
    ours = given(ARRAY | {"FEDLLM_TASK": "12_3"})
    assert ours.is_array_task("12_3")
    # a local worker, and a worker started by hand, inside the user's own allocation
    assert not given(ARRAY | {"FEDLLM_TASK": "local-1"}).is_array_task("local-1")
    assert not given(ARRAY).is_array_task("12_3")
    assert not given({"SLURM_JOB_ID": "15"}).is_array_task("15")


def test_a_process_that_takes_task_after_task_is_the_one_it_took_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", dict(ARRAY))
    become_task("local-7", "/logs/worker-1.log")
    identity = TaskEnvironment().identity
    assert (identity.task, identity.log) == ("local-7", "/logs/worker-1.log")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FEDLLM_PROCESSES": "two"}, "FEDLLM_PROCESSES: got 'two', need a whole number"),
        ({"FEDLLM_RANK": "-1"}, "FEDLLM_RANK: got '-1', need a whole number"),
        (
            {"FEDLLM_PROCESSES": "2", "FEDLLM_RENDEZVOUS": "n1:15000"},
            "FEDLLM_RANK: not set in a task of 2 processes (FEDLLM_PROCESSES); set it to 0 ... 1, "
            "or use srun",
        ),
        (
            {"FEDLLM_PROCESSES": "2", "FEDLLM_RANK": "2", "FEDLLM_RENDEZVOUS": "n1:15000"},
            "FEDLLM_RANK: got 2 in a task of 2 processes (FEDLLM_PROCESSES); need less than 2",
        ),
        (
            {"FEDLLM_PROCESSES": "2", "FEDLLM_RANK": "1"},
            "FEDLLM_RENDEZVOUS: not set in a task of 2 processes (FEDLLM_PROCESSES); set it to "
            "HOST:PORT of the first process, the same for all",
        ),
    ],
)
def test_a_process_without_its_place_among_the_others_is_refused(
    variables: Mapping[str, str], message: str
) -> None:
    environment = given(variables)
    with pytest.raises(UserError) as caught:
        environment.require_planned_processes()
    assert str(caught.value) == message
    assert environment.identity.num_processes >= 1


def test_ranks_are_those_of_the_tasks_own_step() -> None:
    step = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "FEDLLM_LOG": "/logs/7_1_%t_log.out"}
    found = TaskEnvironment(
        variables=step | {"FEDLLM_TASK": "7_1", "FEDLLM_PROCESSES": "4"}
    ).identity
    assert (found.rank, found.num_processes, found.local_rank) == (3, 4, 1)
    assert (found.is_first, found.log) == (False, "/logs/7_1_3_log.out")
    # the ranks belong to another step
    alone = TaskEnvironment(variables=step | {"FEDLLM_TASK": "local"}).identity
    assert (alone.rank, alone.num_processes, alone.is_first) == (0, 1, True)
