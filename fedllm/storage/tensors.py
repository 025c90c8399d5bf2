"""Tensor files: safetensors written atomically, read lazily. The only storage file with torch."""

import ctypes
import hashlib
import io
import math
import mmap
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from fedllm.errors import AdapterError, RunDirectoryError
from fedllm.storage.checked import (
    DTYPE_BYTES,
    DamagedUpdateError,
    Header,
    Layout,
    read_checked_header,
    read_whole,
)
from fedllm.storage.checkpoint_header import CheckpointRecord
from fedllm.storage.paths import encode_client
from fedllm.storage.publishing.placing import HashedPlaces, Places, placing, placing_checked
from fedllm.storage.publishing.publish import version_of
from fedllm.storage.records import UpdateRecord
from fedllm.storage.updates import Published, records_text, tensor_name, updates_in

_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_MOST_KINDS = 256  # of clients in a cohort that share what is the same of them
_C = ctypes.CDLL(None)
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """Return the plan of a tensor that is there already."""
        return cls(shape=tuple(tensor.shape), dtype=tensor.dtype)


@dataclass(frozen=True, kw_only=True)
class TensorWriter:
    """A file whose tensors are written as they are made, in any order, by several threads."""

    planned: Mapping[str, Planned]
    places: Places

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, once.

        Raises:
            StorageFull: no space or quota is left.
        """
        here = tensor.detach().cpu().contiguous()
        assert Planned.of(here) == self.planned[name], f"{name}: {Planned.of(here)} unplanned"
        self.places.write(name, _bytes_of(here))

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file of `writing_tensors`, after its block."""
        assert isinstance(self.places, HashedPlaces), "files of records are known by their header"
        return self.places.sha256


@contextmanager
def writing_tensors(
    path: Path, planned: Mapping[str, Planned], metadata: Mapping[str, str]
) -> Iterator[TensorWriter]:
    """Publish the tensors that the block writes as safetensors, all or nothing."""
    with placing(path, _layout(planned), metadata) as places:
        yield TensorWriter(planned=planned, places=places)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> str:
    """Publish tensors as safetensors and return the SHA-256 of the file.

    The same tensors and metadata give the same bytes: safetensors' own writer shuffles metadata.
    """
    planned = {name: Planned.of(tensor) for name, tensor in tensors.items()}
    with writing_tensors(path, planned, metadata) as writer:
        for name in _in_file_order(planned):
            writer.write(name, tensors[name])
    return writer.sha256


