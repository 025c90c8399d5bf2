"""Files of records and tensors under one checksum, read without torch.

The file is a safetensors file. Its metadata holds the records, a digest of every tensor, and a
checksum of records, layout and digests. So the header alone identifies the file, and each tensor
can be checked when it is read.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fedllm.storage.trust.regular_files import ForeignFileError, open_regular

METADATA, RECORDS, DIGEST, DIGESTS = "__metadata__", "records", "sha256", "tensors"
SIGNATURES = "signatures"
LENGTH_BYTES = HEADER_ALIGNMENT_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}
DTYPE_BYTES |= {"BOOL": 1}
CHUNK_BYTES = 1 << 20
_DIGEST_LETTERS = 64

Sign = Callable[[str], str]  # the checksum of a file -> its signatures, of a constant length
Layout = Mapping[str, Any]  # name -> dtype, shape, data_offsets: as safetensors has it


class DamagedUpdateError(Exception):
    """Error for an update file that is truncated, altered or not an update."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """Header of a file of records and tensors.

    Attributes:
        records: the records, as the text that is checksummed.
        digest: the checksum that the file states.
        digests: the SHA-256 of every tensor's bytes.
        layout: names, types, shapes and byte ranges of the tensors.
        begin: the byte where the tensors begin.
        data_bytes: the size of all tensors.
        signatures: those of the checksum, by the records' clients; empty if it has none.
    """

    records: str
    digest: str
    digests: Mapping[str, str]
    layout: Layout
    begin: int
    data_bytes: int
    signatures: str = ""

    def byte_range(self, name: str) -> tuple[int, int]:
        """Return where a tensor's bytes begin and end in the file."""
        begin, end = self.layout[name]["data_offsets"]
        return self.begin + begin, self.begin + end


def digest_of(records: str, layout: Layout, digests: Mapping[str, str]) -> str:
    """Return the checksum of a file: SHA-256 of records, layout and tensors' digests."""
    text = json.dumps(layout, sort_keys=True, separators=(",", ":"))
    covered = f"{records}\0{text}\0{_joined(digests)}"
    # JSON may hold lone surrogates, UTF-8 may not
    return hashlib.sha256(covered.encode(errors="surrogatepass")).hexdigest()


def metadata_of(
    records: str, layout: Layout, digests: Mapping[str, str], sign: Sign | None = None
) -> dict[str, str]:
    """Return the metadata of a file of records and tensors, of a length that the layout decides."""
    digest = digest_of(records, layout, digests)
    signed = {SIGNATURES: sign(digest)} if sign else {}
    return {RECORDS: records, DIGEST: digest, DIGESTS: _joined(digests), **signed}


def open_checked(path: Path) -> BinaryIO:
    """Open a file of records and tensors.

    Raises:
        FileNotFoundError: there is none.
        DamagedUpdateError: it is no regular file of the run's user or group.
    """
    try:
        return open_regular(path)
    except ForeignFileError as error:
        raise DamagedUpdateError(str(error)) from error


def read_checked_header(file: BinaryIO) -> Header:
    """Read the header of a file and check its checksum; the tensors stay unread.

    Raises:
        DamagedUpdateError: the file is truncated, altered or of another kind.
    """
    header = _read_header(file)
    if digest_of(header.records, header.layout, header.digests) != header.digest:
        raise DamagedUpdateError("its header's checksum does not match")
    return header


def read_and_check(file: BinaryIO) -> Header:
    """Read a file and compare everything in it with its checksums.

    Raises:
        DamagedUpdateError: the file is truncated, altered or of another kind.
    """
    header = read_checked_header(file)
    for name in sorted(header.layout, key=header.byte_range):
        begin, end = header.byte_range(name)
        file.seek(begin)
        if _digest_of_next(file, end - begin) != header.digests[name]:
            raise DamagedUpdateError(f"the checksum of {name} does not match")
    return header


def _read_header(file: BinaryIO) -> Header:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    count = int.from_bytes(file.read(LENGTH_BYTES), "little")
    try:
        raw = json.loads(file.read(count) if count < min(size, MAX_HEADER_BYTES) else b"")
        metadata = raw.pop(METADATA)
        if not isinstance(metadata[RECORDS], str):
            raise TypeError("records are not text")
        header = Header(
            records=metadata[RECORDS],
            digest=metadata[DIGEST],
            digests=_split(metadata[DIGESTS], raw),
            layout=raw,
            begin=LENGTH_BYTES + count,
            data_bytes=_data_bytes(raw),
            signatures=str(metadata.get(SIGNATURES, "")),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedUpdateError("its header cannot be read") from error
    expected = header.begin + header.data_bytes
    if size != expected:
        raise DamagedUpdateError(f"{size} bytes, its header says {expected}")
    return header


def _digest_of_next(file: BinaryIO, count: int) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(min(CHUNK_BYTES, count)):
        digest.update(chunk)
        count -= len(chunk)
    return digest.hexdigest()


def _joined(digests: Mapping[str, str]) -> str:
    """Return the digests as one text, in the order of the tensors' names."""
    return "".join(digests[name] for name in sorted(digests))


def _split(text: str, layout: Layout) -> dict[str, str]:
    if len(text) != _DIGEST_LETTERS * len(layout) or 2 * len(bytes.fromhex(text)) != len(text):
        raise ValueError("not one digest for every tensor")
    return {
        name: text[_DIGEST_LETTERS * number :][:_DIGEST_LETTERS]
        for number, name in enumerate(sorted(layout))
    }


def _data_bytes(layout: Layout) -> int:
    """Return the size of all tensors, which must lie one after the other."""
    end = 0
    for entry in sorted(layout.values(), key=lambda entry: entry["data_offsets"]):
        begin, after = entry["data_offsets"]
        size = math.prod(entry["shape"]) * DTYPE_BYTES[entry["dtype"]]
        if not (type(begin) is type(after) is type(size) is int and size >= 0):
            raise ValueError("offsets and shapes are whole numbers")
        if begin != end or after - begin != size:
            raise ValueError("tensors overlap or leave gaps")
        end = after
    return end
