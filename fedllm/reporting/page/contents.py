"""What a report consists of: charts and tables of plain values, in sections."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Point: TypeAlias = tuple[float, float | None]
Band: TypeAlias = tuple[float, float, float]  # x, the lowest and the highest y
TaskKind: TypeAlias = Literal["client", "aggregate", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart: `name` is that of its file, `text` says what it shows to who cannot see it."""

    name: str
    title: str
    text: str

    @property
    def lanes(self) -> int:
        """How many lanes it has, one below the other; 0: it has a height of its own."""
        return 0


@dataclass(frozen=True, kw_only=True)
class LineChart(Chart):
    """Lines: label -> points; a value that is None leaves a gap. `bands` lie behind their lines."""

    series: Mapping[str, Sequence[Point]]
    x_label: str
    y_label: str
    bands: Mapping[str, Sequence[Band]] = field(default_factory=dict)
    log_y: bool = False
    from_zero: bool = False
    whole_x: bool = False


@dataclass(frozen=True, kw_only=True)
class ChangeChart(Chart):
    """Changes: label -> value before (None: unknown) and after."""

    changes: Mapping[str, tuple[float | None, float]]
    x_label: str
    before: str
    after: str

    @property
    def lanes(self) -> int:
        """One per label."""
        return len(self.changes)


@dataclass(frozen=True, kw_only=True)
class IntervalChart(Chart):
    """Intervals around zero: label -> lowest value, estimate, highest value."""

    intervals: Mapping[str, tuple[float, float, float]]
    x_label: str

    @property
    def lanes(self) -> int:
        """One per label."""
        return len(self.intervals)


@dataclass(frozen=True, kw_only=True)
class BarChart(Chart):
    """Bars: label -> value."""

    values: Mapping[str, float]
    x_label: str

    @property
    def lanes(self) -> int:
        """One per label."""
        return len(self.values)


@dataclass(frozen=True, kw_only=True)
class TaskBar:
    """The bar of a task: it waits from `submitted` to `started` and runs until `ended`."""

    label: str
    kind: TaskKind
    submitted: float
    started: float
    ended: float


@dataclass(frozen=True, kw_only=True)
class TaskChart(Chart):
    """Tasks over time, one lane each, in `unit`s since the first of them was submitted."""

    bars: Sequence[TaskBar]
    unit: str

    @property
    def lanes(self) -> int:
        """One per task."""
        return len(self.bars)


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """A table of plain values, which becomes HTML and CSV; `shown` rows stand on the page."""

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    open: bool = False
    shown: int = 200

    def csv(self) -> str:
        """Return the whole table as CSV; lists as JSON, unknown values empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows([_cell(value) for value in row] for row in self.rows)
        return text.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


@dataclass(frozen=True, kw_only=True)
class PageSection:
    """A part of the report: words, then charts, then tables."""

    name: str
    title: str
    words: str
    charts: Sequence[Chart] = ()
    tables: Sequence[PageTable] = ()
    verbatim: str = ""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A number at the top of the report."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report: `notices` say first what a reader has to know, such as that the run failed."""

    title: str
    subtitle: str
    notices: Sequence[str]
    facts: Sequence[Fact]
    sections: Sequence[PageSection]

    @property
    def charts(self) -> list[Chart]:
        """All charts, in order."""
        return [chart for section in self.sections for chart in section.charts]

    @property
    def tables(self) -> list[PageTable]:
        """All tables, in order."""
        return [table for section in self.sections for table in section.tables]


def table_of(
    name: str, title: str, rows: Sequence[Mapping[str, Any]], *, is_open: bool = False
) -> list[PageTable]:
    """Return a table of rows that have the same keys; nothing if there are no rows."""
    if not rows:
        return []
    header = list(rows[0])
    values = [[row.get(key) for key in header] for row in rows]
    return [PageTable(name=name, title=title, header=header, rows=values, open=is_open)]
