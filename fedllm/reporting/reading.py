"""Records for someone who looks again and again: what did not change is not read again."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from fedllm.errors import RunDirectoryError
from fedllm.storage.publish import Version, version_of
from fedllm.storage.records import Record

AnyRecord = TypeVar("AnyRecord", bound=Record)


class Records:
    """Records as they were read last, by path."""

    def __init__(self) -> None:
        self._held: dict[Path, tuple[Version, Record]] = {}

    def find(self, kind: type[AnyRecord], path: Path) -> AnyRecord | None:
        """Return a record, read anew only where its file changed; None where there is none.

        Raises:
            RunDirectoryError: it is not a record of this kind.
        """
        try:
            version = version_of(path)
            held = self._held.get(path)
            if held is None or held[0] != version:
                held = self._held[path] = (version, kind.read(path))
        except FileNotFoundError:
            return None
        assert isinstance(held[1], kind)
        return held[1]

    def all(self, kind: type[AnyRecord], paths: Iterable[Path]) -> list[AnyRecord]:
        """Return those of many records that can be read: the figures of one are not the truth."""
        found = []
        for path in paths:
            with contextlib.suppress(RunDirectoryError):
                record = self.find(kind, path)
                if record is not None:
                    found.append(record)
        return found


def written_at(path: Path) -> float | None:
    """Return when a file was written, in seconds since the epoch by its file system's clock.

    For people to read: no decision hangs on it.
    """
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
