"""Records that are read again and again: what did not change is not read again."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from fedllm.errors import RunDirectoryError
from fedllm.storage.publishing.publish import Version, version_of
from fedllm.storage.records import Record

AnyRecord = TypeVar("AnyRecord", bound=Record)


class RecordCache:
    """Records as they were read last, by path."""

    def __init__(self) -> None:
        self._held: dict[Path, tuple[Version, Record]] = {}

    def read(self, kind: type[AnyRecord], path: Path) -> AnyRecord:
        """Read a record, anew only where its file changed: some hold thousands of clients.

        Raises:
            FileNotFoundError: there is none.
            RunDirectoryError: it is not a record of this kind.
        """
        version = version_of(path)
        held = self._held.get(path)
        if held is None or held[0] != version:
            held = self._held[path] = (version, kind.read(path))
        record = held[1]
        assert isinstance(record, kind)
        return record

    def find(self, kind: type[AnyRecord], path: Path) -> AnyRecord | None:
        """Read a record as `read` does, or return None where its step is not complete."""
        try:
            return self.read(kind, path)
        except FileNotFoundError:
            return None

    def all(self, kind: type[AnyRecord], paths: Iterable[Path]) -> list[AnyRecord]:
        """Return those of many records that can be read: the figures of one are not the truth."""
        found = []
        for path in paths:
            with contextlib.suppress(RunDirectoryError):
                record = self.find(kind, path)
                if record is not None:
                    found.append(record)
        return found

    def clear(self) -> None:
        """Forget all records."""
        self._held.clear()
