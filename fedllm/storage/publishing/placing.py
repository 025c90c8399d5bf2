"""Tensor files whose tensors are written at their places, in any order. No torch here.

Names, types and shapes are known before the first tensor exists, so all places are known too, and
several threads may write at once. The file is published when every tensor is written.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedllm.storage.checked import (
    CHUNK_BYTES,
    HEADER_ALIGNMENT_BYTES,
    LENGTH_BYTES,
    METADATA,
    Layout,
    Sign,
    metadata_of,
)
from fedllm.storage.publishing.publish import publishing, storage_errors

_NO_DIGEST = "0" * hashlib.sha256().digest_size * 2


class PlacedFile:
    """A file that is being written, each tensor at its place.

    Args:
        path: its final name, for errors.
        descriptor: the open file.
        layout: the places of the tensors after the header.
        begin: the byte where the header ends.
    """

    def __init__(self, path: Path, descriptor: int, layout: Layout, begin: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._layout, self._begin = layout, begin
        self._lock = threading.Lock()
        self._written: set[str] = set()

    def write(self, name: str, data: memoryview) -> None:
        """Write the bytes of one tensor, once.

        Raises:
            StorageFull: no space or quota is left.
        """
        begin, end = self._byte_range(name)
        assert len(data) == end - begin, f"{name}: {len(data)} bytes, planned {end - begin}"
        with storage_errors(self._path):
            _write_at(self._descriptor, data, begin)
        with self._lock:
            assert name not in self._written, f"{name}: written twice"
            self._written.add(name)

    def finish(self) -> None:
        """Check that every tensor was written."""
        missing = sorted(self._layout.keys() - self._written)
        assert not missing, f"{self._path}: {missing[0]} was never written"

    def _byte_range(self, name: str) -> tuple[int, int]:
        begin, end = self._layout[name]["data_offsets"]
        return self._begin + begin, self._begin + end


class HashedFile(PlacedFile):
    """A file that is hashed while it is written: as far as it has no gap."""

    def __init__(self, path: Path, descriptor: int, layout: Layout, header: bytes) -> None:
        super().__init__(path, descriptor, layout, len(header))
        self._digest = hashlib.sha256(header)
        self._order = sorted(layout, key=lambda name: (self._byte_range(name), name))
        self._hashed = 0
        self._is_hashing = False
        with storage_errors(path):
            _write_at(descriptor, memoryview(header), 0)

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file, once it is finished."""
        assert self._hashed == len(self._order)
        return self._digest.hexdigest()

    def write(self, name: str, data: memoryview) -> None:
        """Write the bytes of one tensor, once, and hash the file as far as it has no gap.

        Only one thread hashes at a time.
        """
        super().write(name, data)
        with self._lock:
            if self._is_hashing:
                return
            self._is_hashing = True
        while next_name := self._next():
            with storage_errors(self._path):
                self._hash(*self._byte_range(next_name))

    def _next(self) -> str | None:
        """Return the next tensor to hash, if it is written; else stop being the hashing thread."""
        with self._lock:
            if self._hashed < len(self._order) and self._order[self._hashed] in self._written:
                self._hashed += 1
                return self._order[self._hashed - 1]
            self._is_hashing = False
            return None

    def _hash(self, begin: int, end: int) -> None:
        while begin < end:
            chunk = os.pread(self._descriptor, min(CHUNK_BYTES, end - begin), begin)
            assert chunk, f"{self._path}: shorter than what was written"
            self._digest.update(chunk)
            begin += len(chunk)


class CheckedFile(PlacedFile):
    """A file of records and tensors; its header is written last, with the tensors' digests."""

    def __init__(
        self, path: Path, descriptor: int, layout: Layout, records: str, sign: Sign | None
    ) -> None:
        # all digests have one length, so the length of the header is known before them
        empty = encoded_header(
            layout, metadata_of(records, layout, dict.fromkeys(layout, _NO_DIGEST), sign)
        )
        super().__init__(path, descriptor, layout, len(empty))
        self._records, self._sign = records, sign
        self._digests: dict[str, str] = {}

    def write(self, name: str, data: memoryview) -> None:
        """Write the bytes of one tensor, once."""
        self._digests[name] = hashlib.sha256(data).hexdigest()
        super().write(name, data)

    def finish(self) -> None:
        """Check that every tensor was written, and write the header."""
        super().finish()
        header = encoded_header(
            self._layout, metadata_of(self._records, self._layout, self._digests, self._sign)
        )
        assert len(header) == self._begin
        with storage_errors(self._path):
            _write_at(self._descriptor, memoryview(header), 0)


@contextmanager
def placing(path: Path, layout: Layout, metadata: Mapping[str, str]) -> Iterator[HashedFile]:
    """Publish the tensors that the block writes; a failed block leaves nothing behind."""
    header = encoded_header(layout, dict(sorted(metadata.items())), last=True)
    with publishing(path) as temporary, temporary.open("w+b") as file:
        placed = HashedFile(path, file.fileno(), layout, header)
        yield placed
        placed.finish()


@contextmanager
def placing_checked(
    path: Path, layout: Layout, records: str, sign: Sign | None = None
) -> Iterator[CheckedFile]:
    """Publish records and the tensors that the block writes under one checksum, and sign it."""
    with publishing(path) as temporary, temporary.open("w+b") as file:
        placed = CheckedFile(path, file.fileno(), layout, records, sign)
        yield placed
        placed.finish()


def encoded_header(layout: Layout, metadata: Mapping[str, str], *, last: bool = False) -> bytes:
    """Return the header of a safetensors file; its metadata comes first, or `last`."""
    entry = {METADATA: metadata}
    header = {**layout, **entry} if last else {**entry, **layout}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _write_at(descriptor: int, data: memoryview, begin: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, begin)
        data, begin = data[written:], begin + written
