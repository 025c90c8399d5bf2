"""The coordinator's numbered lease: the highest number holds, and no lease is removed."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import LeaseError
from fedllm.storage.paths import RunPaths, names_in
from fedllm.storage.publishing.publish import Version, make_folder, version_of
from fedllm.storage.records import LeaseRecord, RunRecord
from fedllm.storage.trust.place import is_here, place_of

HolderIsGone = Callable[[LeaseRecord], bool | None]


def process_start_time(pid: int) -> str | None:
    """Return when a process of this machine started, in clock ticks, or None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    # the name in parentheses may contain spaces; state is the 1st field after it, start the 20th
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]


def boot_id() -> str:
    """Return the id of the machine's boot, which differs from boot to boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def machine_id() -> str:
    """Return the id of this machine's installation; empty if it has none."""
    try:
        return Path("/etc/machine-id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """Return the namespace in which this process has its id; a container may have its own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def process_is_gone(holder: LeaseRecord) -> bool | None:
    """Say whether a holder's process ended; None: it cannot be known here.

    It can for a process of this machine and of this namespace of process ids. Another machine may
    have the same host name: an earlier boot was this machine's if the machine's id is the same.
    Containers may have no such id, and leases of earlier versions have none.
    """
    if holder.host != socket.gethostname():
        return None
    if holder.boot_id != boot_id():
        return True if holder.machine_id and holder.machine_id == machine_id() else None
    if holder.pid_namespace not in {None, pid_namespace()}:
        return None
    return process_start_time(holder.pid) != holder.start_time


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to coordinate a run."""

    paths: RunPaths
    record: LeaseRecord
    version: Version

    @property
    def number(self) -> int:
        """The lease's number; every coordinator record carries it."""
        return self.record.number

    @property
    def since(self) -> int:
        """The lease at which a person started this run: retries are counted from that lease on."""
        return self.record.origin or self.number

    @classmethod
    def acquire(
        cls,
        paths: RunPaths,
        *,
        job: str | None = None,
        gone: HolderIsGone = process_is_gone,
        take_over: bool = False,
        unattended: bool = False,
    ) -> "Lease":
        """Take the next lease.

        Args:
            paths: the run.
            job: the batch job of this process; None if it runs in none.
            gone: says whether the present holder ended; None is unknown, and unknown is not gone.
            take_over: the user knows that the present holder ended. It does not apply to a
                coordinator that takes the lease meanwhile.
            unattended: no person started this coordinator. It continues the work of the holder
                before it, with the retries that are left.

        Raises:
            LeaseError: another coordinator holds the run; the message names it.
        """
        known_gone = current_lease(paths)[0] if take_over else 0
        make_folder(paths.root)
        while True:
            number, holder = current_lease(paths)
            if not (number or take_over):
                _refuse_lost_leases(paths)
            if holder and number != known_gone and not paths.released(number).exists():
                _refuse_unless_gone(paths, holder, gone(holder))
            record = LeaseRecord(
                number=number + 1,
                host=socket.gethostname(),
                boot_id=boot_id(),
                machine_id=machine_id(),
                pid_namespace=pid_namespace(),
                pid=os.getpid(),
                start_time=process_start_time(os.getpid()) or "",
                slurm_job=job,
                origin=(holder.origin or holder.number) if holder and unattended else None,
                place=place_of(paths.root),
                user=os.geteuid(),
            )
            if record.publish_once(paths.lease(number + 1)):
                version = version_of(paths.lease(record.number))
                return cls(paths=paths, record=record, version=version)

    def check(self) -> None:
        """Raise LeaseError if this lease no longer holds.

        Raises:
            LeaseError: another coordinator took over, or somebody removed the lease; this one must
                stop.
        """
        if self.paths.lease(self.number + 1).exists():
            _, holder = current_lease(self.paths)
            assert holder is not None
            raise LeaseError(
                f"{self.paths.root}: coordinator {holder.number} ({location_of(holder)}) took over "
                f"from {self.number}; this one stops"
            )
        try:
            is_mine = version_of(self.paths.lease(self.number)) == self.version
        except FileNotFoundError:
            is_mine = False
        if not is_mine:
            raise LeaseError(
                f"{self.paths.lease(self.number)}: the lease of this coordinator was removed; it "
                f"stops: fedllm resume {self.paths.root} --take-over"
            )

    def release(self) -> None:
        """Record that this holder ended, for coordinators on other machines."""
        self.record.publish_once(self.paths.released(self.number))


def current_lease(paths: RunPaths) -> tuple[int, LeaseRecord | None]:
    """Return the number of the last lease, 0 if there is none, and its holder.

    A lease that came with a copy of the directory has no holder here.
    """
    for folder in paths.lease_folders():
        names = [n.removesuffix(".json") for n in names_in(folder) if n.endswith(".json")]
        numbers = [int(name) for name in names if name.isdecimal()]
        # a file in the wrong folder is no lease
        if numbers := [n for n in numbers if paths.lease(n).parent == folder]:
            holder = LeaseRecord.read(paths.lease(max(numbers)))
            return max(numbers), holder if is_here(holder.place, paths.root) else None
    return 0, None


def _refuse_lost_leases(paths: RunPaths) -> None:
    """Refuse a run that began here and has no lease: somebody removed them."""
    run = RunRecord.find(paths.run)
    if run is not None and is_here(run.place, paths.root):
        raise LeaseError(
            f"{paths.leases}: the run has no leases any more, so nobody knows whether a "
            "coordinator works on it; if none does, add --take-over"
        )


def _refuse_unless_gone(paths: RunPaths, holder: LeaseRecord, gone: bool | None) -> None:
    if gone:
        return
    doubt = "" if gone is False else " (unknown from here; if it ended, add --take-over)"
    raise LeaseError(
        f"{paths.root}: coordinator {holder.number} holds this run: {location_of(holder)}{doubt}; "
        "wait for it or end it first"
    )


def location_of(holder: LeaseRecord) -> str:
    """Return where a coordinator runs: its Slurm job, host and process."""
    job = f"Slurm job {holder.slurm_job}, " if holder.slurm_job else ""
    return f"{job}host {holder.host}, pid {holder.pid}"
