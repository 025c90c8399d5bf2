"""JSON objects as rows: one a line, in a list, or one after the other; indented or not.

The name of the file does not matter: people name JSON lines `.json` and lists `.jsonl`. Numbers
are integers if the whole column holds integers; else they are text as JSON writes it. The bare
words NaN and Infinity, which are not JSON but which Python writes, are missing values.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedllm.data.blocks import RowBlock
from fedllm.data.columns import client_error, client_text
from fedllm.data.conversations import turn_lists
from fedllm.data.files.decoded import decoded
from fedllm.data.row_formats import SYSTEM, RowColumns
from fedllm.errors import DataError

# number of rows in a block: as Python objects they take several times the memory of their text
_BLOCK_ROWS = 20_000
_BLOCK_CHARACTERS = 16 << 20
_PEEKED_ROWS = 100
_LISTS = pa.list_(pa.string())
# joined files can have a byte order mark in the middle
_SPACE = re.compile(r"[\s\ufeff]*")
# an error this near to the end of a piece may come from the cut; longest: half of "\ud83d\ude00"
_CUT_CHARACTERS = 16
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class _JsonRow:
    """Row with the line where it begins and the size of its text."""

    line: int
    size: int
    row: dict[str, Any]


def peek_json(file: Path) -> dict[str, bool] | None:
    """Return the columns of a file's first rows and whether they hold lists; None without rows."""
    nested: dict[str, bool] = {}
    any_rows = False
    for json_row in islice(_Scanner(file).objects(), _PEEKED_ROWS):
        any_rows = True
        for name, value in json_row.row.items():
            nested[name] = nested.get(name, False) or _is_nested(value)
    return nested if any_rows else None


def read_json(file: Path, columns: RowColumns) -> Iterator[RowBlock]:
    """Yield the rows of a file of JSON objects in blocks.

    Raises:
        DataError: it is not JSON, is not text or holds a value that is not an object (with the
            line).
    """
    rows: list[_JsonRow] = []
    size = 0
    for row in _Scanner(file).objects():
        rows.append(row)
        size += row.size
        if len(rows) == _BLOCK_ROWS or size > _BLOCK_CHARACTERS:
            yield _block(rows, columns, file)
            rows, size = [], 0
    if rows:
        yield _block(rows, columns, file)


