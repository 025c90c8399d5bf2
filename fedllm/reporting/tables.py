"""Tables as plain text: the same on a terminal and in a log."""

import io
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table

# wide enough for every table: rich cuts what does not fit
_WIDTH_COLUMNS = 10_000


def text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table; the first column is left-aligned text, the others are numbers."""
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    buffer = io.StringIO()
    # the user chooses the names: brackets and colons in them are not markup
    console = Console(
        file=buffer,
        width=_WIDTH_COLUMNS,
        color_system=None,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(table)
    return "\n".join([title, *(line.rstrip() for line in buffer.getvalue().splitlines())])


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
