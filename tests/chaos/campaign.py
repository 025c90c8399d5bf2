"""A run under the faults of a plan, driven from what its processes report: nothing is timed."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fedllm.storage.lease import current_lease, process_is_gone
from fedllm.storage.paths import RunPaths
from fedllm.storage.updates import update_files
from tests.chaos.coordinators import COORDINATORS, Command, Coordinator
from tests.chaos.plan import Fault, Kind, Leg, Plan
from tests.slurm.cluster import Cluster, until

PATIENCE_SECONDS = 900.0
_TICK_SECONDS = 0.1
# so long slurmctld is away at least
_AWAY_SECONDS = 4.0
# how a coordinator may end before the run does
_ENDINGS = {
    "process": {"-9"},
    # SIGKILL by the test; stopped in good order by the SIGTERM of a preemption
    "job": {"FAILED 137", "FAILED 3", "NODE_FAIL", "PREEMPTED"},
    "chain": set[str](),
}

# what a fault does from its trip on; it returns what was hit, once it landed
Handling = Generator[None, None, str]


@dataclass(frozen=True, kw_only=True)
class Trip:
    """A process that came to the moment of a fault: it is dead, or stopped there."""

    pid: int
    about: str
    task: str
    node: str

    @property
    def who(self) -> str:
        """Name the process as a log should."""
        if self.task:
            return f"task {self.task} on {self.node}"
        job = f"job on {self.node}" if self.node else "process"
        return f"coordinator, {job}, pid {self.pid}"

    def is_dead(self) -> bool:
        """Say whether the process is gone."""
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def is_stopped(self) -> bool:
        """Say whether the process stands still."""
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False

    def is_told_to_end(self) -> bool:
        """Say whether a signal waits for the process to go on, or does not any more."""
        if not self.is_stopped():
            return True
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        pending = int(lines["ShdPnd"], 16) | int(lines["SigPnd"], 16)
        wanted = (signal.SIGTERM, signal.SIGUSR2)
        return any(pending & (1 << (number - 1)) for number in wanted)

    def go_on(self) -> None:
        """Let the stopped process go on, unless something ended it."""
        if not self.is_dead():
            os.kill(self.pid, signal.SIGCONT)


@dataclass(frozen=True, kw_only=True)
class Landed:
    """A fault that hit."""

    fault: Fault
    seconds: float
    hit: str

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.seconds:4.0f} s  {self.fault}: {self.hit}"


@dataclass(kw_only=True)
class Campaign:
    """Brings a run to its end under all faults of a plan."""

    plan: Plan
    command: Command
    wires: Path
    disk: Path
    say: Callable[[str], None]
    landed: list[Landed] = field(default_factory=list)
    _coordinator: Coordinator = field(init=False)
    _handled: dict[int, Handling] = field(default_factory=dict)
    _disk_is_full: bool = False
    _begun: float = field(default_factory=time.monotonic)

    @property
    def cluster(self) -> Cluster:
        """Where the run runs."""
        return self.command.cluster

    @property
    def paths(self) -> RunPaths:
        """The run."""
        return RunPaths(root=self.command.root)

    @property
    def kept(self) -> Path:
        """Every update file that was ever published; the run prunes them."""
        return self.disk / "kept"

    @property
    def seconds(self) -> float:
        """How long it takes so far."""
        return time.monotonic() - self._begun

    def run(self) -> None:
        """Go through the legs until the last round is done and every fault has landed."""
        self.wires.mkdir()
        (self.wires / "wires.json").write_text(json.dumps(self.plan.wires), encoding="utf-8")
        for leg in self.plan.legs:
            self._run(leg)
        while self._handled:
            self._tick()

    def _run(self, leg: Leg) -> None:
        self._coordinator = COORDINATORS[leg.mode](command=self.command, rounds=leg.last_round)
        self.say(f"{self.seconds:4.0f} s  the coordinator is a {leg.mode}")
        self._coordinator.start()
        while not self._is_over(leg):
            self._tick()

    def _is_over(self, leg: Leg) -> bool:
        """Start a coordinator again that was killed; say whether the leg's last one is through."""
        ending = self._coordinator.ending()
        if ending is None or self._disk_is_full:
            return False
        if ending == "0":
            assert self.paths.round(leg.last_round).record.exists(), "ended before the run did"
            return True
        assert ending in _ENDINGS[leg.mode], f"the coordinator ended with {ending}"
        self._coordinator.start()
        return False

    def _tick(self) -> None:
        assert self.seconds < PATIENCE_SECONDS, f"not through after {PATIENCE_SECONDS} s"
        self._keep_updates()
        done = {landed.fault.number for landed in self.landed}
        for fault in self.plan.faults:
            tripped = self.wires / f"{fault.wire['id']}.tripped"
            if fault.number in done or not tripped.exists():
                continue
            if fault.number not in self._handled:
                trip = Trip(**json.loads(tripped.read_text(encoding="utf-8")))
                self._handled[fault.number] = HANDLING[fault.kind](self, trip)
            self._go_on_with(fault)
        time.sleep(_TICK_SECONDS)

    def _go_on_with(self, fault: Fault) -> None:
        try:
            next(self._handled[fault.number])
        except StopIteration as end:
            del self._handled[fault.number]
            self.landed.append(Landed(fault=fault, seconds=self.seconds, hit=end.value))
            self.say(str(self.landed[-1]))

    def _keep_updates(self) -> None:
        if self._disk_is_full:
            return
        for folder in self.paths.rounds.glob("[0-9]*"):
            paths = self.paths.round(int(folder.name))
            for name in update_files(paths):
                kept = self.kept / folder.name / "updates" / name
                kept.parent.mkdir(parents=True, exist_ok=True)
                # pruned meanwhile: then it was kept rounds ago
                with contextlib.suppress(FileExistsError, FileNotFoundError):
                    kept.hardlink_to(paths.updates / name)

    def killed(self, trip: Trip) -> Handling:
        """The wire killed the process."""
        while not trip.is_dead():
            yield
        return trip.who

    def cancel_task(self, trip: Trip) -> Handling:
        """An admin cancels the task."""
        yield from _stopped(trip)
        self.cluster.slurm("scancel", trip.task)
        yield from _told_to_end(trip)
        while not trip.is_dead():
            yield
        while self._state(trip.task) == "COMPLETING":
            yield
        assert self._state(trip.task) == "CANCELLED"
        return trip.who

    def crash_node(self, trip: Trip) -> Handling:
        """The task's node loses power, is declared down, and comes back."""
        yield from _stopped(trip)
        self.cluster.devcluster("crash-node", trip.node)
        node = f"nodename={trip.node}"
        self.cluster.slurm("scontrol", "update", node, "state=down", "reason=crash")
        while not trip.is_dead():
            yield
        self.cluster.devcluster("start-node", trip.node)
        return trip.who

    def preempt(self, trip: Trip) -> Handling:
        """A job of a higher partition takes the whole node."""
        yield from _stopped(trip)
        words = ("--partition=high", f"--nodelist={trip.node}", "--exclusive", "--output=/dev/null")
        job = self.cluster.slurm("sbatch", "--parsable", *words, "--wrap=sleep 1").strip()
        yield from _told_to_end(trip)
        while self._state(job) != "COMPLETED":
            yield
        assert trip.is_dead()
        return f"{trip.who}, by job {job}"

    def restart_slurmctld(self, trip: Trip) -> Handling:
        """Slurm's controller dies; the task goes on without it, and the controller comes back."""
        yield from _stopped(trip)
        self.cluster.devcluster("stop-controller")
        trip.go_on()
        # tasks publish and end, the coordinator asks in vain
        time.sleep(_AWAY_SECONDS)
        self.cluster.devcluster("start-controller")
        until(self._answers, seconds=60)
        return f"{trip.who} went on for {_AWAY_SECONDS:.0f} s without it"

    def fill_disk(self, trip: Trip) -> Handling:
        """The file system of the run is full until the coordinator ended for it."""
        yield from _stopped(trip)
        while not self._coordinates():
            yield
        self._disk_is_full = True
        filler = self.disk / "filler"
        _fill(filler)
        said = self.command.log.stat().st_size
        trip.go_on()
        while (ending := self._coordinator.ending()) in {None, "-9"}:
            if ending:
                # another fault's moment came first: it goes on where the disk is still full
                self._coordinator.start()
            yield
        line = self.command.log.read_bytes()[said:].decode().strip().rpartition("\n")[2]
        assert ending == "3", f"on a full disk the coordinator ended with {ending}: {line}"
        assert str(self.command.root) in line, line
        assert "no space left on device" in line, line
        filler.unlink()
        self._disk_is_full = False
        self._coordinator.start()
        return f"{trip.who}; the coordinator ended with 3: {line}"

    def kill_coordinator(self, trip: Trip) -> Handling:
        """The coordinator dies while the process of the trip stands in the midst of its work."""
        yield from _stopped(trip)
        while not self._coordinates():
            yield
        _, holder = current_lease(self.paths)
        assert holder is not None
        os.kill(holder.pid, signal.SIGKILL)
        while not process_is_gone(holder):
            yield
        trip.go_on()
        return f"coordinator, pid {holder.pid}, while {trip.who} was at it"

    def _coordinates(self) -> bool:
        """Say whether a coordinator is at work."""
        number, holder = current_lease(self.paths)
        if holder is None or self.paths.released(number).exists():
            return False
        return not process_is_gone(holder)

    def _answers(self) -> bool:
        try:
            self.cluster.slurm("squeue", "-h")
        except AssertionError:
            return False
        return True

    def _state(self, job: str) -> str:
        return self.cluster.slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()


def _stopped(trip: Trip) -> Generator[None, None, None]:
    while not trip.is_stopped():
        yield


def _told_to_end(trip: Trip) -> Generator[None, None, None]:
    """Let a stopped process go on as soon as Slurm's signal waits for it."""
    while not trip.is_told_to_end():
        yield
    trip.go_on()


def _fill(path: Path) -> None:
    """Write a file until nothing fits on its file system any more."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


HANDLING: dict[Kind, Callable[[Campaign, Trip], Handling]] = {
    Kind.KILL_TASK: Campaign.killed,
    Kind.CANCEL_TASK: Campaign.cancel_task,
    Kind.CRASH_NODE: Campaign.crash_node,
    Kind.PREEMPT: Campaign.preempt,
    Kind.RESTART_SLURMCTLD: Campaign.restart_slurmctld,
    Kind.FILL_DISK: Campaign.fill_disk,
    Kind.KILL_BEFORE_SBATCH: Campaign.killed,
    Kind.KILL_BEFORE_IDS: Campaign.killed,
    Kind.KILL_COLLECTING: Campaign.killed,
    Kind.KILL_AGGREGATING: Campaign.kill_coordinator,
    Kind.KILL_PUBLISHING: Campaign.killed,
}
