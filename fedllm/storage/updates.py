"""Published updates read without torch: header, layout, checksum, shapes."""

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from fedllm.storage.checked import (
    DamagedUpdateError,
    Header,
    read_checked_header,
    read_whole,
)
from fedllm.storage.paths import RoundPaths, encode_client
from fedllm.storage.records import CohortRecord, UpdateRecord

_FLOATS = ("F64", "F32", "BF16", "F16")
# the coarsest time of change that file systems give folders: a file may come within it unseen
_TIME_OF_CHANGE_SECONDS = 2.0
_RECORDS = TypeAdapter(list[UpdateRecord])

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A client's update that can be read whole; shapes by `<module>|A` and `<module>|B`."""

    record: UpdateRecord
    file: str
    sha256: str
    shapes: Shapes


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a folder of updates holds: the first update of every client, and bad files.

    `duplicates` are further updates of the same clients; `failed` of the published ones say that
    the client's training failed.
    """

    published: Mapping[str, Published]
    damaged: Mapping[str, str]
    duplicates: Sequence[Published]
    failed: int = 0

    @property
    def valid(self) -> int:
        """How many clients have an update that the aggregation can use."""
        return len(self.published) - self.failed


class SentBy(Protocol):
    """What an update says of where it comes from."""

    @property
    def run_id(self) -> str:
        """The run."""

    @property
    def round(self) -> int:
        """The round."""

    @property
    def base_fingerprint(self) -> str:
        """The base model."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The run, round and base model that a round's updates are of; all others are foreign."""

    run_id: str
    round: int
    base_fingerprint: str

    @classmethod
    def of(cls, run_id: str, cohort: CohortRecord) -> "Origin":
        """Return what the updates of a cohort are of."""
        return cls(run_id=run_id, round=cohort.round, base_fingerprint=cohort.base_fingerprint)

    def problem(self, sent: SentBy) -> str | None:
        """Say what makes an update foreign, or None."""
        for what, is_, need in (
            ("run", sent.run_id, self.run_id),
            ("round", sent.round, self.round),
            ("base model", sent.base_fingerprint, self.base_fingerprint),
        ):
            if is_ != need:
                return f"it is of {what} {is_}, need {need}"
        return None


def tensor_name(client: str, module: str, factor: str) -> str:
    """Return the name of a tensor in an update file: encoded client, module and `A` or `B`."""
    return f"{encode_client(client)}|{module}|{factor}"


def records_text(records: Sequence[UpdateRecord]) -> str:
    """Return the records of an update file as the one text that is checksummed."""
    return _RECORDS.dump_json(list(records)).decode()


def read_update(path: Path) -> list[Published]:
    """Read the records of one update file by its header alone: its tensors stay unread.

    The header's checksum covers the digests of the tensors, so it tells which file this is;
    whoever reads a tensor compares it with its digest.

    Raises:
        FileNotFoundError: there is none.
        DamagedUpdateError: it is truncated, its header was altered, or it is no update file.
    """
    with path.open("rb") as file:
        header = read_checked_header(file)
    return updates_in(path.name, header)


def read_records(path: Path) -> list[UpdateRecord]:
    """Read the records of one update file as `read_update` does."""
    return [update.record for update in read_update(path)]


def check_update(path: Path) -> list[Published]:
    """Read one update file to its end and compare every tensor with its digest.

    Raises:
        FileNotFoundError: there is none.
        DamagedUpdateError: it is truncated, altered or not an update file.
    """
    with path.open("rb") as file:
        header = read_whole(file)
    return updates_in(path.name, header)


def updates_in(name: str, header: Header) -> list[Published]:
    """Return the updates of file `name`, whose header was read.

    Raises:
        DamagedUpdateError: its records are not those of updates, or do not fit its tensors; names
            client, module and value.
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
    return [_published(name, header, r, tensors[encode_client(r.client)]) for r in records]


def _published(
    name: str, header: Header, record: UpdateRecord, tensors: Mapping[str, Any]
) -> Published:
    types = {tensor: entry["dtype"] for tensor, entry in tensors.items()}
    problem = _type_problem(types) or _number_problem(record, types)
    if problem:
        raise DamagedUpdateError(f"client {record.client}: {problem}")
    shapes = {tensor: tuple(entry["shape"]) for tensor, entry in tensors.items()}
    return Published(record=record, file=name, sha256=header.digest, shapes=shapes)


def _type_problem(types: Mapping[str, str]) -> str | None:
    """Say which tensor is of no type that can be aggregated, or which pair disagrees."""
    for tensor, dtype in types.items():
        module, _, factor = tensor.rpartition("|")
        if dtype not in _FLOATS:
            return f"{module} {factor} is of type {dtype}, need one of {', '.join(_FLOATS)}"
        other = types.get(f"{module}|A", dtype)
        if dtype != other:
            return f"{module} {factor} is of type {dtype}, its A of type {other}: need one type"
    return None


def _number_problem(record: UpdateRecord, tensors: Iterable[str]) -> str | None:
    """Say which module's recorded scale or norms cannot be used; a failed update has no tensors."""
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
    """A folder as it was listed last; `since` is when its time of change was seen first."""

    path: Path
    names: frozenset[str] = frozenset()
    modified_ns: int = -1
    since: float = 0.0
    listed: float = 0.0
    shards: tuple[str, ...] = ()


