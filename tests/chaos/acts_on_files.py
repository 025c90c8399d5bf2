"""Faults of the file server, and what people do to a run directory."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm.storage.lease import current_lease
from tests.chaos.plan import ERRNOS, Fault
from tests.chaos.trip import Handling, Trip, dead, is_dead, stopped
from tests.cli.commands import FEDLLM

if TYPE_CHECKING:
    from tests.chaos.campaign import Campaign

# so many calls on files of the run fail in a row
_FAILED_CALLS = 3


def fill_disk(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:  # noqa: ARG001
    """The file system of the run is full until the coordinator ended for it."""
    yield from stopped(trip)
    while not campaign.coordinates():
        yield
    campaign.disk_is_full = True
    filler = campaign.disk / "filler"
    _fill(filler)
    said = campaign.command.log.stat().st_size
    trip.go_on()
    while (ending := campaign.coordinator.ending()) in {None, "-9"}:
        if ending:
            # another fault's moment came first: it goes on where the disk is still full
            campaign.coordinator.start()
        yield
    line = campaign.command.log.read_bytes()[said:].decode().strip().rpartition("\n")[2]
    assert ending == "3", f"on a full disk the coordinator ended with {ending}: {line}"
    assert str(campaign.command.root) in line, line
    assert "no space left on device" in line, line
    filler.unlink()
    campaign.disk_is_full = False
    campaign.coordinator.start()
    return f"{trip.who}; the coordinator ended with 3: {line}"


def fail_calls(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:
    """The file server answers the process with an error, some times in a row."""
    yield from stopped(trip)
    flag = campaign.wires / f"errors.{trip.pid}"
    told = campaign.wires / f"errors.{trip.pid}.told"
    # as wide as the shim reads at once
    flag.write_text(f"{ERRNOS[fault.kind]} {_FAILED_CALLS}", encoding="utf-8")
    trip.go_on()
    while _size(told) < _FAILED_CALLS and not trip.is_dead():
        yield
    failed = _size(told)
    assert failed, f"{trip.who} ended before a call failed"
    flag.unlink()
    told.unlink()
    return f"{trip.who}, {failed} calls"


def edit_configuration(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:  # noqa: ARG001
    """Somebody edits a result key of config.yaml while no coordinator runs; resume refuses."""
    yield from _coordinator_killed(campaign, trip)
    config = campaign.paths.config
    before = config.read_bytes()
    line = b"learning_rate: "
    assert before.count(line) == 1
    head, _, rest = before.partition(line)
    config.write_bytes(head + line + b"0.5\n" + rest.partition(b"\n")[2])
    words = [FEDLLM, "resume", str(campaign.command.root)]
    done = subprocess.run(
        words, env=campaign.unwatched, capture_output=True, text=True, check=False
    )
    config.write_bytes(before)
    assert done.returncode == 2, done.stderr
    assert "training.learning_rate" in done.stderr, done.stderr
    campaign.is_held = False
    return f"resume ended with 2: {done.stderr.strip()}"


def copy_run(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:  # noqa: ARG001
    """Somebody copies the run directory and cancels the copy; the run does not notice."""
    yield from stopped(trip)
    lease, holder = current_lease(campaign.paths)
    copy = campaign.wires.parent / f"copy-{trip.pid}"
    # what is published meanwhile may be missing there
    subprocess.run(["cp", "-r", str(campaign.paths.root), str(copy)], check=False)
    words = [FEDLLM, "cancel", str(copy)]
    done = subprocess.run(
        words, env=campaign.unwatched, capture_output=True, text=True, check=False
    )
    assert "cancelled" not in done.stdout.replace("nothing cancelled", ""), done.stdout
    assert campaign.state(trip.task) in {"RUNNING", "COMPLETING"}, done.stdout
    if holder and current_lease(campaign.paths)[0] == lease and holder.slurm_job is None:
        assert not is_dead(holder.pid), done.stdout
    shutil.rmtree(copy)
    trip.go_on()
    return f"beside {trip.who}: {(done.stdout + done.stderr).strip()}"


def second_user(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:
    """Another user of the group resumes the run, submits the round's tasks and dies."""
    yield from _coordinator_killed(campaign, trip)
    paths = campaign.paths.round(fault.round)
    process = campaign.member.resume(campaign.command.root, campaign.command.log)
    while process.poll() is None and not paths.attempt(1).jobs.exists():
        yield
    process.kill()
    process.wait()
    owner = paths.cohort.owner()
    assert owner == campaign.member.name, f"cohort.json is of {owner}"
    campaign.is_held = False
    return f"user {owner}, pid {process.pid}"


def _coordinator_killed(campaign: "Campaign", trip: Trip) -> Handling:
    """Kill the coordinator at its moment, and let none start until the fault is over."""
    yield from stopped(trip)
    campaign.is_held = True
    trip.kill()
    yield from dead(trip)
    return ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fill(path: Path) -> None:
    """Write a file until nothing fits on its file system any more."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


def make_shim(folder: Path) -> Path:
    """Compile the library that lets calls fail; return it."""
    library = folder / "errors.so"
    source = Path(__file__).with_name("errors.c")
    compiler = os.environ.get("CC", "cc")
    words = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(words, check=True)
    return library