class _Scanner:
    """Scanner that finds one object after the other in a text that is read in pieces."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._chunks = decoded(file)
        self._decoder = json.JSONDecoder(parse_constant=lambda _word: None)
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def objects(self) -> Iterator[_JsonRow]:
        """Yield all objects, at the top level or in lists there."""
        before = None  # the element before in a list; None: not in a list
        while sign := self._next_sign():
            if before is None and sign == "[":
                self._advance(1)
                before = "["
            elif before is not None and before != "," and sign == "]":
                self._advance(1)
                before = None
            elif before == "item" and sign == ",":
                self._advance(1)
                before = ","
            elif before == "item":
                raise self._syntax_error("a comma is missing between two objects of its list")
            else:
                yield self._object()
                before = before and "item"
        if before is not None:
            raise self._syntax_error("it ends within its list; is the file whole?")

    def _next_sign(self) -> str:
        """Skip white space and return the next character; an empty text at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._advance(match.end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def _object(self) -> _JsonRow:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                if not self._may_be_cut(error) or not self._read_more():
                    raise self._parse_error(error) from error
            except RecursionError as error:
                raise self._syntax_error("it is nested too deeply") from error
            except ValueError as error:
                # the only other ValueError: Python limits the digits of an integer
                raise self._syntax_error(
                    "an integer has too many digits; write it as text"
                ) from error
        line, size = self._line, end - self._at
        if not isinstance(value, dict):
            raise DataError(f"data.path: {self._file} line {line} is not an object; need {{...}}")
        self._advance(size)
        return _JsonRow(line=line, size=size, row=value)

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        near = error.pos >= len(self._text) - _CUT_CHARACTERS
        return near or error.msg.startswith("Unterminated string")

    def _read_more(self) -> bool:
        """Read at least as much again as is left of the text; return False at the file's end."""
        left = self._text[self._at :]
        pieces: list[str] = []
        size = 0
        while not self._ended and size <= len(left):
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            pieces.append(chunk or "")
            size += len(pieces[-1])
        self._text, self._at = "".join([left, *pieces]), 0
        return size > 0

    def _advance(self, size: int) -> None:
        end = self._at + size
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _parse_error(self, error: json.JSONDecodeError) -> DataError:
        end = min(error.pos, len(self._text.rstrip()))
        at = self._line + self._text.count("\n", self._at, end)
        within = f" in the object that begins in line {self._line}" if at > self._line else ""
        return DataError(
            f"data.path: {self._file} line {at} is not JSON ({error.msg}{within}); correct it"
        )

    def _syntax_error(self, what: str) -> DataError:
        return DataError(f"data.path: {self._file} line {self._line} is not JSON ({what})")


def _block(rows: Sequence[_JsonRow], columns: RowColumns, file: Path) -> RowBlock:
    _check_format(rows, columns, file)
    builder = _ColumnBuilder(rows, columns, file)
    names = tuple(dict.fromkeys(name for json_row in rows for name in json_row.row))
    if columns.names.client not in {None, *names}:
        columns.check(names, str(file))
    arrays = {name: builder.array(name) for name in (*columns.required.values(), *names)}
    return RowBlock(
        table=pa.table(arrays),
        names=names,
        where=str(file),
        place=builder.place,
        has_turns=columns.conversations,
    )


def _check_format(rows: Sequence[_JsonRow], columns: RowColumns, file: Path) -> None:
    """Raise an error for a row of another format: it would count as a row without an answer."""
    for json_row in rows:
        if columns.names.output in json_row.row:
            continue
        nested = {name: _is_nested(value) for name, value in json_row.row.items()}
        others = columns.other_formats(nested)
        if others:
            raise DataError(
                f"data.format: {file} line {json_row.line} is a row of {others[0]}, not of "
                f"{columns.format} as the others; convert it, or give each format a run of its own"
            )


class _ColumnBuilder:
    """Builder of Arrow arrays from the columns of some rows."""

    def __init__(self, rows: Sequence[_JsonRow], columns: RowColumns, file: Path) -> None:
        self._rows, self._columns, self._where = rows, columns, str(file)

    def place(self, index: int) -> str:
        """Return the line of a row."""
        return f"line {self._rows[index].line:,}"

    def array(self, name: str) -> pa.Array:
        """Return a column; a column that is not read is null, unless it holds integers.

        Raises:
            DataError: a value is neither text nor a number, or half of a character (with the line).
        """
        values = [json_row.row.get(name) for json_row in self._rows]
        if _all_integers(values):
            return pa.array(values, pa.int64())
        if name not in self._columns.readable:
            return pa.nulls(len(values))
        try:
            return self._readable_array(name, values)
        except UnicodeEncodeError as error:
            raise self._half_character(name, values) from error

    def _readable_array(self, name: str, values: Sequence[Any]) -> pa.Array:
        names = self._columns.names
        if self._columns.conversations and name == names.output:
            systems = [json_row.row.get(SYSTEM) for json_row in self._rows]
            return turn_lists(values, systems, self._where, self.place)
        if name == names.client:
            values = [self._client(value, index) for index, value in enumerate(values)]
        if name == names.output and any(isinstance(value, list) for value in values):
            lists = [self._texts(name, value, index) for index, value in enumerate(values)]
            return pa.array(lists, _LISTS)
        texts = [self._text(name, value, index) for index, value in enumerate(values)]
        return pa.array(texts, pa.string())

    def _client(self, value: Any, index: int) -> Any:
        if not isinstance(value, float):
            return value
        text = client_text(value)
        if text is None:
            raise client_error(value, f"{self._where} {self.place(index)}")
        return text

    def _texts(self, name: str, value: Any, index: int) -> list[str | None]:
        items = value if isinstance(value, list) else [value]
        return [self._text(name, item, index) for item in items]

    def _text(self, name: str, value: Any, index: int) -> str | None:
        if isinstance(value, str):
            return value
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return None
        if isinstance(value, dict | list):
            raise DataError(
                f"data.path: {self._where} {self.place(index)}: `{name}` holds "
                f"{json.dumps(value)[:40]}, need text or numbers"
            )
        return json.dumps(value)

    def _half_character(self, name: str, values: Sequence[Any]) -> DataError:
        for index, value in enumerate(values):
            half = _SURROGATE.search(json.dumps(value, ensure_ascii=False))
            if half:
                return DataError(
                    f"data.path: {self._where} {self.place(index)}: `{name}` holds "
                    f"\\u{ord(half[0]):04x}, half of a character (text that was cut within an "
                    "emoji); take it out"
                )
        raise AssertionError(name)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | dict)


def _all_integers(values: Sequence[Any]) -> bool:
    return all(
        value is None or (type(value) is int and -(2**63) <= value < 2**63) for value in values
    )
