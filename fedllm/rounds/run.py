"""An opened run: its paths, configuration, lease and scheduler."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.config.models import Config
from fedllm.errors import LeaseError
from fedllm.rounds.known_records import KnownRecords
from fedllm.rounds.observations import Observations
from fedllm.scheduling.seam import Scheduler
from fedllm.storage.lease import Lease
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import Record, RunRecord


@dataclass(frozen=True, kw_only=True)
class Run:
    """An opened run, as every step of a round uses it. Only the run directory is the state."""

    paths: RunPaths
    config: Config
    record: RunRecord
    lease: Lease
    scheduler: Scheduler
    say: Callable[[str], None]
    known_records: KnownRecords
    observations: Observations = field(default_factory=Observations)

    @property
    def last_round(self) -> int:
        """The last round: an earlier one than configured if the run was stopped."""
        stopped = self.observations.last_round
        return self.config.rounds if stopped is None else min(stopped, self.config.rounds)

    def publish(self, record: Record, path: Path) -> None:
        """Publish a coordinator's record while the lease holds."""
        self.lease.check()
        record.publish(path)

    def freeze(self, record: Record, path: Path) -> None:
        """Publish a record that never changes, while the lease holds.

        A coordinator that was suspended between the check and the publication replaces nothing.

        Raises:
            LeaseError: another coordinator has written the record.
        """
        self.lease.check()
        if not record.publish_once(path):
            self.lease.check()
            raise LeaseError(
                f"{path}: another coordinator has written it; this one stops: "
                f"fedllm resume {self.paths.root}"
            )
