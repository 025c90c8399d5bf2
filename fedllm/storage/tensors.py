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
    Sign,
    open_checked,
    read_and_check,
    read_checked_header,
)
from fedllm.storage.checkpoint_header import CheckpointRecord
from fedllm.storage.paths import encode_client
from fedllm.storage.publishing.placing import HashedFile, PlacedFile, placing, placing_checked
from fedllm.storage.publishing.publish import version_of
from fedllm.storage.records import KeptRecord, SentFactors, UpdateRecord
from fedllm.storage.updates import PublishedUpdate, records_text, tensor_name, updates_in

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
_MAX_CACHED = 256  # distinct sets of shapes or scales in a cohort, each held once
_C = ctypes.CDLL(None)
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Shape and type of a tensor to write."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """Return the spec of an existing tensor."""
        return cls(shape=tuple(tensor.shape), dtype=tensor.dtype)


@dataclass(frozen=True, kw_only=True)
class TensorWriter:
    """A file whose tensors are written one by one, in any order, by several threads."""

    planned: Mapping[str, TensorSpec]
    placed: PlacedFile

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, once.

        Raises:
            StorageFull: no space or quota is left.
        """
        on_cpu = tensor.detach().cpu().contiguous()
        spec, expected = TensorSpec.of(on_cpu), self.planned[name]
        assert spec == expected, f"{name}: got {spec}, planned {expected}"
        self.placed.write(name, _bytes_of(on_cpu))

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file of `writing_tensors`, after its block."""
        assert isinstance(self.placed, HashedFile), (
            "files of records are identified by their header"
        )
        return self.placed.sha256


@contextmanager
def writing_tensors(
    path: Path, planned: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> Iterator[TensorWriter]:
    """Publish the tensors that the block writes as safetensors, all or nothing."""
    with placing(path, _layout(planned), metadata) as placed:
        yield TensorWriter(planned=planned, placed=placed)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> str:
    """Publish tensors as safetensors and return the SHA-256 of the file.

    The same tensors and metadata give the same bytes; safetensors' own writer shuffles metadata.
    """
    planned = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    with writing_tensors(path, planned, metadata) as writer:
        for name in _in_file_order(planned):
            writer.write(name, tensors[name])
    return writer.sha256


def digest_of(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's values."""
    return hashlib.sha256(_bytes_of(tensor.detach().cpu().contiguous())).hexdigest()


class TensorFile:
    """A safetensors file whose tensors are read one by one through a memory map."""

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
        """Free the memory of what was read; the file stays readable.

        Raises:
            RunDirectoryError: another file has taken the name.
        """
        if version_of(self.path) != self._opened:
            raise RunDirectoryError(f"{self.path}: was replaced while it was read; restore it")
        self._file.__exit__(None, None, None)
        self._file = self._mapped()

    def _mapped(self) -> Any:
        try:
            open_checked(self.path).close()
            return safe_open(self.path, framework="pt").__enter__()
        except (SafetensorError, DamagedUpdateError) as error:
            raise RunDirectoryError(f"{self.path}: not a whole tensor file ({error})") from error

    def module(self, module: str) -> dict[str, torch.Tensor]:
        """Read the parts of one module: the tensors named `<module>.<part>`."""
        return {part: self.get(name) for part, name in self._parts(module)}

    def shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parts of one module without reading them."""
        return {part: self.shape(name) for part, name in self._parts(module)}

    def _parts(self, module: str) -> Iterator[tuple[str, str]]:
        prefix = f"{module}."
        for name in self.names:
            part = name.removeprefix(prefix)
            if name.startswith(prefix) and "." not in part:
                yield part, name


class _Map:
    """Content of a file, mapped into memory without keeping a file descriptor.

    Python's own mmap keeps one, up to 3.12, and many files are mapped at once.
    """

    def __init__(self, file: BinaryIO) -> None:
        # the file whose header was read, even if its name is another file's by now
        opened, size = f"/proc/self/fd/{file.fileno()}", os.fstat(file.fileno()).st_size
        storage = torch.UntypedStorage.from_file(opened, shared=False, nbytes=size)
        assert isinstance(storage, torch.UntypedStorage)
        self._address = storage.data_ptr()
        self.content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data

    def digest(self, begin: int, end: int) -> bytes:
        """Return the SHA-256 of some bytes, and free their pages from the process's memory."""
        with self.content[begin:end] as data:
            digest = hashlib.sha256(data).digest()
        begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        if (count := (end - begin) // mmap.PAGESIZE) > 0:
            # a later read finds them in the page cache
            address, size = self._address + begin, count * mmap.PAGESIZE
            _C.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
        return digest


@dataclass(frozen=True, kw_only=True, slots=True)
class _SentTensor:
    """A tensor that many clients send: its number among a client's tensors, its type and shape."""

    number: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _ClientTensors:
    """Tensors of one client, in little memory: the files of a whole cohort are open at once.

    Attributes:
        kinds: `<module>|A` and `<module>|B`; clients with the same types and shapes share it.
        scales: the scale of each module; clients with the same scales share it.
        norms: the recorded Frobenius norm of each tensor.
        begins: the byte where each tensor begins in the file.
        digests: the SHA-256 of each tensor, one after the other.
    """

    kinds: Mapping[str, _SentTensor]
    scales: Mapping[str, float]
    norms: "array[float]"
    begins: "array[int]"
    digests: bytes

    @classmethod
    def of(cls, update: PublishedUpdate, header: Header) -> Self:
        """Return the tensors of a client's update, from the header of its file."""
        client = encode_client(update.record.client)
        names = [f"{client}|{name}" for name in update.shapes]
        dtypes = [_TORCH_DTYPES[header.layout[name]["dtype"]] for name in names]
        return cls(
            kinds=_sent_tensors(
                tuple(zip(update.shapes, dtypes, update.shapes.values(), strict=True))
            ),
            scales=_scales(tuple(update.record.scales.items())),
            norms=array("d", [_norm(update, name) for name in update.shapes]),
            begins=array("q", [header.byte_range(name)[0] for name in names]),
            digests=bytes.fromhex("".join(header.digests[name] for name in names)),
        )


@lru_cache(maxsize=_MAX_CACHED)
def _sent_tensors(
    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...],
) -> Mapping[str, _SentTensor]:
    return {
        name: _SentTensor(number=number, dtype=dtype, shape=shape)
        for number, (name, dtype, shape) in enumerate(tensors)
    }


