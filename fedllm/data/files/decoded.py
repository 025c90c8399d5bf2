"""Text of a file: compressed or not, UTF-8 or another Unicode encoding with its byte order mark."""

import codecs
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pyarrow as pa

from fedllm.config.yaml_text import byte_order_mark
from fedllm.errors import DataError

_CHUNK_BYTES = 1 << 20
# found by content, because packing and unpacking leave wrong names
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


def decoded(file: Path) -> Iterator[str]:
    """Yield the text of a file in pieces of about 1 MiB, without its byte order mark.

    Raises:
        DataError: it cannot be read, or is not text (with the line).
    """
    chunks = _chunks(file)
    first = next(chunks, b"")
    mark, encoding = byte_order_mark(first)
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    for chunk in chain([first[len(mark) :]], chunks, [None]):
        try:
            text = decoder.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            raise _encoding_error(file, line, error) from error
        if "\0" in text:
            number = line + text.count("\n", 0, text.index("\0"))
            raise DataError(
                f"data.path: {file} line {number} holds a zero byte, so it is not UTF-8 text; save "
                "it as UTF-8 (or as UTF-16 with a byte order mark)"
            )
        line += text.count("\n")
        if text:
            yield text


def _chunks(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as raw:
            head = raw.read(4)
        names = (name for mark, name in _COMPRESSIONS.items() if head.startswith(mark))
        with pa.input_stream(str(file), compression=next(names, None)) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"data.path: {file} cannot be read ({error}); is it whole?") from error


def _encoding_error(file: Path, line: int, error: UnicodeDecodeError) -> DataError:
    before = error.object[: error.start].decode(error.encoding, errors="replace")
    name = "UTF-8" if error.encoding == "utf-8" else error.encoding.upper()
    return DataError(
        f"data.path: {file} line {line + before.count(chr(10))} is not {name} (byte "
        f"0x{error.object[error.start]:02x}); convert the file to UTF-8"
    )
