"""Charts as SVG or PDF, drawn by matplotlib: text stays text, colours follow the page's theme."""

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fedllm.errors import UserError
from fedllm.reporting.page.contents import (
    BarChart,
    ChangeChart,
    Chart,
    IntervalChart,
    LineChart,
    TaskChart,
)

_WIDTH_INCHES, _HEIGHT_INCHES = 4.0, 2.8
_LANE_INCHES = 0.19
_FONT_POINTS = 9.5
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", ":", "-.")
_MAX_LETTERS = 28  # as many as the longest names of the usual categories have
_LETTER_INCHES, _KEY_INCHES, _LINE_INCHES = 0.075, 0.5, 0.17  # of a legend, at this font
_USUAL_LEGEND_LINES = 3  # a chart of the usual height has room for so many
_MANY_POINTS = 40  # above it a line has no markers


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours of a chart; `series` are told apart by their markers too."""

    ink: str
    faint: str
    series: Sequence[str]


PRINTED = Palette(
    ink="#1b1f24",
    faint="#d5d9de",
    series=("#1f5fc4", "#b4500a", "#0f7048", "#6d45c4", "#b02a63", "#0a6a7d", "#74560f", "#545b66"),
)
# names of the page's CSS variables, as colours that no chart has otherwise
_VARIABLES = {
    "#0a0b01": "var(--ink)",
    "#0a0b02": "var(--line)",
    **{f"#0a0b1{n}": f"var(--series-{n})" for n in range(8)},
}
_THEMED = Palette(ink="#0a0b01", faint="#0a0b02", series=tuple(f"#0a0b1{n}" for n in range(8)))


def require_matplotlib() -> None:
    """Raise UserError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "fedllm report: draws with matplotlib, which is not installed; install it with: "
            "python -m pip install 'fedllm[report]'"
        ) from error


def inline_svg(chart: Chart) -> str:
    """Return a chart as an SVG element for a page: it fills its width and has its own ids."""
    svg = _drawn(chart, _THEMED, "svg").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None
    name = chart.name
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    head = (
        f'<svg {view[0]} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-labelledby="{name}-title" aria-describedby="{name}-text">'
        f'<title id="{name}-title">{escape(chart.title)}</title>'
        f'<desc id="{name}-text">{escape(chart.text)}</desc>'
    )
    return head + svg[svg.index(">") + 1 :].strip()


def save_figure(chart: Chart, path: Path) -> None:
    """Write a chart as a file of its own, `.svg` or `.pdf`, in the colours for paper."""
    path.write_bytes(_drawn(chart, PRINTED, path.suffix.removeprefix(".")))


def _drawn(chart: Chart, palette: Palette, kind: str) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    out = io.BytesIO()
    with warnings.catch_warnings(), mpl.rc_context(_style(palette)):
        # letters that this font lacks: the reader's browser has others
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(_WIDTH_INCHES, _height(chart)), layout="constrained")
        _DRAWERS[type(chart)](figure, chart, palette)
        figure.savefig(out, format=kind, transparent=True, metadata=_no_date(kind))
    return out.getvalue()


def _style(palette: Palette) -> dict[str, Any]:
    return {
        "font.family": "sans-serif",
        "font.size": _FONT_POINTS,
        "axes.labelsize": _FONT_POINTS,
        "xtick.labelsize": _FONT_POINTS,
        "ytick.labelsize": _FONT_POINTS,
        "legend.fontsize": _FONT_POINTS,
        "text.color": palette.ink,
        "axes.labelcolor": palette.ink,
        "axes.edgecolor": palette.ink,
        "xtick.color": palette.ink,
        "ytick.color": palette.ink,
        "grid.color": palette.faint,
        "grid.linewidth": 0.7,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
        # names are the user's: a dollar sign begins no formula
        "text.parse_math": False,
        "axes.unicode_minus": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "fedllm",
        "pdf.fonttype": 42,
    }


