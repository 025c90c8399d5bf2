"""Limits on a real cluster: MaxArraySize 10 and MaxSubmitJobs 5 work, by splits and waves."""

from dataclasses import replace

import pytest

from fedllm.storage.paths import RunPaths
from fedllm.storage.records import JobsRecord, SubmissionRecord
from tests.cli.commands import fedllm
from tests.rounds.simulation import states
from tests.slurm.cluster import Cluster
from tests.slurm.runs import Begun, each_trained_once

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize("cluster", ["limited"], indirect=True)
def test_a_round_of_more_tasks_than_may_be_submitted_goes_out_in_waves(
    begun: Begun, cluster: Cluster
) -> None:
    del cluster
    many = replace(begun, inline=(*begun.inline, "clients.cohort.count=7"))
    root = many.run("run", rounds=1)
    paths = RunPaths(root=root).round(2)
    # one task per client: more of them than there is room for
    literal = ("scheduler.clients_per_bundle=auto", "scheduler.clients_per_task=1")
    done = fedllm(*many.words(root, *literal))
    assert done.returncode == 0, done.stderr
    assert states(root) == states(many.run("inline", rounds=2))
    assert each_trained_once(paths)
    plan = SubmissionRecord.read(paths.attempt(1).submission)
    tasks = [array.tasks for array in plan.arrays]
    assert sum(tasks) == len(plan.bundles) > 4
    assert len(tasks) > 1
    # one place is kept for the aggregation
    assert max(tasks) <= 4
    assert len(JobsRecord.read(paths.attempt(1).jobs).ids) == len(tasks)
    assert paths.last_attempt() == 1
