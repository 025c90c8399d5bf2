"""Tensor files: safetensors written atomically, read lazily. The only storage file with torch."""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from fedllm.errors import RunDirectoryError
from fedllm.storage.checkpoints import CheckpointRecord
from fedllm.storage.publish import publishing
from fedllm.storage.records import UpdateRecord
from fedllm.storage.updates import (
    DIGEST,
    DTYPE_BYTES,
    HEADER_ALIGNMENT_BYTES,
    LENGTH_BYTES,
    METADATA,
    RECORDS,
    DamagedUpdateError,
    digest_of,
    layout_text,
    read_whole,
    records_text,
    tensor_name,
)

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
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> str:
    """Publish tensors as safetensors and return the SHA-256 of the file.

    The same tensors and metadata give the same bytes: safetensors' own writer shuffles metadata.
    """
    named = _in_file_order(tensors)
    header = {**_layout(named), METADATA: dict(sorted(metadata.items()))}
    return _publish(path, [_encoded(header), *map(_bytes_of, named.values())])


class TensorFile:
    """A safetensors file whose tensors are read one by one by memory map."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            FileNotFoundError: there is none.
            RunDirectoryError: it is truncated or not a tensor file.
        """
        self.path = path
        try:
            self._file = safe_open(path, framework="pt").__enter__()
        except SafetensorError as error:
            raise RunDirectoryError(f"{path}: not a whole tensor file ({error})") from error
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

    def module(self, module: str) -> dict[str, torch.Tensor]:
        """Read the parts of one module, those named `<module>.<part>`."""
        prefix = f"{module}."
        return {
            name.removeprefix(prefix): self.get(name)
            for name in self.names
            if name.startswith(prefix) and "." not in name.removeprefix(prefix)
        }


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
    content = path.read_bytes()
    header = read_whole(io.BytesIO(content))
    try:
        record = CheckpointRecord.model_validate_json(header.records)
    except ValidationError as error:
        raise DamagedUpdateError(f"its record is not valid ({error.error_count()})") from error
    tensors = bytearray(memoryview(content)[len(content) - header.data_bytes :])
    return Checkpoint(record=record, tensors=_views(header.layout, tensors))


def _views(layout: Mapping[str, Any], content: bytearray) -> dict[str, torch.Tensor]:
    """Return the tensors that lie in `content`: nothing is copied."""
    return {
        name: torch.frombuffer(
            content,
            dtype=_TORCH_DTYPES[entry["dtype"]],
            count=math.prod(entry["shape"]),
            offset=entry["data_offsets"][0],
        ).reshape(entry["shape"])
        for name, entry in layout.items()
    }


def _publish_checked(path: Path, text: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Publish tensors and what the records say of them under one checksum."""
    named = _in_file_order(tensors)
    layout = _layout(named)
    digest = digest_of(text, layout_text(layout), map(_bytes_of, named.values()))
    header = {METADATA: {RECORDS: text, DIGEST: digest}, **layout}
    _publish(path, [_encoded(header), *map(_bytes_of, named.values())])


def _in_file_order(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors as they lie in a file: wide types first, so that all are aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    return {name: tensors[name].detach().cpu().contiguous() for name in order}


def _layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    layout: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        dtype = _DTYPES[tensor.dtype]
        begin, end = end, end + tensor.numel() * DTYPE_BYTES[dtype]
        layout[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    return layout


def _encoded(header: Mapping[str, object]) -> bytes:
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % HEADER_ALIGNMENT_BYTES)
    return len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's memory: nothing is copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _publish(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    with publishing(path) as beside, beside.open("wb") as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()