def _no_date(kind: str) -> dict[str, None]:
    return {"svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]


def _height(chart: Chart) -> float:
    """Return inches: lanes and the lines of a long legend make a chart higher."""
    if isinstance(chart, IntervalChart):
        lines = max((_lane(label).count("\n") + 1 for label in chart.intervals), default=1)
        return max(1.6, 1.0 + _LANE_INCHES * lines * chart.lanes)
    if chart.lanes:
        return max(1.6, 1.0 + _LANE_INCHES * chart.lanes)
    names = list(chart.series) if isinstance(chart, LineChart) else []
    lines = math.ceil(len(names) / _legend_columns(names)) if names else 1
    return _HEIGHT_INCHES + _LINE_INCHES * max(0, lines - _USUAL_LEGEND_LINES)


def _lines(figure: Any, chart: LineChart, palette: Palette) -> None:
    axes = figure.add_subplot()
    for number, (label, points) in enumerate(chart.series.items()):
        for band in filter(None, [chart.bands.get(label)]):
            axes.fill_between(
                *zip(*band, strict=True),
                color=palette.series[number % len(palette.series)],
                alpha=0.16,
                linewidth=0,
            )
        values = [float("nan") if y is None else y for _, y in points]
        axes.plot(
            [x for x, _ in points],
            values,
            label=_short(label),
            color=palette.series[number % len(palette.series)],
            # where colours come again, the line is another
            linestyle=_LINES[number // len(palette.series) % len(_LINES)],
            marker=_MARKERS[number % len(_MARKERS)] if len(points) <= _MANY_POINTS else None,
            markersize=4,
            linewidth=1.6,
        )
    if chart.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _place: f"{value:g}")
    if chart.from_zero:
        axes.set_ylim(bottom=0)
    if chart.whole_x:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if len(chart.series) > 1 or chart.y_label not in chart.series:
        _legend(figure, list(chart.series))


def _changes(figure: Any, chart: ChangeChart, palette: Palette) -> None:
    axes = _axes_of_lanes(figure, list(map(_short, chart.changes)), chart.x_label)
    lanes = range(len(chart.changes))
    before = [b for b, _ in chart.changes.values()]
    after = [a for _, a in chart.changes.values()]
    for lane, (first, last) in enumerate(zip(before, after, strict=True)):
        if first is not None:
            axes.plot([first, last], [lane, lane], color=palette.faint, linewidth=2.5, zorder=1)
    known = [(b, lane) for b, lane in zip(before, lanes, strict=True) if b is not None]
    if known:
        axes.scatter(
            *zip(*known, strict=True),
            facecolors="none",
            edgecolors=palette.series[7],
            s=26,
            linewidths=1.4,
            label=chart.before,
            zorder=2,
        )
    axes.scatter(after, lanes, color=palette.series[0], s=28, label=chart.after, zorder=3)
    _legend(figure, [chart.before, chart.after])


def _intervals(figure: Any, chart: IntervalChart, palette: Palette) -> None:
    axes = _axes_of_lanes(figure, list(map(_lane, chart.intervals)), chart.x_label)
    axes.axvline(0, color=palette.ink, linewidth=0.9)
    for lane, (low, middle, high) in enumerate(chart.intervals.values()):
        axes.plot([low, high], [lane, lane], color=palette.series[0], linewidth=2)
        axes.scatter([middle], [lane], color=palette.series[0], s=28, zorder=3)


def _bars(figure: Any, chart: BarChart, palette: Palette) -> None:
    axes = _axes_of_lanes(figure, list(map(_short, chart.values)), chart.x_label)
    values = list(chart.values.values())
    bars = axes.barh(range(len(values)), values, color=palette.series[0], height=0.6)
    axes.bar_label(bars, labels=[_number(value) for value in values], padding=3)
    axes.margins(x=0.14)


def _tasks(figure: Any, chart: TaskChart, palette: Palette) -> None:
    axes = _axes_of_lanes(
        figure,
        [_short(bar.label) for bar in chart.bars],
        f"{chart.unit} since the first was submitted",
    )
    colours = {"client": 0, "aggregate": 1, "evaluate": 2}
    words = {"client": "trains", "aggregate": "aggregates", "evaluate": "evaluates"}
    labelled: set[str] = set()

    def label_of(word: str) -> str | None:
        if word in labelled:
            return None
        labelled.add(word)
        return word

    for lane, bar in enumerate(chart.bars):
        axes.barh(
            lane,
            bar.started - bar.submitted,
            left=bar.submitted,
            height=0.6,
            color=palette.series[7],
            alpha=0.45,
            label=label_of("waits"),
        )
        axes.barh(
            lane,
            bar.ended - bar.started,
            left=bar.started,
            height=0.6,
            color=palette.series[colours[bar.kind]],
            label=label_of(words[bar.kind]),
        )
    _legend(figure, list(labelled))


def _axes_of_lanes(figure: Any, labels: Sequence[str], x_label: str) -> Any:
    """Return axes with one lane per label, the first one on top."""
    axes = figure.add_subplot()
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.locator_params(axis="x", nbins=5)
    axes.set_axisbelow(True)
    # long labels of lanes leave little room below the axes
    axes.set_xlabel(x_label, loc="right")
    return axes


def _legend(figure: Any, labels: Sequence[str]) -> None:
    figure.legend(
        loc="outside upper left",
        ncols=_legend_columns(labels),
        frameon=False,
        handlelength=2.2,  # dashes are seen
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _legend_columns(labels: Sequence[str]) -> int:
    """Return how many labels stand side by side within the width of a chart."""
    letters = max(len(_short(label)) for label in labels)
    fitting = int(_WIDTH_INCHES / (_KEY_INCHES + _LETTER_INCHES * letters))
    return max(1, min(4, fitting, len(labels)))


def _lane(label: str) -> str:
    """Return the label of a contrast's lane: on two lines if it is too long for one."""
    if len(label) <= _MAX_LETTERS:
        return label
    first, minus, second = label.partition(" - ")
    return f"{_short(first)}\n- {_short(second)}" if minus else _short(label)


def _short(label: str) -> str:
    return label if len(label) <= _MAX_LETTERS else f"{label[: _MAX_LETTERS - 1]}…"


_DRAWERS: Mapping[type[Chart], Callable[[Any, Any, Palette], None]] = {
    LineChart: _lines,
    ChangeChart: _changes,
    IntervalChart: _intervals,
    BarChart: _bars,
    TaskChart: _tasks,
}
