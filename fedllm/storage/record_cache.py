"""A cache of records that are read repeatedly: only changed files are read again."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from fedllm.errors import RunDirectoryError
from fedllm.storage.publishing.publish import Version, version_of
from fedllm.storage.records import Record

AnyRecord = TypeVar("AnyRecord", bound=Record)


class RecordCache:
    """The last content of records that were read, by path."""

    def __init__(self) -> None:
        self._cached: dict[Path, tuple[Version, Record]] = {}

    def read(self, kind: type[AnyRecord], path: Path) -> AnyRecord:
        """Read a record, from disk only if its file changed: some hold thousands of clients.

        Raises:
            FileNotFoundError: the file does not exist.
            RunDirectoryError: the file is not a record of this kind.
        """
        version = version_of(path)
        cached = self._cached.get(path)
        if cached is None or cached[0] != version:
            cached = self._cached[path] = (version, kind.read(path))
        record = cached[1]
        assert isinstance(record, kind)
        return record

    def find(self, kind: type[AnyRecord], path: Path) -> AnyRecord | None:
        """Read a record as `read` does, or return None if the file does not exist."""
        try:
            return self.read(kind, path)
        except FileNotFoundError:
            return None

    def glance(self, kind: type[AnyRecord], path: Path) -> AnyRecord | None:
        """Read a record that only informs; return None if it does not exist or is damaged."""
        try:
            return self.find(kind, path)
        except RunDirectoryError:
            return None

    def all(self, kind: type[AnyRecord], paths: Iterable[Path]) -> list[AnyRecord]:
        """Read many records and return those that can be read; a damaged one is left out."""
        records = []
        for path in paths:
            with contextlib.suppress(RunDirectoryError):
                record = self.find(kind, path)
                if record is not None:
                    records.append(record)
        return records

    def clear(self) -> None:
        """Forget all records."""
        self._cached.clear()
