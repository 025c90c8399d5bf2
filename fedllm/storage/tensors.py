"""Tensor files: safetensors written atomically, read lazily. The only storage file with torch."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from fedllm.errors import RunDirectoryError
from fedllm.storage.publish import publish_bytes, publishing
from fedllm.storage.records import UpdateRecord
from fedllm.storage.updates import DIGEST, RECORDS, digest_of, tensor_name

_LENGTH_BYTES = 8


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> str:
    """Publish tensors as safetensors and return the SHA-256 of the file.

    The same tensors and metadata give the same bytes.
    """
    contiguous = {name: tensors[name].contiguous() for name in sorted(tensors)}
    with publishing(path) as beside:
        save_file(contiguous, beside, metadata=dict(sorted(metadata.items())))
        return sha256_of(beside)


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
        tensor_name(client, module, factor): value.contiguous()
        for client, modules in tensors.items()
        for module, pair in modules.items()
        for factor, value in zip("AB", pair, strict=True)
    }
    raw = memoryview(save(named))
    length = int.from_bytes(raw[:_LENGTH_BYTES], "little")
    header = json.loads(bytes(raw[_LENGTH_BYTES : _LENGTH_BYTES + length]))
    data = raw[_LENGTH_BYTES + length :]
    text = json.dumps([record.model_dump(mode="json") for record in records])
    header["__metadata__"] = {RECORDS: text, DIGEST: digest_of(text, data)}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _LENGTH_BYTES)
    publish_bytes(path, len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded + data)
