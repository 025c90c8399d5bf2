"""Published updates, read without torch: header, layout, checksum, shapes."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from fedllm.storage.checked import (
    DamagedUpdateError,
    Header,
    open_checked,
    read_and_check,
    read_checked_header,
)
from fedllm.storage.paths import RoundPaths, encode_client, names_in
from fedllm.storage.records import CohortRecord, RunRecord, UpdateRecord

REFUSED = "damaged"
"""The word in the names of update files that were set aside: truncated, forged or impossible."""
_SUFFIX = ".safetensors"
_FLOATS = ("F64", "F32", "BF16", "F16")
# the coarsest modification time of folders on any file system: a second change within it is unseen
_MTIME_SECONDS = 2.0
_RECORDS = TypeAdapter(list[UpdateRecord])

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class PublishedUpdate:
    """A client's readable update; its shapes are keyed by `<module>|A` and `<module>|B`.

    `num_bytes` is the size of its tensors in the file, `signature` the client's of its checksum.
    """

    record: UpdateRecord
    file: str
    sha256: str
    shapes: Shapes
    num_bytes: int
    signature: str = ""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Content of a folder of updates: the first update of every client, and bad files.

    `duplicates` are further updates of the same clients. `failed` counts the published updates that
    report a failed training.
    """

    published: Mapping[str, PublishedUpdate]
    damaged: Mapping[str, str]
    duplicates: Sequence[PublishedUpdate]
    failed: int = 0

    @property
    def valid(self) -> int:
        """The number of clients whose update the aggregation can use."""
        return len(self.published) - self.failed


class HasOrigin(Protocol):
    """The fields of an update that tell where it comes from."""

    @property
    def run_id(self) -> str:
        """The run."""

    @property
    def round(self) -> int:
        """The round."""

    @property
    def base_fingerprint(self) -> str:
        """The base model."""

    @property
    def base_change(self) -> str | None:
        """The change of it."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The run, round and base model of a round's updates; an update of any other is foreign.

    `earlier_ids` are those of the run that this one was copied from: what lay here came along.
    """

    run_id: str
    round: int
    base_fingerprint: str
    base_change: str | None = None
    earlier_ids: tuple[str, ...] = ()

    @classmethod
    def of(cls, run: RunRecord, cohort: CohortRecord) -> "Origin":
        """Return the origin of a cohort's updates."""
        return cls(
            run_id=run.run_id,
            earlier_ids=tuple(run.earlier_ids),
            round=cohort.round,
            base_fingerprint=cohort.base_fingerprint,
            base_change=cohort.base_change,
        )

    def problem(self, update: HasOrigin) -> str | None:
        """Say why an update is foreign, or None."""
        if update.run_id not in (self.run_id, *self.earlier_ids):
            return f"it is of run {update.run_id}, need {self.run_id}"
        for what, found, expected in (
            ("round", update.round, self.round),
            ("base model", update.base_fingerprint, self.base_fingerprint),
            ("change of the base", update.base_change, self.base_change),
        ):
            if found != expected:
                return f"it is of {what} {found}, need {expected}"
        return None


def tensor_name(client: str, module: str, factor: str) -> str:
    """Return the name of a tensor in an update file: encoded client, module and `A` or `B`."""
    return f"{encode_client(client)}|{module}|{factor}"


def records_text(records: Sequence[UpdateRecord]) -> str:
    """Return the records of an update file as the text that is checksummed."""
    return _RECORDS.dump_json(list(records)).decode()


def read_update(path: Path) -> list[PublishedUpdate]:
    """Read the records of an update file from its header; its tensors stay unread.

    The header's checksum covers the digests of the tensors, so it identifies the file. A reader of
    a tensor compares the tensor with its digest.

    Raises:
        FileNotFoundError: there is none.
        DamagedUpdateError: it is truncated, its header was altered, or it is no update file.
    """
    with open_checked(path) as file:
        header = read_checked_header(file)
    return updates_in(path.name, header)


def read_records(path: Path) -> list[UpdateRecord]:
    """Read the records of an update file as `read_update` does."""
    return [update.record for update in read_update(path)]


def check_update(path: Path) -> list[PublishedUpdate]:
    """Read an update file to its end and compare every tensor with its digest.

    Raises:
        FileNotFoundError: there is none.
        DamagedUpdateError: it is truncated, altered or not an update file.
    """
    with open_checked(path) as file:
        header = read_and_check(file)
    return updates_in(path.name, header)