def _norm(update: PublishedUpdate, name: str) -> float:
    module, _, factor = name.rpartition("|")
    norms = update.record.norms.get(module, (math.nan, math.nan))
    return norms["AB".index(factor)]


@lru_cache(maxsize=_MAX_CACHED)
def _scales(scales: tuple[tuple[str, float], ...]) -> Mapping[str, float]:
    return dict(scales)


class UpdateFile:
    """A collected update file; its tensors are views of the file, checked one by one."""

    def __init__(self, path: Path, sha256: str) -> None:
        """Map the file if its header has the collected checksum.

        Raises:
            AdapterError: it is missing, truncated or another file.
        """
        self.path = path
        try:
            with open_checked(path) as file:
                header = read_checked_header(file)
                self._map = _Map(file)
            updates = updates_in(path.name, header)
        except (DamagedUpdateError, FileNotFoundError) as error:
            raise AdapterError(f"{path}: damaged update ({error})") from error
        if header.digest != sha256:
            raise AdapterError(f"{path}: its content is not that of the file that was collected")
        self._clients = {
            update.record.client: _ClientTensors.of(update, header) for update in updates
        }

    def scale(self, client: str, module: str) -> float:
        """Return the scale of a module in a client's training."""
        return self._clients[client].scales[module]

    def has(self, client: str, module: str, factor: str) -> bool:
        """Return whether the client sent a factor of a module."""
        return f"{module}|{factor}" in self._clients[client].kinds

    def norm(self, client: str, module: str, factor: str) -> float:
        """Return the Frobenius norm of a factor as the client recorded it."""
        kind, _ = self._location(client, module, factor)
        return self._clients[client].norms[kind.number]

    def view(self, client: str, module: str, factor: str) -> torch.Tensor:
        """Return a factor (`A` (R, I) or `B` (O, R)) as a view of the file, not yet checked."""
        kind, begin = self._location(client, module, factor)
        return _tensor(self._map.content, kind.dtype, kind.shape, begin)

    def check(self, client: str, module: str, factor: str) -> None:
        """Compare a factor with its digest.

        Raises:
            AdapterError: it was altered.
        """
        kind, begin = self._location(client, module, factor)
        end = begin + math.prod(kind.shape) * kind.dtype.itemsize
        digest = self._map.digest(begin, end)
        if not self._clients[client].digests.startswith(digest, kind.number * len(digest)):
            raise AdapterError(
                f"{self.path}: damaged update (client {client}: the checksum of {module} {factor} "
                "does not match)"
            )

    def _location(self, client: str, module: str, factor: str) -> tuple[_SentTensor, int]:
        sent = self._clients[client]
        kind = sent.kinds[f"{module}|{factor}"]
        return kind, sent.begins[kind.number]


