"""JSON objects as rows: one a line, in a list, or one after the other; indented or not.

What a file is called does not matter: people give JSON lines the name `.json` and lists the name
`.jsonl`. Numbers stay integers where a whole column is, else they are text as JSON writes it. The
bare words NaN and Infinity, which no JSON has and every Python writes, are missing values.
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
from fedllm.data.columns import client_text, no_client
from fedllm.data.conversations import turn_lists
from fedllm.data.files.decoded import decoded
from fedllm.data.formats import SYSTEM, RowColumns
from fedllm.errors import DataError

# rows turned into columns at a time: as Python objects they take several times their text
_BLOCK_ROWS = 20_000
_BLOCK_CHARACTERS = 16 << 20
_PEEKED_ROWS = 100
_LISTS = pa.list_(pa.string())
# files that were joined have a byte order mark in their middle
_SPACE = re.compile(r"[\s\ufeff]*")
# how near its end a text that goes on is found to be wrong: the longest is half of "\ud83d\ude00"
_CUT_CHARACTERS = 16
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Object:
    """A row, the line where it begins and the size of its text."""

    line: int
    size: int
    row: dict[str, Any]


def peek_json(file: Path) -> dict[str, bool] | None:
    """Return the columns of a file's first rows and whether they hold lists; None without rows."""
    found: dict[str, bool] = {}
    any_rows = False
    for each in islice(_Scanner(file).objects(), _PEEKED_ROWS):
        any_rows = True
        for name, value in each.row.items():
            found[name] = found.get(name, False) or _is_nested(value)
    return found if any_rows else None


def read_json(file: Path, wanted: RowColumns) -> Iterator[RowBlock]:
    """Yield the rows of a file of JSON objects in blocks.

    Raises:
        DataError: it is not JSON, not text or holds what is no object (with the line).
    """
    rows: list[_Object] = []
    size = 0
    for each in _Scanner(file).objects():
        rows.append(each)
        size += each.size
        if len(rows) == _BLOCK_ROWS or size > _BLOCK_CHARACTERS:
            yield _block(rows, wanted, file)
            rows, size = [], 0
    if rows:
        yield _block(rows, wanted, file)


class _Scanner:
    """Finds one object after the other in a text that is read in pieces."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._chunks = decoded(file)
        self._decoder = json.JSONDecoder(parse_constant=lambda _word: None)
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def objects(self) -> Iterator[_Object]:
        """Yield all objects, at the top or in lists there."""
        before = None  # what came before in a list; None: outside of lists
        while sign := self._sign():
            if before is None and sign == "[":
                self._skip(1)
                before = "["
            elif before is not None and before != "," and sign == "]":
                self._skip(1)
                before = None
            elif before == "item" and sign == ",":
                self._skip(1)
                before = ","
            elif before == "item":
                raise self._wrong("a comma is missing between two objects of its list")
            else:
                yield self._object()
                before = before and "item"
        if before is not None:
            raise self._wrong("it ends within its list; is the file whole?")

    def _sign(self) -> str:
        """Move on to what is no space and return it; nothing at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._skip(match.end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _object(self) -> _Object:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                if not self._may_go_on(error) or not self._more():
                    raise self._not_json(error) from error
            except RecursionError as error:
                raise self._wrong("it is nested too deeply") from error
            except ValueError as error:
                # the only other one: Python's limit to the digits of an integer
                raise self._wrong("an integer has too many digits; write it as text") from error
        line, size = self._line, end - self._at
        if not isinstance(value, dict):
            raise DataError(f"data.path: {self._file} line {line} is not an object; need {{...}}")
        self._skip(size)
        return _Object(line=line, size=size, row=value)

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        near = error.pos >= len(self._text) - _CUT_CHARACTERS
        return near or error.msg.startswith("Unterminated string")

    def _more(self) -> bool:
        """Read on, at least as much as is still there; False at the end of the file."""
        left = self._text[self._at :]
        read: list[str] = []
        size = 0
        while not self._ended and size <= len(left):
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            read.append(chunk or "")
            size += len(read[-1])
        self._text, self._at = "".join([left, *read]), 0
        return size > 0

    def _skip(self, size: int) -> None:
        end = self._at + size
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _not_json(self, error: json.JSONDecodeError) -> DataError:
        end = min(error.pos, len(self._text.rstrip()))
        at = self._line + self._text.count("\n", self._at, end)
        within = f" in the object that begins in line {self._line}" if at > self._line else ""
        return DataError(
            f"data.path: {self._file} line {at} is not JSON ({error.msg}{within}); correct it"
        )

    def _wrong(self, what: str) -> DataError:
        return DataError(f"data.path: {self._file} line {self._line} is not JSON ({what})")


def _block(rows: Sequence[_Object], wanted: RowColumns, file: Path) -> RowBlock:
    _check_format(rows, wanted, file)
    columns = _Columns(rows, wanted, file)
    names = tuple(dict.fromkeys(name for each in rows for name in each.row))
    if wanted.columns.client not in names:
        wanted.check(names, str(file))
    arrays = {name: columns.array(name) for name in (*wanted.named.values(), *names)}
    return RowBlock(
        table=pa.table(arrays),
        names=names,
        where=str(file),
        place=columns.place,
        has_turns=wanted.conversations,
    )


def _check_format(rows: Sequence[_Object], wanted: RowColumns, file: Path) -> None:
    """Refuse rows of another format: they would count as rows without an answer."""
    for each in rows:
        if wanted.columns.output in each.row:
            continue
        others = wanted.others({name: _is_nested(value) for name, value in each.row.items()})
        if others:
            raise DataError(
                f"data.format: {file} line {each.line} is a row of {others[0]}, not of "
                f"{wanted.format} as the others; convert it, or give each format a run of its own"
            )


class _Columns:
    """Turns the columns of some rows into arrays."""

    def __init__(self, rows: Sequence[_Object], wanted: RowColumns, file: Path) -> None:
        self._rows, self._wanted, self._where = rows, wanted, str(file)

    def place(self, index: int) -> str:
        """Return the line of a row."""
        return f"line {self._rows[index].line:,}"

    def array(self, name: str) -> pa.Array:
        """Return a column; of one that nothing asks for, integers only.

        Raises:
            DataError: it holds what is no text, or half of a character (with the line).
        """
        values = [each.row.get(name) for each in self._rows]
        if _all_integers(values):
            return pa.array(values, pa.int64())
        if name not in self._wanted.wanted:
            return pa.nulls(len(values))
        try:
            return self._wanted_array(name, values)
        except UnicodeEncodeError as error:
            raise self._half_character(name, values) from error

    def _wanted_array(self, name: str, values: Sequence[Any]) -> pa.Array:
        columns = self._wanted.columns
        if self._wanted.conversations and name == columns.output:
            systems = [each.row.get(SYSTEM) for each in self._rows]
            return turn_lists(values, systems, self._where, self.place)
        if name == columns.client:
            values = [self._client(value, index) for index, value in enumerate(values)]
        if name == columns.output and any(isinstance(value, list) for value in values):
            lists = [self._texts(name, value, index) for index, value in enumerate(values)]
            return pa.array(lists, _LISTS)
        texts = [self._text(name, value, index) for index, value in enumerate(values)]
        return pa.array(texts, pa.string())

    def _client(self, value: Any, index: int) -> Any:
        if not isinstance(value, float):
            return value
        text = client_text(value)
        if text is None:
            raise no_client(value, f"{self._where} {self.place(index)}")
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