def updates_in(name: str, header: Header) -> list[PublishedUpdate]:
    """Return the updates of file `name` from its header.

    Raises:
        DamagedUpdateError: the records are not those of updates, or do not fit the tensors; the
            message names client, module and value.
    """
    try:
        records = _RECORDS.validate_json(header.records)
    except ValidationError as error:
        raise DamagedUpdateError(f"its records are not valid ({error.error_count()})") from error
    tensors: dict[str, dict[str, Any]] = {}
    for record in records:
        if encode_client(record.client) in tensors:
            raise DamagedUpdateError(f"client {record.client} has two records")
        tensors[encode_client(record.client)] = {}
    for tensor, entry in header.layout.items():
        encoded, _, rest = tensor.partition("|")
        if encoded not in tensors:
            raise DamagedUpdateError(f"{tensor} is of a client without a record")
        tensors[encoded][rest] = entry
    return [
        _published(name, header, record, tensors[encode_client(record.client)], signature)
        for record, signature in zip(records, signatures_in(header, len(records)), strict=True)
    ]


def _published(
    name: str, header: Header, record: UpdateRecord, tensors: Mapping[str, Any], signature: str
) -> PublishedUpdate:
    types = {tensor: entry["dtype"] for tensor, entry in tensors.items()}
    problem = _type_problem(types) or _number_problem(record, types)
    if problem:
        raise DamagedUpdateError(f"client {record.client}: {problem}")
    shapes = {tensor: tuple(entry["shape"]) for tensor, entry in tensors.items()}
    ranges = [entry["data_offsets"] for entry in tensors.values()]
    return PublishedUpdate(
        record=record,
        file=name,
        sha256=header.digest,
        shapes=shapes,
        num_bytes=sum(end - begin for begin, end in ranges),
        signature=signature,
    )


def signatures_in(header: Header, count: int) -> list[str]:
    """Return the signature of each record of a file; empty ones if it has not one for each."""
    size, rest = divmod(len(header.signatures), count or 1)
    if rest:
        return [""] * count
    return [header.signatures[size * number :][:size] for number in range(count)]


def _type_problem(types: Mapping[str, str]) -> str | None:
    """Say which tensor has a type that cannot be aggregated, or which pair has two types."""
    for tensor, dtype in types.items():
        module, _, factor = tensor.rpartition("|")
        if dtype not in _FLOATS:
            return f"{module} {factor} is of type {dtype}, need one of {', '.join(_FLOATS)}"
        other = types.get(f"{module}|A", dtype)
        if dtype != other:
            return f"{module} {factor} is of type {dtype}, its A of type {other}: need one type"
    return None


def _number_problem(record: UpdateRecord, tensors: Iterable[str]) -> str | None:
    """Say which module's recorded scale or norms are invalid; a failed update has no tensors."""
    for module in sorted({tensor.rpartition("|")[0] for tensor in tensors}):
        scale = record.scales.get(module)
        if scale is None or not math.isfinite(scale):
            return f"{module} has the scale {scale}, need a finite number"
        norms = record.norms.get(module)
        if norms is not None and not all(0 <= norm < math.inf for norm in norms):
            return f"{module} has the norms {norms} of A and B, need finite numbers >= 0"
    return None


@dataclass(kw_only=True)
class _Folder:
    """A folder at its last listing; `since` is when this modification time was first seen."""

    path: Path
    names: frozenset[str] = frozenset()
    modified_ns: int = -1
    since: float = 0.0
    listed: float = 0.0
    shards: tuple[str, ...] = ()


