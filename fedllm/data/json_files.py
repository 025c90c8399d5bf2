"""JSON and JSON lines as tables: numbers stay integers where a whole column is, else are text."""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedllm.config.models import ColumnsSection
from fedllm.errors import DataError

# rows turned into columns at a time: as Python objects they take several times their text
_BLOCK_ROWS = 20_000
_LISTS = pa.list_(pa.string())


def read_json_lines(file: Path, columns: ColumnsSection) -> pa.Table:
    """Read a file with one JSON object a line.

    Raises:
        DataError: a line is not a JSON object.
    """
    blocks: list[dict[str, pa.Array]] = []
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        rows = _rows(lines, file)
        while block := list(islice(rows, _BLOCK_ROWS)):
            blocks.append(_columns(block, columns, file))
    return _joined(blocks, file)


def read_json(file: Path, columns: ColumnsSection) -> pa.Table:
    """Read a file that is one JSON list of objects.

    Raises:
        DataError: it is not.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"data.path: {file} is not JSON ({error}); correct it") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"data.path: {file} is not a list of objects; make it one, or use .jsonl")
    return _joined([_columns(rows, columns, file)] if rows else [], file)


def _rows(lines: Iterator[str], file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"data.path: {file} line {number} is not JSON ({error}); correct it"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"data.path: {file} line {number} is not an object; need {{...}}")
        yield row


def _columns(
    rows: Sequence[dict[str, Any]], columns: ColumnsSection, file: Path
) -> dict[str, pa.Array]:
    named = set(columns.model_dump().values())
    arrays: dict[str, pa.Array] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        wanted = name in named or _all_integers(values)
        # only the name of any other column is of use, to tell which there are
        arrays[name] = (
            _array(values, f"{file}: column `{name}`") if wanted else pa.nulls(len(values))
        )
    return arrays


def _array(values: Sequence[Any], where: str) -> pa.Array:
    present = [value for value in values if value is not None]
    if not present:
        return pa.nulls(len(values))
    if _all_integers(values):
        return pa.array(values, pa.int64())
    try:
        if any(isinstance(value, list) for value in present):
            return pa.array([_texts(value, where) for value in values], _LISTS)
        return pa.array([None if v is None else _text(v, where) for v in values], pa.string())
    except UnicodeEncodeError as error:
        raise DataError(f"data.path: {where} is not UTF-8; convert the file") from error


def _all_integers(values: Sequence[Any]) -> bool:
    return all(
        value is None or (type(value) is int and -(2**63) <= value < 2**63) for value in values
    )


def _texts(value: Any, where: str) -> list[str] | None:
    if value is None:
        return None
    return [_text(item, where) for item in (value if isinstance(value, list) else [value])]


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict | list) or value is None:
        raise DataError(f"data.path: {where} holds {json.dumps(value)[:40]}, need text or numbers")
    return json.dumps(value)


def _joined(blocks: Sequence[dict[str, pa.Array]], file: Path) -> pa.Table:
    """Join blocks whose columns may differ in type: lists win over text, text over integers."""
    if not blocks:
        raise DataError(f"data.path: {file} has no rows; give one JSON object per row")
    lengths = [len(next(iter(block.values()))) if block else 0 for block in blocks]
    joined = {}
    for name in dict.fromkeys(name for block in blocks for name in block):
        parts = [
            block.get(name, pa.nulls(length)) for block, length in zip(blocks, lengths, strict=True)
        ]
        wanted = max((part.type for part in parts), key=_precedence)
        joined[name] = pa.chunked_array([_as(part, wanted) for part in parts], type=wanted)
    return pa.table(joined)


def _precedence(type_: pa.DataType) -> int:
    return [pa.null(), pa.int64(), pa.string(), _LISTS].index(type_)


def _as(part: pa.Array, wanted: pa.DataType) -> pa.Array:
    if wanted == _LISTS and part.type != _LISTS:
        texts = part.cast(pa.string()).to_pylist()
        return pa.array([None if text is None else [text] for text in texts], _LISTS)
    return part.cast(wanted)
