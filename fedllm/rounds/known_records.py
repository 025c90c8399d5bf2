"""Cache of what a coordinator read from its run directory, and since when it waits for files.

A new coordinator starts with an empty cache and makes the same decisions, at most later.
"""

import time
from collections.abc import Callable
from pathlib import Path

from fedllm.config.models import Config
from fedllm.planning.federation import Federation, plan_federation
from fedllm.scheduling.traits import traits_of
from fedllm.storage.frozen_config import FrozenConfigReader
from fedllm.storage.paths import RunPaths
from fedllm.storage.record_cache import AnyRecord, RecordCache
from fedllm.storage.records import CohortRecord, PreparedRecord, RunRecord
from fedllm.storage.updates import Origin, PublishedUpdate, UpdateScanner


class KnownRecords:
    """Records, update files and the federation, each read or computed once.

    Args:
        paths: paths of the run directory.
        config: configuration of the run.
        record: the run's `run.json`.
    """

    def __init__(self, paths: RunPaths, config: Config, record: RunRecord) -> None:
        self._paths, self._config, self._record = paths, config, record
        self._visibility_seconds = traits_of(config).visibility_seconds
        self._records = RecordCache()
        self._federation: Federation | None = None
        self._scanner: tuple[int, UpdateScanner] | None = None
        self._first_seen: dict[Path, float] = {}
        self._configs = FrozenConfigReader()

    def refuse_edits(self) -> None:
        """Require the result keys that the run was begun with, if `config.yaml` changed.

        Raises:
            RunDirectoryError: somebody changed one; the message names it.
        """
        self._configs.read(self._paths)

    def read(self, kind: type[AnyRecord], path: Path) -> AnyRecord:
        """Read a record; read it again only if its file changed.

        Raises:
            FileNotFoundError: there is no such file.
            RunDirectoryError: the file is not a record of this kind.
        """
        return self._records.read(kind, path)

    def find(self, kind: type[AnyRecord], path: Path) -> AnyRecord | None:
        """Read a record as `read` does, or return None if its step is not complete."""
        return self._records.find(kind, path)

    def glance(self, kind: type[AnyRecord], path: Path) -> AnyRecord | None:
        """Read a record that only informs; return None if it does not exist or is damaged."""
        return self._records.glance(kind, path)

    def federation(self, prepared: PreparedRecord) -> Federation:
        """Return the federation of the run, computed once.

        Raises:
            ConfigError: configuration, data and base model do not fit together.
        """
        if self._federation is None or self._federation.prepared is not prepared:
            self._federation = plan_federation(self._config, prepared)
        return self._federation

    def scanner(
        self, cohort: CohortRecord, problem: Callable[[PublishedUpdate], str | None]
    ) -> UpdateScanner:
        """Return the round's scanner, which reads every update file once."""
        if self._scanner is None or self._scanner[0] != cohort.round:
            # a new round needs no record of earlier ones
            self._records.clear()
            scanner = UpdateScanner(
                round=self._paths.round(cohort.round),
                origin=Origin.of(self._record, cohort),
                problem=problem,
            )
            self._scanner = (cohort.round, scanner)
        return self._scanner[1]

    def forget_update(self, name: str) -> None:
        """Make the next scan read an update file again."""
        if self._scanner is not None:
            self._scanner[1].forget(name)

    def forget_updates(self) -> None:
        """Make the next scan read every update file again."""
        self._scanner = None

    def wait_is_over(self, path: Path) -> bool:
        """Return whether the wait for a missing or damaged file at `path` is over.

        The wait is `storage.visibility_seconds` from the first call with this path, as a shared
        file system may show a file late. It uses this process's own clock: no decision compares
        the clocks of two machines.
        """
        since = self._first_seen.setdefault(path, time.monotonic())
        return time.monotonic() - since >= self._visibility_seconds

    @property
    def is_waiting(self) -> bool:
        """Whether the wait for any path given to `wait_is_over` is not over."""
        now = time.monotonic()
        return any(now - since < self._visibility_seconds for since in self._first_seen.values())
