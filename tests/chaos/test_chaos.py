"""Whatever is killed, cancelled, crashed, preempted, restarted or full: the bits of a quiet run."""

from collections import Counter

import pytest

from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import AggregateRecord, CollectionRecord, UpdateRecord
from fedllm.storage.updates import read_records, update_files
from tests.chaos.conftest import Aftermath
from tests.chaos.plan import FEWEST_FAULTS, PLANTED, ROUNDS, Kind
from tests.rounds.simulation import states
from tests.slurm.cluster import until
from tests.slurm.runs import published

pytestmark = pytest.mark.slurm


def test_every_fault_of_the_plan_hit_and_every_kind_did(aftermath: Aftermath) -> None:
    landed = [one.fault for one in aftermath.campaign.landed]
    plan = aftermath.campaign.plan
    assert sorted(fault.number for fault in landed) == sorted(f.number for f in plan.faults)
    assert len({fault.round for fault in landed}) == plan.rounds
    if plan.rounds == ROUNDS:
        assert {fault.kind for fault in landed} == set(Kind)
        assert len(landed) >= FEWEST_FAULTS


def test_every_state_has_the_bits_of_a_quiet_run(aftermath: Aftermath) -> None:
    paths, quiet = aftermath.campaign.paths, states(aftermath.quiet)
    rounds = aftermath.campaign.plan.rounds
    assert len(quiet) == rounds + 1
    assert states(paths.root) == quiet
    recorded = {
        f"{number:04d}": AggregateRecord.read(paths.round(number).aggregate_record).sha256
        for number in range(rounds + 1)
    }
    assert recorded == quiet


def test_no_published_client_was_trained_again(aftermath: Aftermath) -> None:
    campaign = aftermath.campaign
    for number in range(1, campaign.plan.rounds + 1):
        paths = campaign.paths.round(number)
        kept = RoundPaths(root=campaign.kept / paths.root.name)
        trained = Counter(record.client for record in published(kept))
        # what cannot be checked is trained again: of another user, of a task that died meanwhile
        set_aside = Counter(record.client for record in set_aside_in(kept))
        collection = CollectionRecord.read(paths.collection)
        assert trained - set_aside == Counter(update.client for update in collection.updates)


def set_aside_in(kept: RoundPaths) -> list[UpdateRecord]:
    """Return the records of updates that were published, kept and then set aside."""
    folder = kept.root / "set-aside"
    files = folder.iterdir() if folder.exists() else ()
    inodes = {file.stat().st_ino for file in files}
    return [
        record
        for name in update_files(kept)
        if (kept.updates / name).stat().st_ino in inodes
        for record in read_records(kept.updates / name)
    ]


def test_no_update_that_no_worker_sent_was_used(aftermath: Aftermath) -> None:
    campaign = aftermath.campaign
    planted = [fault for fault in campaign.plan.faults if fault.kind in PLANTED]
    assert len(campaign.planted) == len(planted)
    rounds = [campaign.paths.round(number) for number in range(1, campaign.plan.rounds + 1)]
    collections = [CollectionRecord.read(paths.collection) for paths in rounds]
    used = {f"{c.round:04d}/{update.file}" for c in collections for update in c.updates}
    assert not used & campaign.planted
    # those that came before the end of their round are counted
    if campaign.plan.rounds == ROUNDS:
        assert sum(collection.refused for collection in collections) > 0


def test_no_job_is_left_in_the_queue(aftermath: Aftermath) -> None:
    until(lambda: not aftermath.cluster.slurm("squeue", "-h"), seconds=60)
