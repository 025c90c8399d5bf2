"""Published updates read without torch: header, checksum, shapes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedllm.storage.paths import RoundPaths, encode_client
from fedllm.storage.records import UpdateRecord

RECORDS, DIGEST = "records", "sha256"
_LENGTH_BYTES = 8
_CHUNK_BYTES = 1 << 20
_RECORDS = TypeAdapter(list[UpdateRecord])


@dataclass(frozen=True, kw_only=True)
class Published:
    """A client's update that can be read whole."""

    record: UpdateRecord
    file: str
    sha256: str
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a folder of updates holds: the first valid update of every client, and bad files."""

    published: Mapping[str, Published]
    damaged: Mapping[str, str]
    duplicates: int


class DamagedUpdateError(Exception):
    """An update file that is truncated, altered or not an update."""


def tensor_name(client: str, module: str, factor: str) -> str:
    """Return the name of a tensor in an update file: encoded client, module and `A` or `B`."""
    return f"{encode_client(client)}|{module}|{factor}"


def digest_of(records: str, data: bytes | memoryview) -> str:
    """Return the checksum of an update file: SHA-256 of its records and its tensor bytes."""
    return hashlib.sha256(records.encode() + b"\0" + data).hexdigest()


def read_update(path: Path) -> list[Published]:
    """Read the records of one update file and check that it is whole.

    Raises:
        DamagedUpdateError: it is truncated, altered or not an update file.
    """
    with path.open("rb") as file:
        header, header_bytes = _read_header(file.read(_LENGTH_BYTES), file)
        metadata = header.pop("__metadata__", {})
        records = metadata.get(RECORDS)
        if records is None or DIGEST not in metadata:
            raise DamagedUpdateError("no records in its header")
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        size = path.stat().st_size
        if size != _LENGTH_BYTES + header_bytes + end:
            raise DamagedUpdateError(f"{size} bytes, its header says {header_bytes + end + 8}")
        digest = hashlib.sha256(records.encode() + b"\0")
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != metadata[DIGEST]:
        raise DamagedUpdateError("checksum does not match")
    return _published(path.name, records, metadata[DIGEST], header)


def _read_header(length: bytes, file: Any) -> tuple[dict[str, Any], int]:
    try:
        count = int.from_bytes(length, "little")
        raw = file.read(count) if 0 < count < (1 << 30) else b""
        header = json.loads(raw)
    except (ValueError, UnicodeDecodeError) as error:
        raise DamagedUpdateError("its header cannot be read") from error
    if not isinstance(header, dict):
        raise DamagedUpdateError("its header cannot be read")
    return header, count


def _published(name: str, records: str, digest: str, header: Mapping[str, Any]) -> list[Published]:
    try:
        parsed = _RECORDS.validate_json(records)
    except ValidationError as error:
        raise DamagedUpdateError(f"its records are not valid ({error.error_count()})") from error
    by_client: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor, entry in header.items():
        encoded, _, rest = tensor.partition("|")
        by_client.setdefault(encoded, {})[rest] = tuple(entry["shape"])
    return [
        Published(
            record=record,
            file=name,
            sha256=digest,
            shapes=by_client.get(encode_client(record.client), {}),
        )
        for record in parsed
    ]


@dataclass(kw_only=True)
class UpdateScanner:
    """Scans a round's updates; files that were read once are not read again."""

    round: RoundPaths
    run_id: str
    base_fingerprint: str
    _known: dict[str, list[Published]] = field(default_factory=dict)

    def scan(self) -> Scan:
        """Return what is published now, by one directory scan."""
        damaged: dict[str, str] = {}
        published: dict[str, Published] = {}
        duplicates = 0
        for name in self._names():
            try:
                found = self._read(name)
            except FileNotFoundError:
                continue
            except (DamagedUpdateError, KeyError, TypeError, OSError) as error:
                damaged[name] = str(error)
                continue
            for update in found:
                duplicates += update.record.client in published
                published.setdefault(update.record.client, update)
        return Scan(published=published, damaged=damaged, duplicates=duplicates)

    def forget(self, name: str) -> None:
        """Read a file anew at the next scan."""
        self._known.pop(name, None)

    def _names(self) -> list[str]:
        try:
            names = [p.name for p in self.round.updates.iterdir()]
        except FileNotFoundError:
            return []
        return sorted(n for n in names if n.endswith(".safetensors") and not n.startswith("."))

    def _read(self, name: str) -> list[Published]:
        if name not in self._known:
            found = read_update(self.round.updates / name)
            for update in found:
                self._refuse_foreign(update.record)
            self._known[name] = found
        return self._known[name]

    def _refuse_foreign(self, record: UpdateRecord) -> None:
        if record.run_id != self.run_id:
            raise DamagedUpdateError(f"it belongs to run {record.run_id}")
        if record.round != self.round.number:
            raise DamagedUpdateError(f"it belongs to round {record.round}")
        if record.base_fingerprint != self.base_fingerprint:
            raise DamagedUpdateError("it was trained on another base model")


def shape_problem(
    update: Published,
    ranks: Mapping[str, int],
    sides: Mapping[str, tuple[int, int]],
) -> str | None:
    """Say what is wrong with an update's shapes, or None.

    Args:
        update: the update; a failed one has no tensors and no problem.
        ranks: the rank of each module that the client was asked to train.
        sides: (out, in) of each module.
    """
    if update.record.status == "failed":
        return None
    expected: dict[str, tuple[int, ...]] = {}
    for module, rank in ranks.items():
        out_features, in_features = sides[module]
        expected[f"{module}|A"] = (rank, in_features)
        expected[f"{module}|B"] = (out_features, rank)
    for name, shape in expected.items():
        if update.shapes.get(name) != shape:
            return f"{name.replace('|', ' ')} has shape {update.shapes.get(name)}, need {shape}"
    extra = sorted(set(update.shapes) - set(expected))
    return f"{extra[0].replace('|', ' ')} was not asked for" if extra else None
