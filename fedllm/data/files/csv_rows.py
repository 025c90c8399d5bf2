"""CSV and TSV files as rows: every field is text; a field that is empty or NaN is missing.

With quotes it is text: `"NaN"` and `""` are not missing.
"""

import csv
import io
import re
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from fedllm.data.blocks import Place, RowBlock
from fedllm.data.columns import client_texts, uniquely_named
from fedllm.data.files.decoded import decoded
from fedllm.data.files.quotes import checked_quotes
from fedllm.data.row_formats import RowColumns
from fedllm.errors import DataError
from fedllm.storage.hub import first_line

_MISSING = ["", "NaN", "nan"]
_BLOCK_BYTES = 16 << 20
_OTHER_DELIMITERS = ";\t|,"
# some programs write the integer 3 as 3.0 if another row has no value
_DECIMAL = re.compile(r"[+-]?[0-9]+\.[0-9]*", re.ASCII)


def peek_csv(file: Path, delimiter: str) -> dict[str, bool] | None:
    """Return the columns of a file; None for a file without rows.

    Raises:
        DataError: it is not text.
    """
    names = _header(file, delimiter)
    return dict.fromkeys(names, False) if names else None


def read_csv(file: Path, columns: RowColumns, delimiter: str) -> Iterator[RowBlock]:
    """Yield the rows of a file in blocks; its first row names the columns.

    Raises:
        DataError: it is not text, a row has another number of fields than the first, a quote is
            not closed where its field ends or a column is missing.
    """
    names = _header(file, delimiter)
    _check_names(names, columns, file, delimiter)
    stream = _Utf8Stream(file, delimiter)
    start, where = 0, str(file)
    try:
        for batch in _batches(stream, names, delimiter):
            place = partial(_row_place, start)
            table = _with_clients(pa.table(batch), columns.names.client, where, place)
            start += batch.num_rows
            yield RowBlock(
                table=_with_integers(table, columns),
                names=tuple(names),
                where=where,
                place=place,
            )
    except pa.ArrowInvalid as error:
        raise DataError(
            f"data.path: {file}: {first_line(error)}; correct the row (a field that holds "
            "delimiters, quotes or line breaks has to be in quotes)"
        ) from error


def _header(file: Path, delimiter: str) -> list[str]:
    """Return the names in a file's first row; an empty list if no row follows."""
    text = ""
    for chunk in decoded(file):
        text += chunk
        lines = io.StringIO(text, newline="")
        try:
            names = next(filter(None, csv.reader(lines, delimiter=delimiter)), None)
        except csv.Error as error:
            raise DataError(
                f"data.path: {file} row 1 does not name the columns ({error}); is a quote in it "
                "not closed?"
            ) from error
        if names and lines.read().strip(" \r\n"):
            return names
    return []


class _Utf8Stream(io.RawIOBase):
    """Stream of a file's text as UTF-8, whatever the file's encoding."""

    def __init__(self, file: Path, delimiter: str) -> None:
        self._chunks = checked_quotes(decoded(file), file, delimiter)
        self._rest = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        """Fill a buffer and return the number of bytes, 0 at the end."""
        if not self._rest:
            self._rest = next(self._chunks, "").encode()
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _batches(stream: _Utf8Stream, names: list[str], delimiter: str) -> Iterator[pa.RecordBatch]:
    yield from pyarrow.csv.open_csv(
        pa.PythonFile(stream, "r"),
        # with threads, Arrow's errors do not name the row
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=_MISSING,
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


def _check_names(names: list[str], columns: RowColumns, file: Path, delimiter: str) -> None:
    try:
        columns.check(names, str(file))
    except DataError as error:
        other = next((d for d in _OTHER_DELIMITERS if d != delimiter and d in "".join(names)), None)
        if len(names) > 1 or other is None:
            raise
        expected = "tabs" if delimiter == "\t" else "commas"
        raise DataError(
            f"data.path: {file} is read with {expected} between its fields, but its first row has "
            f"{other!r} there ({names[0]:.60}); save it with commas as .csv, or with tabs as .tsv"
        ) from error


def _with_clients(table: pa.Table, name: str | None, where: str, place: Place) -> pa.Table:
    """Return a table in which clients such as 3.0 are whole numbers."""
    if name is None:
        return table
    encoded = pc.dictionary_encode(table[name].combine_chunks())
    texts = encoded.dictionary.to_pylist()
    values = [Decimal(text) if _DECIMAL.fullmatch(text) else text for text in texts]
    clients = client_texts(encoded.indices, values, where, place)
    return table.set_column(table.column_names.index(name), name, clients)


def _with_integers(table: pa.Table, columns: RowColumns) -> pa.Table:
    """Return the readable columns, and of the others those of integers, as int64."""
    table = table.select(uniquely_named(table.schema))
    for place, name in reversed(list(enumerate(table.column_names))):
        if name in columns.readable:
            continue
        try:
            table = table.set_column(place, name, table.column(place).cast(pa.int64()))
        except pa.ArrowInvalid:
            table = table.remove_column(place)
    return table


def _row_place(start: int, index: int) -> str:
    return f"row {start + index + 2:,} (the header is row 1)"
