"""A cache of records that are read repeatedly: only changed files are read again."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fedllm.errors import RunDirectoryError
from fedllm.storage.publishing.publish import Version, version_of
from fedllm.storage.records import Record

AnyRecord = TypeVar("AnyRecord", bound=Record)

_COLLECTION_THRESHOLDS = (50_000, 20, 50)


@contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Run the garbage collector rarely in the block.

    Records of thousands of clients live for long: a visit of all of them finds no garbage.
    """
    before = gc.get_threshold()
    gc.set_threshold(*_COLLECTION_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class RecordCache:
    """The last content of records that were read, by kind and path."""

    def __init__(self) -> None:
        self._cached: dict[tuple[type[Record], Path], tuple[Version, Record]] = {}

    def read(self, kind: type[AnyRecord], path: Path) -> AnyRecord:
        """Read a record, from disk only if its file changed: some hold thousands of clients.

        Raises:
            FileNotFoundError: the file does not exist.
            RunDirectoryError: the file is not a record of this kind.
        """
        version = version_of(path)
        cached = self._cached.get((kind, path))
        if cached is None or cached[0] != version:
            cached = self._cached[kind, path] = (version, kind.read(path))
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
        records = (self.glance(kind, path) for path in paths)
        return [record for record in records if record is not None]

    def clear(self) -> None:
        """Forget all records."""
        self._cached.clear()
