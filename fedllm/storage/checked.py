"""Files of records and tensors that one checksum covers, read without torch.

The file is a safetensors file. Its metadata holds the records, a digest of every tensor, and a
checksum of records, layout and digests: the header alone tells which file it is, and a tensor can
be checked when it is read.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

METADATA, RECORDS, DIGEST, DIGESTS = "__metadata__", "records", "sha256", "tensors"
LENGTH_BYTES = HEADER_ALIGNMENT_BYTES = 8
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}
DTYPE_BYTES |= {"BOOL": 1}
CHUNK_BYTES = 1 << 20
_DIGEST_LETTERS = 64

Layout = Mapping[str, Any]  # name -> dtype, shape, data_offsets: as safetensors has it


class DamagedUpdateError(Exception):
    """An update file that is truncated, altered or not an update."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a file of records and tensors.

    Attributes:
        records: the records, as the text that is checksummed.
        digest: the checksum that the file says it has.
        digests: the SHA-256 of every tensor's bytes.
        layout: names, types, shapes and places of the tensors.
        begin: where the tensors begin.
        data_bytes: how long they are together.
    """

    records: str
    digest: str
    digests: Mapping[str, str]
    layout: Layout
    begin: int
    data_bytes: int

    def place(self, name: str) -> tuple[int, int]:
        """Return where a tensor's bytes begin and end in the file."""
        begin, end = self.layout[name]["data_offsets"]
        return self.begin + begin, self.begin + end


def digest_of(records: str, layout: Layout, digests: Mapping[str, str]) -> str:
    """Return the checksum of a file: SHA-256 of records, layout and tensors' digests."""
    text = json.dumps(layout, sort_keys=True, separators=(",", ":"))
    covered = f"{records}\0{text}\0{_joined(digests)}"
    # what JSON may say and UTF-8 may not
    return hashlib.sha256(covered.encode(errors="surrogatepass")).hexdigest()


def metadata_of(records: str, layout: Layout, digests: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file of records and tensors; its length follows from the layout."""
    return {
        RECORDS: records,
        DIGEST: digest_of(records, layout, digests),
        DIGESTS: _joined(digests),
    }


def read_checked_header(file: BinaryIO) -> Header:
    """Read the header of a file: its checksum tells which file it is, its digests are not compared.

    Raises:
        DamagedUpdateError: it is truncated, altered or no such file.
    """
    header = _read_header(file)
    if digest_of(header.records, header.layout, header.digests) != header.digest:
        raise DamagedUpdateError("its header's checksum does not match")
    return header


def read_whole(file: BinaryIO) -> Header:
    """Read a file and compare everything in it with its checksum.

    Raises:
        DamagedUpdateError: it is truncated, altered or no such file.
    """
    header = read_checked_header(file)
    for name in sorted(header.layout, key=header.place):
        begin, end = header.place(name)
        file.seek(begin)
        if _digest_of_next(file, end - begin) != header.digests[name]:
            raise DamagedUpdateError(f"the checksum of {name} does not match")
    return header


def _read_header(file: BinaryIO) -> Header:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    count = int.from_bytes(file.read(LENGTH_BYTES), "little")
    try:
        raw = json.loads(file.read(count) if count < size else b"")
        metadata = raw.pop(METADATA)
        if not isinstance(metadata[RECORDS], str):
            raise TypeError("records are a text")
        header = Header(
            records=metadata[RECORDS],
            digest=metadata[DIGEST],
            digests=_split(metadata[DIGESTS], raw),
            layout=raw,
            begin=LENGTH_BYTES + count,
            data_bytes=_data_bytes(raw),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedUpdateError("its header cannot be read") from error
    whole = header.begin + header.data_bytes
    if size != whole:
        raise DamagedUpdateError(f"{size} bytes, its header says {whole}")
    return header


def _digest_of_next(file: BinaryIO, count: int) -> str:
    digest = hashlib.sha256()
    while piece := file.read(min(CHUNK_BYTES, count)):
        digest.update(piece)
        count -= len(piece)
    return digest.hexdigest()


def _joined(digests: Mapping[str, str]) -> str:
    """Return digests in the order of their names, which the layout has."""
    return "".join(digests[name] for name in sorted(digests))


def _split(text: str, layout: Layout) -> dict[str, str]:
    if len(text) != _DIGEST_LETTERS * len(layout) or 2 * len(bytes.fromhex(text)) != len(text):
        raise ValueError("one digest for every tensor")
    return {
        name: text[_DIGEST_LETTERS * number :][:_DIGEST_LETTERS]
        for number, name in enumerate(sorted(layout))
    }


def _data_bytes(layout: Layout) -> int:
    """Return how many bytes of tensors follow, which must lie one after the other."""
    end = 0
    for entry in sorted(layout.values(), key=lambda entry: entry["data_offsets"]):
        begin, after = entry["data_offsets"]
        if begin != end or after - begin != math.prod(entry["shape"]) * DTYPE_BYTES[entry["dtype"]]:
            raise ValueError("tensors overlap or leave gaps")
        end = after
    return end
