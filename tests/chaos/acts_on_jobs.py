"""Faults of processes, tasks, nodes and Slurm's controller."""

import os
import signal
import time
from typing import TYPE_CHECKING

from fedllm.storage.lease import current_lease, process_is_gone
from tests.chaos.plan import Fault
from tests.chaos.trip import Handling, Trip, dead, stopped, stopped_or_dead, told_to_end
from tests.slurm.cluster import until

if TYPE_CHECKING:
    from tests.chaos.campaign import Campaign

# so long slurmctld is away at least
_AWAY_SECONDS = 4.0
# the coordinator asks Slurm at least twice meanwhile
_LOOKED_AT_SECONDS = 1.5


def killed(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:  # noqa: ARG001
    """The wire killed the process."""
    yield from dead(trip)
    return trip.who


def cancel_task(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:  # noqa: ARG001
    """An admin cancels the task."""
    yield from stopped(trip)
    campaign.cluster.slurm("scancel", trip.task)
    yield from told_to_end(trip)
    yield from dead(trip)
    while campaign.state(trip.task) == "COMPLETING":
        yield
    assert campaign.state(trip.task) == "CANCELLED"
    return trip.who


def crash_node(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:  # noqa: ARG001
    """The task's node loses power, is declared down, and comes back."""
    yield from stopped(trip)
    campaign.cluster.devcluster("crash-node", trip.node)
    node = f"nodename={trip.node}"
    campaign.cluster.slurm("scontrol", "update", node, "state=down", "reason=crash")
    yield from dead(trip)
    campaign.cluster.devcluster("start-node", trip.node)
    return trip.who


def preempt(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:  # noqa: ARG001
    """A job of a higher partition takes the whole node."""
    yield from stopped(trip)
    words = ("--partition=high", f"--nodelist={trip.node}", "--exclusive", "--output=/dev/null")
    job = campaign.cluster.slurm("sbatch", "--parsable", *words, "--wrap=sleep 1").strip()
    yield from told_to_end(trip)
    while campaign.state(job) != "COMPLETED":
        yield
    assert trip.is_dead()
    return f"{trip.who}, by job {job}"


def suspend(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:  # noqa: ARG001
    """An admin suspends the task for a while."""
    yield from stopped(trip)
    campaign.cluster.slurm("scontrol", "suspend", trip.task)
    while campaign.state(trip.task) != "SUSPENDED":
        yield
    yield from _some_time()
    assert campaign.state(trip.task) == "SUSPENDED"
    campaign.cluster.slurm("scontrol", "resume", trip.task)
    trip.go_on()
    return trip.who


def hold(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:  # noqa: ARG001
    """An admin puts the task back into the queue and holds it there for a while."""
    yield from stopped(trip)
    campaign.is_requeueing = True
    campaign.cluster.slurm("scontrol", "requeuehold", trip.task)
    yield from told_to_end(trip)
    yield from dead(trip)
    while campaign.state(trip.task) not in {"PENDING", "REQUEUE_HOLD"}:
        yield
    campaign.is_requeueing = False
    yield from _some_time()
    campaign.cluster.slurm("scontrol", "release", trip.task)
    return trip.who


def restart_slurmctld(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:  # noqa: ARG001
    """Slurm's controller dies; the task goes on without it, and the controller comes back."""
    yield from stopped_or_dead(trip)
    while campaign.is_requeueing:
        # Slurm forgets the end of such a task while its controller is away, until the time limit
        yield
    campaign.cluster.devcluster("stop-controller")
    trip.go_on()
    # tasks publish and end, the coordinator asks in vain
    time.sleep(_AWAY_SECONDS)
    campaign.cluster.devcluster("start-controller")
    until(campaign.slurm_answers, seconds=60)
    return f"{trip.who} went on for {_AWAY_SECONDS:.0f} s without it"


def kill_coordinator(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:  # noqa: ARG001
    """The coordinator dies while the process of the trip stands in the midst of its work."""
    yield from stopped(trip)
    while not campaign.coordinates():
        yield
    _, holder = current_lease(campaign.paths)
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)
    while not process_is_gone(holder):
        yield
    trip.go_on()
    return f"coordinator, pid {holder.pid}, while {trip.who} was at it"


def _some_time() -> Handling:
    end = time.monotonic() + _LOOKED_AT_SECONDS
    while time.monotonic() < end:
        yield
    return ""
