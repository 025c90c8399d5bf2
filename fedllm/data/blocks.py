"""Blocks of rows: some rows of one file, in its own columns, that know where they came from."""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

Place = Callable[[int], str]


@dataclass(frozen=True, kw_only=True)
class RowBlock:
    """Rows of one file, and for every row its place there, such as `line 7`.

    `names` are all columns that were found; `table` may have more, of nulls only. `has_turns`:
    the reader made conversations into turns already.
    """

    table: pa.Table
    names: tuple[str, ...]
    where: str
    place: Place
    has_turns: bool = False


def row_number(index: int) -> str:
    """Return the place of a row in a file that has no lines: rows count from 1."""
    return f"row {index + 1:,}"
