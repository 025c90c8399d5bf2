"""Whatever is killed, cancelled, crashed, preempted, restarted or full: the bits of a quiet run."""

from collections import Counter

import pytest

from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import AggregateRecord, CollectionRecord
from tests.chaos.conftest import Aftermath
from tests.chaos.plan import FEWEST_FAULTS, ROUNDS, Kind
from tests.rounds.simulation import states
from tests.slurm.cluster import until
from tests.slurm.runs import published

pytestmark = pytest.mark.slurm


def test_every_fault_of_the_plan_hit_and_every_kind_did(aftermath: Aftermath) -> None:
    landed = [one.fault for one in aftermath.campaign.landed]
    assert sorted(fault.number for fault in landed) == sorted(
        fault.number for fault in aftermath.campaign.plan.faults
    )
    assert {fault.kind for fault in landed} == set(Kind)
    assert len(landed) >= FEWEST_FAULTS
    assert len({fault.round for fault in landed}) >= 4


def test_every_state_has_the_bits_of_a_quiet_run(aftermath: Aftermath) -> None:
    paths, quiet = aftermath.campaign.paths, states(aftermath.quiet)
    assert len(quiet) == ROUNDS + 1
    assert states(paths.root) == quiet
    recorded = {
        f"{number:04d}": AggregateRecord.read(paths.round(number).aggregate_record).sha256
        for number in range(ROUNDS + 1)
    }
    assert recorded == quiet


def test_no_published_client_was_trained_again(aftermath: Aftermath) -> None:
    campaign = aftermath.campaign
    for number in range(1, ROUNDS + 1):
        paths = campaign.paths.round(number)
        kept = RoundPaths(root=campaign.kept / paths.root.name)
        trained = Counter(record.client for record in published(kept))
        collection = CollectionRecord.read(paths.collection)
        assert trained == Counter(update.client for update in collection.updates)


def test_no_job_is_left_in_the_queue(aftermath: Aftermath) -> None:
    until(lambda: not aftermath.cluster.slurm("squeue", "-h"), seconds=60)