@dataclass(kw_only=True)
class UpdateScanner:
    """Scanner of a round's updates; a scan costs what is new, however many updates exist.

    It reads only the header of a file, once, and lists only folders that changed. The aggregation
    reads every tensor and so finds altered ones. The scanner keeps little of an update: not the
    scales and norms, which are many and which the aggregation reads from the files.

    Args:
        round: the round.
        origin: foreign updates are refused.
        problem: says what is wrong with an update; such an update is refused too.
    """

    round: RoundPaths
    origin: Origin
    problem: Callable[[PublishedUpdate], str | None] = lambda _update: None
    _known: dict[str, list[PublishedUpdate]] = field(default_factory=dict)
    _unread: set[str] = field(default_factory=set)
    _published: dict[str, PublishedUpdate] = field(default_factory=dict)
    _duplicates: list[PublishedUpdate] = field(default_factory=list)
    _failed: int = 0
    _folders: dict[str, _Folder] = field(default_factory=dict)
    _shapes: dict[frozenset[tuple[str, tuple[int, ...]]], Shapes] = field(default_factory=dict)

    def scan(self) -> Scan:
        """Return the published updates; the mapping is a live view that the next scan extends."""
        self._update_names()
        damaged: dict[str, str] = {}
        for name in sorted(self._unread):
            try:
                updates = self._read(name)
            except FileNotFoundError:
                continue
            except (DamagedUpdateError, OSError) as error:
                damaged[name] = str(error)
                continue
            self._unread.discard(name)
            self._known[name] = updates
            self._count(updates)
        return Scan(
            published=MappingProxyType(self._published),
            damaged=damaged,
            duplicates=tuple(self._duplicates),
            failed=self._failed,
        )

    def forget(self, name: str) -> None:
        """Forget a file, so that the next scan reads it again if it exists."""
        if self._known.pop(name, None) is not None:
            self._recount()
        self._unread.discard(name)
        prefix = f"{name.rpartition('/')[0]}/" if "/" in name else ""
        self._folders.pop(prefix, None)

    def _update_names(self) -> None:
        """Note the names of new files and forget those of removed files."""
        gone = self._list("")
        for prefix in self._folders[""].shards:
            gone |= self._list(prefix)
        self._unread -= gone
        if known := gone & self._known.keys():
            for name in known:
                del self._known[name]
            self._recount()

    def _list(self, prefix: str) -> set[str]:
        """List a folder if it may have changed; return the names that are gone."""
        last = self._folders.get(prefix) or _Folder(path=self.round.updates / prefix)
        try:
            modified_ns = last.path.stat().st_mtime_ns
        except FileNotFoundError:
            modified_ns = 0
        now = time.monotonic()
        same = last.modified_ns == modified_ns
        if same and last.listed - last.since >= _MTIME_SECONDS:
            return set()
        names = frozenset(names_in(last.path))
        listing = self._folders[prefix] = _Folder(
            path=last.path,
            names=names,
            modified_ns=modified_ns,
            since=last.since if same else now,
            listed=now,
            shards=tuple(f"{name}/" for name in names if name.isdecimal()),
        )
        new = {f"{prefix}{name}" for name in listing.names - last.names if _is_update(name)}
        self._unread |= new - self._known.keys()
        return {f"{prefix}{name}" for name in last.names - listing.names}

    def _count(self, updates: Iterable[PublishedUpdate]) -> None:
        for update in updates:
            if update.record.client in self._published:
                self._duplicates.append(update)
                continue
            self._published[update.record.client] = update
            self._failed += update.record.status == "failed"

    def _recount(self) -> None:
        # a new mapping: earlier scans keep theirs
        self._published = {}
        self._duplicates = []
        self._failed = 0
        for name in sorted(self._known):
            self._count(self._known[name])

    def _read(self, name: str) -> list[PublishedUpdate]:
        updates = read_update(self.round.updates / name)
        for update in updates:
            if problem := self.origin.problem(update.record) or self.problem(update):
                raise DamagedUpdateError(f"client {update.record.client}: {problem}")
        return [replace(self._without_numbers(update), file=name) for update in updates]

    def _without_numbers(self, update: PublishedUpdate) -> PublishedUpdate:
        shapes = self._shapes.setdefault(frozenset(update.shapes.items()), update.shapes)
        record = update.record.model_copy(update={"scales": {}, "norms": {}})
        return replace(update, record=record, shapes=shapes)


def update_files(paths: RoundPaths) -> list[str]:
    """Return the names of a round's published updates, relative to their folder, sorted."""
    return sorted(name for name in _all_names(paths) if _is_update(name.rpartition("/")[2]))


def count_refused(paths: RoundPaths) -> int:
    """Return how many update files of a round were set aside as `REFUSED`."""
    return sum(f"{_SUFFIX}.{REFUSED}-" in name for name in _all_names(paths))


def _all_names(paths: RoundPaths) -> Iterator[str]:
    for name in names_in(paths.updates):
        yield name
        if name.isdecimal():
            yield from (f"{name}/{below}" for below in names_in(paths.updates / name))


def _is_update(name: str) -> bool:
    return name.endswith(_SUFFIX) and not name.startswith(".")
