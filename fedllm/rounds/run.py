"""An opened run: its paths, configuration, lease and scheduler."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.config.models import Config
from fedllm.scheduling.seam import Scheduler
from fedllm.storage.lease import Lease
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import Record, RunRecord
from fedllm.storage.updates import UpdateScanner


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every step of a round works with. The truth is the directory, not this object."""

    paths: RunPaths
    config: Config
    record: RunRecord
    lease: Lease
    scheduler: Scheduler
    say: Callable[[str], None]
    scanners: dict[int, UpdateScanner] = field(default_factory=dict)
    first_seen: dict[Path, float] = field(default_factory=dict)

    def publish(self, record: Record, path: Path) -> None:
        """Publish a coordinator's record while the lease holds."""
        self.lease.check()
        record.publish(path)

    def scanner(self, round_number: int, base_fingerprint: str) -> UpdateScanner:
        """Return the round's scanner, which reads every update file once."""
        if round_number not in self.scanners:
            self.scanners.clear()
            self.scanners[round_number] = UpdateScanner(
                round=self.paths.round(round_number),
                run_id=self.record.run_id,
                base_fingerprint=base_fingerprint,
            )
        return self.scanners[round_number]

    def settled(self, path: Path) -> bool:
        """Say whether what is missing or damaged under `path` cannot be on its way any more.

        Counts on this process's own clock from the first time it was asked: no decision compares
        the clocks of two machines.
        """
        since = self.first_seen.setdefault(path, time.monotonic())
        return time.monotonic() - since >= self.visibility_seconds

    @property
    def visibility_seconds(self) -> float:
        """How long a file that cannot be read whole may still be on its way.

        Processes of one machine see each other's files at once; those of a cluster do not.
        """
        if self.config.scheduler.kind != "slurm":
            return 0.0
        return self.config.storage.visibility_seconds
