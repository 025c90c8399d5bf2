"""Blocks of rows: some rows of one file in the file's columns, with the places they came from."""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

Place = Callable[[int], str]


@dataclass(frozen=True, kw_only=True)
class RowBlock:
    """Rows of one file; `place` returns the place of a row in it, such as `line 7`.

    `names` are all columns of the file; `table` may have further columns that hold nulls only.
    `has_turns`: the reader has converted conversations to turns.
    """

    table: pa.Table
    names: tuple[str, ...]
    where: str
    place: Place
    has_turns: bool = False


def row_number(index: int) -> str:
    """Return the place of a row in a file without lines; rows count from 1."""
    return f"row {index + 1:,}"
