"""Tables as plain text: the same on a terminal and in a log."""

import io
import shutil
import sys
from collections.abc import Collection, Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

# wide enough for every table: a log and a pipe have no width
_UNLIMITED = 10_000
_GAP = 2


def terminal_columns(stream: TextIO | None = None) -> int:
    """Return the width of a stream's terminal, of stdout by default; very wide if it is none."""
    is_terminal = (stream or sys.stdout).isatty()
    return shutil.get_terminal_size().columns - 1 if is_terminal else _UNLIMITED


def text_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None
) -> str:
    """Return an aligned table; the first column is left-aligned text, the others are numbers.

    Where it is too wide for `width` columns (default: the terminal's), cells fold between words,
    and the last columns are left out as long as a word would not fit.
    """
    width = width or terminal_columns()
    widths = _fitted_widths([header, *rows], width)
    kept = len(widths)
    table = Table(box=None, pad_edge=False)
    for name, columns in zip(header, widths, strict=False):
        table.add_column(name, justify="right" if table.columns else "left", width=columns)
    for row in rows:
        table.add_row(*row[:kept])
    buffer = io.StringIO()
    # the user chooses the names: brackets and colons in them are not markup
    console = Console(
        file=buffer,
        width=_UNLIMITED,
        color_system=None,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(table)
    lines = [title, *(line.rstrip() for line in buffer.getvalue().splitlines())]
    if kept < len(header):
        lines.append(f"(too narrow for: {', '.join(header[kept:])})")
    return "\n".join(lines)


def _fitted_widths(cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return the widths of the columns that fit, none narrower than its longest word."""
    least, widths = [], []
    for column in zip(*cells, strict=True):
        words = [word for cell in column for word in cell.split()]
        least.append(max(map(cell_len, words), default=0))
        widths.append(max(map(cell_len, column)))
    while len(least) > 1 and _total(least) > width:
        least.pop()
        widths.pop()
    while _total(widths) > width and widths != least:
        # the column that has the most to give becomes narrower
        index = max(range(len(widths)), key=lambda n: widths[n] - least[n])
        widths[index] -= 1
    return widths


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def number(value: float, digits: int = 3) -> str:
    """Return a number with a fixed count of digits."""
    return f"{value:.{digits}f}"


def size(num_bytes: float) -> str:
    """Return a size in the largest unit that leaves at least 1."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def rank_span(ranks: Collection[int]) -> str:
    """Return `rank 8`, or `ranks 2 to 8`."""
    smallest, largest = min(ranks), max(ranks)
    return f"rank {smallest}" if smallest == largest else f"ranks {smallest} to {largest}"