@dataclass(kw_only=True)
class UpdateScanner:
    """Scans a round's updates; a look costs what is new, whatever the round has already.

    Of a file the header alone is read, and once; folders that did not change are not listed again.
    Tensors that were altered are for the aggregation to find, which reads each of them anyway. What
    is kept of an update is small: without scales and norms, which are many in number and which the
    aggregation reads from the files.

    Args:
        round: the round.
        origin: foreign updates are refused,
        problem: and those of which this says what is wrong.
    """

    round: RoundPaths
    origin: Origin
    problem: Callable[[Published], str | None] = lambda _update: None
    _known: dict[str, list[Published]] = field(default_factory=dict)
    _unread: set[str] = field(default_factory=set)
    _published: dict[str, Published] = field(default_factory=dict)
    _duplicates: list[Published] = field(default_factory=list)
    _failed: int = 0
    _folders: dict[str, _Folder] = field(default_factory=dict)
    _shapes: dict[frozenset[tuple[str, tuple[int, ...]]], Shapes] = field(default_factory=dict)

    def scan(self) -> Scan:
        """Return what is published now; its mapping is a view that the next scan goes on with."""
        self._look()
        damaged: dict[str, str] = {}
        for name in sorted(self._unread):
            try:
                found = self._read(name)
            except FileNotFoundError:
                continue
            except (DamagedUpdateError, OSError) as error:
                damaged[name] = str(error)
                continue
            self._unread.discard(name)
            self._known[name] = found
            self._count(found)
        return Scan(
            published=MappingProxyType(self._published),
            damaged=damaged,
            duplicates=tuple(self._duplicates),
            failed=self._failed,
        )

    def forget(self, name: str) -> None:
        """Read a file anew at the next scan, if it is there."""
        if self._known.pop(name, None) is not None:
            self._recount()
        self._unread.discard(name)
        prefix = f"{name.rpartition('/')[0]}/" if "/" in name else ""
        self._folders.pop(prefix, None)

    def _look(self) -> None:
        """Note the names of files that came and forget those that went."""
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
        if same and last.listed - last.since >= _TIME_OF_CHANGE_SECONDS:
            return set()
        names = frozenset(_names(last.path))
        found = self._folders[prefix] = _Folder(
            path=last.path,
            names=names,
            modified_ns=modified_ns,
            since=last.since if same else now,
            listed=now,
            shards=tuple(f"{name}/" for name in names if name.isdigit()),
        )
        new = {f"{prefix}{name}" for name in found.names - last.names if _is_update(name)}
        self._unread |= new - self._known.keys()
        return {f"{prefix}{name}" for name in last.names - found.names}

    def _count(self, found: Iterable[Published]) -> None:
        for update in found:
            if update.record.client in self._published:
                self._duplicates.append(update)
                continue
            self._published[update.record.client] = update
            self._failed += update.record.status == "failed"

    def _recount(self) -> None:
        # a new mapping: scans that were given out keep what they saw
        self._published = {}
        self._duplicates = []
        self._failed = 0
        for name in sorted(self._known):
            self._count(self._known[name])

    def _read(self, name: str) -> list[Published]:
        found = read_update(self.round.updates / name)
        for update in found:
            if problem := self.origin.problem(update.record) or self.problem(update):
                raise DamagedUpdateError(f"client {update.record.client}: {problem}")
        return [replace(self._small(update), file=name) for update in found]

    def _small(self, update: Published) -> Published:
        shapes = self._shapes.setdefault(frozenset(update.shapes.items()), update.shapes)
        record = update.record.model_copy(update={"scales": {}, "norms": {}})
        return replace(update, record=record, shapes=shapes)


def update_files(paths: RoundPaths) -> list[str]:
    """Return the names of a round's published updates below its folder of them, sorted."""
    found = _names(paths.updates)
    shards = [name for name in found if name.isdigit()]
    names = [name for name in found if _is_update(name)]
    for folder in shards:
        names += [f"{folder}/{n}" for n in _names(paths.updates / folder) if _is_update(n)]
    return sorted(names)


def _names(folder: Path) -> list[str]:
    try:
        # names alone: a path for each is ten times the work, and coordinators look all the time
        return os.listdir(folder)  # noqa: PTH208
    except FileNotFoundError:
        return []


def _is_update(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith(".")


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


def norm_problem(update: Published) -> str | None:
    """Say which module's norms an update does not record, or None."""
    modules = {tensor.rpartition("|")[0] for tensor in update.shapes}
    missing = sorted(modules - update.record.norms.keys())
    return f"{missing[0]} has no norms of A and B in its record" if missing else None
