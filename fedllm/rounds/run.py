"""An opened run: its paths, configuration, lease and scheduler."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fedllm.config.models import Config
from fedllm.planning.federation import Federation, plan_federation
from fedllm.rounds.watching import Watch
from fedllm.scheduling.seam import Scheduler
from fedllm.storage.lease import Lease
from fedllm.storage.paths import RunPaths
from fedllm.storage.publish import Version, version_of
from fedllm.storage.records import CohortRecord, PreparedRecord, Record, RunRecord
from fedllm.storage.updates import Published, UpdateScanner

AnyRecord = TypeVar("AnyRecord", bound=Record)


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
    records: dict[Path, tuple[Version, Record]] = field(default_factory=dict)
    federations: list[Federation] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)

    def read(self, kind: type[AnyRecord], path: Path) -> AnyRecord:
        """Read a record, again only where its file changed: some hold thousands of clients.

        Raises:
            FileNotFoundError: there is none.
        """
        version = version_of(path)
        held = self.records.get(path)
        if held is None or held[0] != version:
            held = self.records[path] = (version, kind.read(path))
        record = held[1]
        assert isinstance(record, kind)
        return record

    def find(self, kind: type[AnyRecord], path: Path) -> AnyRecord | None:
        """Read a record as `read` does, or return None where its step is not complete."""
        try:
            return self.read(kind, path)
        except FileNotFoundError:
            return None

    def federation(self, prepared: PreparedRecord) -> Federation:
        """Return what configuration and data fix, worked out once.

        Raises:
            ConfigError: they do not fit together.
        """
        if not self.federations or self.federations[-1].prepared is not prepared:
            self.federations[:] = [plan_federation(self.config, prepared)]
        return self.federations[-1]

    def publish(self, record: Record, path: Path) -> None:
        """Publish a coordinator's record while the lease holds."""
        self.lease.check()
        record.publish(path)

    def scanner(
        self, cohort: CohortRecord, problem: Callable[[Published], str | None]
    ) -> UpdateScanner:
        """Return the round's scanner, which reads every update file once."""
        if cohort.round not in self.scanners:
            # a round that begins needs nothing of those before
            self.scanners.clear()
            self.records.clear()
            self.scanners[cohort.round] = UpdateScanner(
                round=self.paths.round(cohort.round),
                run_id=self.record.run_id,
                base_fingerprint=cohort.base_fingerprint,
                problem=problem,
            )
        return self.scanners[cohort.round]

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
