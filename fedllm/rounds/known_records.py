"""What a coordinator has read of its run directory, and since when it waits for a file.

A new coordinator begins with nothing and comes to the same decisions, later at most.
"""

import time
from collections.abc import Callable
from pathlib import Path

from fedllm.config.models import Config
from fedllm.planning.federation import Federation, plan_federation
from fedllm.scheduling.traits import traits_of
from fedllm.storage.paths import RunPaths
from fedllm.storage.record_cache import AnyRecord, RecordCache
from fedllm.storage.records import CohortRecord, PreparedRecord, RunRecord
from fedllm.storage.updates import Origin, PublishedUpdate, UpdateScanner


class KnownRecords:
    """Records, update files and the plan of clients, each read or worked out once.

    Args:
        paths: the run directory.
        config: of the run.
        record: of the run.
    """

    def __init__(self, paths: RunPaths, config: Config, record: RunRecord) -> None:
        self._paths, self._config, self._record = paths, config, record
        self._visibility_seconds = traits_of(config).visibility_seconds
        self._records = RecordCache()
        self._federation: Federation | None = None
        self._scanner: tuple[int, UpdateScanner] | None = None
        self._first_seen: dict[Path, float] = {}

    def read(self, kind: type[AnyRecord], path: Path) -> AnyRecord:
        """Read a record, anew only where its file changed.

        Raises:
            FileNotFoundError: there is none.
            RunDirectoryError: it is not a record of this kind.
        """
        return self._records.read(kind, path)

    def find(self, kind: type[AnyRecord], path: Path) -> AnyRecord | None:
        """Read a record as `read` does, or return None where its step is not complete."""
        return self._records.find(kind, path)

    def federation(self, prepared: PreparedRecord) -> Federation:
        """Return what configuration and data fix, worked out once.

        Raises:
            ConfigError: they do not fit together.
        """
        if self._federation is None or self._federation.prepared is not prepared:
            self._federation = plan_federation(self._config, prepared)
        return self._federation

    def scanner(
        self, cohort: CohortRecord, problem: Callable[[PublishedUpdate], str | None]
    ) -> UpdateScanner:
        """Return the round's scanner, which reads every update file once."""
        if self._scanner is None or self._scanner[0] != cohort.round:
            # a round that begins needs nothing of those before
            self._records.clear()
            scanner = UpdateScanner(
                round=self._paths.round(cohort.round),
                origin=Origin.of(self._record.run_id, cohort),
                problem=problem,
            )
            self._scanner = (cohort.round, scanner)
        return self._scanner[1]

    def forget_update(self, name: str) -> None:
        """Let the next scan read an update file again."""
        if self._scanner is not None:
            self._scanner[1].forget(name)

    def forget_updates(self) -> None:
        """Let the next scan read every update file again."""
        self._scanner = None

    def wait_is_over(self, path: Path) -> bool:
        """Say whether what is missing or damaged under `path` cannot be on its way any more.

        Counts on this process's own clock from the first time it was asked: no decision compares
        the clocks of two machines.
        """
        since = self._first_seen.setdefault(path, time.monotonic())
        return time.monotonic() - since >= self._visibility_seconds

    @property
    def is_waiting(self) -> bool:
        """Whether anything that was asked for by `settled` may still be on its way."""
        now = time.monotonic()
        return any(now - since < self._visibility_seconds for since in self._first_seen.values())