def publish_update(
    path: Path,
    records: Sequence[UpdateRecord],
    tensors: Mapping[str, Mapping[str, tuple[torch.Tensor, torch.Tensor]]],
    sent: SentFactors = "AB",
    sign: Sign | None = None,
) -> None:
    """Publish the finished clients of a bundle as one file, with their records in its header.

    Args:
        path: `updates/<attempt>-<bundle>-<part>.safetensors`.
        records: one per client; a failed client has a record and no tensors.
        tensors: client -> module -> (A (R, I), B (O, R)).
        sent: which of the two are written.
        sign: signs the file's checksum for each of the records; None: nobody will believe it.
    """
    named = {
        tensor_name(client, module, factor): value
        for client, modules in tensors.items()
        for module, pair in modules.items()
        for factor, value in zip("AB", pair, strict=True)
        if factor in sent
    }
    _publish_checked(path, records_text(records), named, sign)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A client's unfinished training, as saved.

    `tensors` are, on the CPU, the factors (`<module>|A`, `<module>|B`) and the optimizer's state
    for each of them (`<module>|A|<name>`). `sha256` and `signature` are those of its file.
    """

    record: CheckpointRecord
    tensors: Mapping[str, torch.Tensor]
    sha256: str = ""
    signature: str = ""


def publish_checkpoint(path: Path, checkpoint: Checkpoint, sign: Sign | None = None) -> None:
    """Publish a client's unfinished training in place of its previous checkpoint."""
    _publish_checked(path, checkpoint.record.model_dump_json(), checkpoint.tensors, sign)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a client's unfinished training.

    Raises:
        FileNotFoundError: there is none.
        DamagedUpdateError: it is truncated, altered or not a checkpoint.
    """
    # read once: training continues from the very bytes that were checked
    with open_checked(path) as file:
        content = bytearray(file.read())
    header = read_and_check(io.BytesIO(content))
    try:
        record = CheckpointRecord.model_validate_json(header.records)
    except ValidationError as error:
        raise DamagedUpdateError(f"its record is not valid ({error.error_count()})") from error
    tensors = {name: _view(header, name, content) for name in header.layout}
    return Checkpoint(
        record=record, tensors=tensors, sha256=header.digest, signature=header.signatures
    )


def publish_kept(path: Path, record: KeptRecord, tensors: Mapping[str, torch.Tensor]) -> None:
    """Publish what a client keeps of a round."""
    _publish_checked(path, record.model_dump_json(), tensors)


def read_kept(path: Path) -> tuple[KeptRecord, dict[str, torch.Tensor]]:
    """Read what a client kept of a round.

    Raises:
        FileNotFoundError: there is none.
        DamagedUpdateError: it is truncated or altered.
    """
    with open_checked(path) as file:
        content = bytearray(file.read())
    header = read_and_check(io.BytesIO(content))
    try:
        record = KeptRecord.model_validate_json(header.records)
    except ValidationError as error:
        raise DamagedUpdateError(f"its record is not valid ({error.error_count()})") from error
    return record, {name: _view(header, name, content) for name in header.layout}


@contextmanager
def writing_checked(
    path: Path, records: str, planned: Mapping[str, TensorSpec], sign: Sign | None = None
) -> Iterator[TensorWriter]:
    """Publish records and the tensors that the block writes under one checksum, all or nothing."""
    with placing_checked(path, _layout(planned), records, sign) as placed:
        yield TensorWriter(planned=planned, placed=placed)


def _publish_checked(
    path: Path, records: str, tensors: Mapping[str, torch.Tensor], sign: Sign | None = None
) -> None:
    planned = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    with writing_checked(path, records, planned, sign) as writer:
        for name in _in_file_order(planned):
            writer.write(name, tensors[name])


def _view(header: Header, name: str, content: bytearray | memoryview) -> torch.Tensor:
    """Return a tensor as a view of `content`: nothing is copied."""
    entry = header.layout[name]
    return _tensor(
        content, _TORCH_DTYPES[entry["dtype"]], entry["shape"], header.byte_range(name)[0]
    )


def _tensor(
    content: bytearray | memoryview, dtype: torch.dtype, shape: Sequence[int], begin: int
) -> torch.Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=begin).reshape(shape)


def _in_file_order(planned: Mapping[str, TensorSpec]) -> list[str]:
    """Return the tensors in their order in a file: wide types first, so that all are aligned."""
    return sorted(planned, key=lambda name: (-planned[name].dtype.itemsize, name))


def _layout(planned: Mapping[str, TensorSpec]) -> Layout:
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