class TensorFile:
    """A safetensors file whose tensors are read one by one by memory map."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            FileNotFoundError: there is none.
            RunDirectoryError: it is truncated or not a tensor file.
        """
        self.path = path
        self._file = self._mapped()
        self._opened = version_of(path)
        self.names: tuple[str, ...] = tuple(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __enter__(self) -> Self:
        """Keep the file open for the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the map."""
        self._file.__exit__(kind, error, trace)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._file.get_slice(name).get_shape())

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            RunDirectoryError: the file has no such tensor.
        """
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise RunDirectoryError(f"{self.path}: no tensor {name} ({error})") from error
        return tensor

    def release(self) -> None:
        """Let go of the memory that holds what was read; the file can be read on.

        Raises:
            RunDirectoryError: another file has the name by now.
        """
        if version_of(self.path) != self._opened:
            raise RunDirectoryError(f"{self.path}: was exchanged while it was read; restore it")
        self._file.__exit__(None, None, None)
        self._file = self._mapped()

    def _mapped(self) -> Any:
        try:
            return safe_open(self.path, framework="pt").__enter__()
        except SafetensorError as error:
            raise RunDirectoryError(f"{self.path}: not a whole tensor file ({error})") from error

    def module(self, module: str) -> dict[str, torch.Tensor]:
        """Read the parts of one module, those named `<module>.<part>`."""
        prefix = f"{module}."
        return {
            name.removeprefix(prefix): self.get(name)
            for name in self.names
            if name.startswith(prefix) and "." not in name.removeprefix(prefix)
        }


class _Map:
    """A file's content in memory; no descriptor is kept, however many files are mapped.

    Python's own map keeps one, up to 3.12.
    """

    def __init__(self, file: BinaryIO) -> None:
        # the file whose header was read, whatever its name stands for by now
        opened, size = f"/proc/self/fd/{file.fileno()}", os.fstat(file.fileno()).st_size
        storage = torch.UntypedStorage.from_file(opened, shared=False, nbytes=size)
        assert isinstance(storage, torch.UntypedStorage)
        self._address = storage.data_ptr()
        self.content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data

    def digest(self, begin: int, end: int) -> bytes:
        """Return the SHA-256 of some bytes; their pages no longer count as the process's memory."""
        with self.content[begin:end] as data:
            found = hashlib.sha256(data).digest()
        begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        if (count := (end - begin) // mmap.PAGESIZE) > 0:
            # whoever reads them again finds them in the page cache
            place, size = self._address + begin, count * mmap.PAGESIZE
            _C.madvise(ctypes.c_void_p(place), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """A tensor that many clients send: its number among a client's, its type and shape."""

    number: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sent:
    """What a client sent, in little memory: the files of a whole cohort are open at once.

    Attributes:
        kinds: `<module>|A` and `<module>|B`, one mapping for all clients that send the like.
        scales: by module, one mapping for all clients of the same.
        begins: where each tensor begins in the file.
        digests: the SHA-256 of each, one after the other.
    """

    kinds: Mapping[str, _Kind]
    scales: Mapping[str, float]
    begins: "array[int]"
    digests: bytes

    @classmethod
    def of(cls, update: Published, header: Header) -> Self:
        """Return what matters of a client's update and of the header of its file."""
        client = encode_client(update.record.client)
        names = [f"{client}|{name}" for name in update.shapes]
        dtypes = [_TORCH_DTYPES[header.layout[name]["dtype"]] for name in names]
        return cls(
            kinds=_kinds(tuple(zip(update.shapes, dtypes, update.shapes.values(), strict=True))),
            scales=_scales(tuple(update.record.scales.items())),
            begins=array("q", [header.place(name)[0] for name in names]),
            digests=bytes.fromhex("".join(header.digests[name] for name in names)),
        )


@lru_cache(maxsize=_MOST_KINDS)
def _kinds(tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> Mapping[str, _Kind]:
    return {
        name: _Kind(number=number, dtype=dtype, shape=shape)
        for number, (name, dtype, shape) in enumerate(tensors)
    }


@lru_cache(maxsize=_MOST_KINDS)
def _scales(scales: tuple[tuple[str, float], ...]) -> Mapping[str, float]:
    return dict(scales)


class UpdateFile:
    """An update file that was collected; its tensors are views of the file, checked one by one."""

    def __init__(self, path: Path, sha256: str) -> None:
        """Map the file, by its header the one whose checksum was collected.

        Raises:
            AdapterError: it is missing, truncated or another file.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                header = read_checked_header(file)
                self._map = _Map(file)
            found = updates_in(path.name, header)
        except (DamagedUpdateError, FileNotFoundError) as error:
            raise AdapterError(f"{path}: damaged update ({error})") from error
        if header.digest != sha256:
            raise AdapterError(f"{path}: not the file that was collected")
        self._sent = {update.record.client: _Sent.of(update, header) for update in found}

    def scale(self, client: str, module: str) -> float:
        """Return the scale that a client trained a module with."""
        return self._sent[client].scales[module]

    def view(self, client: str, module: str, factor: str) -> torch.Tensor:
        """Return a factor (`A` (R, I) or `B` (O, R)) as it lies in the file, not yet checked."""
        kind, begin = self._place(client, module, factor)
        return _tensor(self._map.content, kind.dtype, kind.shape, begin)

    def check(self, client: str, module: str, factor: str) -> None:
        """Compare a factor with its digest.

        Raises:
            AdapterError: it was altered.
        """
        kind, begin = self._place(client, module, factor)
        end = begin + math.prod(kind.shape) * kind.dtype.itemsize
        digest = self._map.digest(begin, end)
        if not self._sent[client].digests.startswith(digest, kind.number * len(digest)):
            raise AdapterError(
                f"{self.path}: damaged update (client {client}: the checksum of {module} {factor} "
                "does not match)"
            )

    def _place(self, client: str, module: str, factor: str) -> tuple[_Kind, int]:
        sent = self._sent[client]
        kind = sent.kinds[f"{module}|{factor}"]
        return kind, sent.begins[kind.number]


def publish_update(
    path: Path,
    records: Sequence[UpdateRecord],
    tensors: Mapping[str, Mapping[str, tuple[torch.Tensor, torch.Tensor]]],
) -> None:
    """Publish the finished clients of a bundle as one file, their records in its header.

    Args:
        path: `updates/<attempt>-<bundle>-<part>.safetensors`.
        records: one per client; a failed client has a record and no tensors.
        tensors: client -> module -> (A (R, I), B (O, R)).
    """
    named = {
        tensor_name(client, module, factor): value
        for client, modules in tensors.items()
        for module, pair in modules.items()
        for factor, value in zip("AB", pair, strict=True)
    }
    _publish_checked(path, records_text(records), named)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A client's unfinished training as it was saved.

    `tensors` are, on the CPU, the factors (`<module>|A`, `<module>|B`) and what the optimizer
    keeps for each of them (`<module>|A|<name>`).
    """

    record: CheckpointRecord
    tensors: Mapping[str, torch.Tensor]


def publish_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Publish a client's unfinished training in place of what was saved of it before."""
    _publish_checked(path, checkpoint.record.model_dump_json(), checkpoint.tensors)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a client's unfinished training.

    Raises:
        FileNotFoundError: there is none.
        DamagedUpdateError: it is truncated, altered or not a checkpoint.
    """
    # read once: what is checked is what is gone on with
    content = bytearray(path.read_bytes())
    header = read_whole(io.BytesIO(content))
    try:
        record = CheckpointRecord.model_validate_json(header.records)
    except ValidationError as error:
        raise DamagedUpdateError(f"its record is not valid ({error.error_count()})") from error
    tensors = {name: _view(header, name, content) for name in header.layout}
    return Checkpoint(record=record, tensors=tensors)


@contextmanager
def writing_checked(
    path: Path, records: str, planned: Mapping[str, Planned]
) -> Iterator[TensorWriter]:
    """Publish records and the tensors that the block writes under one checksum, all or nothing."""
    with placing_checked(path, _layout(planned), records) as places:
        yield TensorWriter(planned=planned, places=places)


def _publish_checked(path: Path, records: str, tensors: Mapping[str, torch.Tensor]) -> None:
    planned = {name: Planned.of(tensor) for name, tensor in tensors.items()}
    with writing_checked(path, records, planned) as writer:
        for name in _in_file_order(planned):
            writer.write(name, tensors[name])


def _view(header: Header, name: str, content: bytearray | memoryview) -> torch.Tensor:
    """Return the tensor that lies in `content`: nothing is copied."""
    entry = header.layout[name]
    return _tensor(content, _TORCH_DTYPES[entry["dtype"]], entry["shape"], header.place(name)[0])


def _tensor(
    content: bytearray | memoryview, dtype: torch.dtype, shape: Sequence[int], begin: int
) -> torch.Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=begin).reshape(shape)


def _in_file_order(planned: Mapping[str, Planned]) -> list[str]:
    """Return tensors as they lie in a file: wide types first, so that all are aligned."""
    return sorted(planned, key=lambda name: (-planned[name].dtype.itemsize, name))


def _layout(planned: Mapping[str, Planned]) -> Layout:
    layout: dict[str, object] = {}
    end = 0
    for name in _in_file_order(planned):
        plan = planned[name]
        dtype = _DTYPES[plan.dtype]
        begin, end = end, end + math.prod(plan.shape) * DTYPE_BYTES[dtype]
        layout[name] = {
            "dtype": dtype,
            "shape": list(plan.shape),
            "data_offsets": [begin, end],
        }
    return layout


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's memory: nothing is copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
