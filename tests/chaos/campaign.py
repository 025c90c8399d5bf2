"""A run under the faults of a plan, driven from what its processes report: nothing is timed."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.storage.lease import current_lease, process_is_gone
from fedllm.storage.paths import RunPaths, names_in
from fedllm.storage.trust.secret import STATE_VARIABLE
from fedllm.storage.updates import update_files
from tests.chaos import acts_on_files, acts_on_jobs, forgeries, lies
from tests.chaos.coordinators import COORDINATORS, ChainCoordinator, Command, Coordinator
from tests.chaos.member import Member
from tests.chaos.plan import ERRNOS, PLANTED, Fault, Kind, Leg, Plan
from tests.chaos.trip import Handling, Trip
from tests.slurm.cluster import Cluster

# on a machine with much else to do; alone it takes minutes
PATIENCE_SECONDS = 1800.0
_TICK_SECONDS = 0.1
# how a coordinator may end before the run does
_ENDINGS = {
    "process": {"-9"},
    # SIGKILL by the test; stopped in good order by the SIGTERM of a preemption
    "job": {"FAILED 137", "FAILED 3", "NODE_FAIL", "PREEMPTED"},
    "chain": set[str](),
}


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
    member: Member
    landed: list[Landed] = field(default_factory=list)
    # round and name of update files that no worker sent
    planted: set[str] = field(default_factory=set)
    disk_is_full: bool = False
    # no coordinator starts
    is_held: bool = False
    # a task is on its way back into the queue
    is_requeueing: bool = False
    coordinator: Coordinator = field(init=False)
    _handled: dict[int, Handling] = field(default_factory=dict)
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
    def secret(self) -> bytes:
        """What signs the updates of the user who began the run."""
        return (Path(self.command.environment[STATE_VARIABLE]) / "secret").read_bytes()

    @property
    def unwatched(self) -> dict[str, str]:
        """The environment of a command that comes to no moment."""
        watching = ("FEDLLM_CHAOS_WIRES", "LD_PRELOAD")
        given = self.command.environment
        return {name: value for name, value in given.items() if name not in watching}

    @property
    def is_asked(self) -> bool:
        """Whether a coordinator asks Slurm while tasks run: links of a chain wait for their end."""
        return not isinstance(self.coordinator, ChainCoordinator)

    @property
    def seconds(self) -> float:
        """How long it takes so far."""
        return time.monotonic() - self._begun

    def run(self) -> None:
        """Go through the legs until the last round is done and every fault has landed."""
        self.wires.mkdir()
        # the second user's processes watch too
        self.wires.chmod(0o777)
        (self.wires / "wires.json").write_text(json.dumps(self.plan.wires), encoding="utf-8")
        for leg in self.plan.legs:
            self._run(leg)
        while self._handled:
            self._tick()

    def _run(self, leg: Leg) -> None:
        self.coordinator = COORDINATORS[leg.mode](command=self.command, rounds=leg.last_round)
        self.say(f"{self.seconds:4.0f} s  the coordinator is a {leg.mode}")
        self.coordinator.start()
        while not self._is_over(leg):
            self._tick()

    def _is_over(self, leg: Leg) -> bool:
        """Start a coordinator again that was killed; say whether the leg's last one is through."""
        ending = self.coordinator.ending()
        if ending is None or self.disk_is_full or self.is_held:
            return False
        if ending == "0":
            assert self.paths.round(leg.last_round).record.exists(), "ended before the run did"
            return True
        assert ending in _ENDINGS[leg.mode], f"the coordinator ended with {ending}"
        self.coordinator.start()
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
                self._handled[fault.number] = HANDLING[fault.kind](self, trip, fault)
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
        if self.disk_is_full:
            return
        for folder in self.paths.rounds.glob("[0-9]*"):
            paths = self.paths.round(int(folder.name))
            kept = self.kept / folder.name
            for name in update_files(paths):
                if f"{folder.name}/{name}" not in self.planted:
                    _link(paths.updates / name, kept / "updates" / name)
            for name in names_in(paths.updates):
                if ".safetensors.damaged-" in name:
                    _link(paths.updates / name, kept / "set-aside" / name)

    def coordinates(self) -> bool:
        """Say whether a coordinator is at work."""
        number, holder = current_lease(self.paths)
        if holder is None or self.paths.released(number).exists():
            return False
        return not process_is_gone(holder)

    def slurm_answers(self) -> bool:
        """Say whether the controller answers."""
        try:
            self.cluster.slurm("squeue", "-h")
        except AssertionError:
            return False
        return True

    def state(self, job: str) -> str:
        """Return the state of a job or task, ended or not."""
        return self.cluster.slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()


def _link(file: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    # pruned meanwhile: then it was kept rounds ago
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        # updates of the second user are read there too: the folder is of the run's group
        os.chown(kept.parent, -1, file.parent.stat().st_gid)
        kept.hardlink_to(file)


HANDLING: dict[Kind, Callable[[Campaign, Trip, Fault], Handling]] = {
    Kind.KILL_TASK: acts_on_jobs.killed,
    Kind.CANCEL_TASK: acts_on_jobs.cancel_task,
    Kind.CRASH_NODE: acts_on_jobs.crash_node,
    Kind.PREEMPT: acts_on_jobs.preempt,
    Kind.RESTART_SLURMCTLD: acts_on_jobs.restart_slurmctld,
    Kind.FILL_DISK: acts_on_files.fill_disk,
    Kind.KILL_BEFORE_SBATCH: acts_on_jobs.killed,
    Kind.KILL_BEFORE_IDS: acts_on_jobs.killed,
    Kind.KILL_COLLECTING: acts_on_jobs.killed,
    Kind.KILL_AGGREGATING: acts_on_jobs.kill_coordinator,
    Kind.KILL_PUBLISHING: acts_on_jobs.killed,
    Kind.SUSPEND: acts_on_jobs.suspend,
    Kind.HOLD: acts_on_jobs.hold,
    **dict.fromkeys(ERRNOS, acts_on_files.fail_calls),
    **dict.fromkeys(lies.LIES, lies.lie),
    Kind.EDITED: acts_on_files.edit_configuration,
    Kind.COPIED: acts_on_files.copy_run,
    Kind.SECOND_USER: acts_on_files.second_user,
    **dict.fromkeys(PLANTED, forgeries.plant),
}
