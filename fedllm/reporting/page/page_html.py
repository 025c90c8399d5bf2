"""The report as one HTML page that needs nothing else: no network, no scripts, no other files."""

import base64
import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from fedllm.reporting.page.contents import PageSection, PageTable, Report
from fedllm.reporting.page.drawing import inline_svg
from fedllm.reporting.page.page_style import STYLE

_LONG_LETTERS = 40
# a page with more would be slow to open
_MAX_CSV_BYTES = 4_000_000


def report_page(report: Report) -> str:
    """Return the page."""
    return "\n".join(_page(report)) + "\n"


def _page(report: Report) -> Iterator[str]:
    title = escape(report.title)
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<link rel="icon" href="data:,">'
    yield f"<title>{title} · fedllm</title>\n<style>{STYLE}</style>\n</head>\n<body>"
    yield '<a class="skip" href="#content">Skip to the content</a>'
    yield f'<header>\n<h1>{title}</h1>\n<p class="soft">{escape(report.subtitle)}</p>'
    for notice in report.notices:
        yield f'<p class="notice" role="status">{escape(notice)}</p>'
    yield from _facts(report)
    yield "</header>"
    links = (f'<li><a href="#{s.name}">{escape(s.title)}</a></li>' for s in report.sections)
    yield f'<nav aria-label="Sections"><ul>{"".join(links)}</ul></nav>\n<main id="content">'
    for section in report.sections:
        yield from _section(section)
    yield "</main>\n<footer><p>Made by fedllm from the records of the run directory.</p></footer>"
    yield "</body>\n</html>"


def _facts(report: Report) -> Iterator[str]:
    yield '<dl class="facts">'
    for fact in report.facts:
        note = f"<small>{escape(fact.note)}</small>" if fact.note else ""
        yield f"<div><dt>{escape(fact.label)}</dt><dd>{escape(fact.value)}{note}</dd></div>"
    yield "</dl>"


def _section(section: PageSection) -> Iterator[str]:
    yield f'<section aria-labelledby="{section.name}">'
    yield f'<h2 id="{section.name}">{escape(section.title)}</h2>\n<p>{escape(section.words)}</p>'
    if section.charts:
        yield '<div class="charts">'
        for chart in section.charts:
            caption = escape(chart.title)
            yield f"<figure><figcaption>{caption}</figcaption>{inline_svg(chart)}</figure>"
        yield "</div>"
    for table in section.tables:
        yield from _table(table)
    if section.verbatim:
        yield f'<pre tabindex="0">{escape(section.verbatim)}</pre>'
    yield "</section>"


def _table(table: PageTable) -> Iterator[str]:
    title = escape(table.title)
    rows = f"{len(table.rows)} row{'' if len(table.rows) == 1 else 's'}"
    yield f"<details{' open' if table.open else ''}><summary>{title} ({rows})</summary>"
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table>'
    is_text = [_is_text(row[n] for row in table.rows) for n in range(len(table.header))]
    head = "".join(_head(table, is_text))
    yield f"<caption>{title}</caption><thead><tr>{head}</tr></thead><tbody>"
    for row in table.rows[: table.shown]:
        cells = (_cell(value, text) for value, text in zip(row, is_text, strict=True))
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"
    yield f'<p class="under">{"".join(_under(table))}</p></details>'


def _head(table: PageTable, is_text: Sequence[bool]) -> Iterator[str]:
    for name, text in zip(table.header, is_text, strict=True):
        kind = ' class="text"' if text else ""
        yield f'<th scope="col"{kind}>{escape(name.replace("_", " "))}</th>'


def _under(table: PageTable) -> Iterator[str]:
    hidden = len(table.rows) - table.shown
    if hidden > 0:
        yield f"The first {table.shown} of {len(table.rows)} rows. "
    text = table.csv().encode()
    if len(text) > _MAX_CSV_BYTES:
        yield "All rows: <code>fedllm report RUN --tables DIR</code>"
        return
    data = base64.b64encode(text).decode()
    yield (
        f'<a class="csv" download="{table.name}.csv" href="data:text/csv;charset=utf-8;base64,'
        f'{data}">{escape(table.title)} as CSV</a>'
    )


def _is_text(values: Iterator[Any]) -> bool:
    return any(isinstance(value, str) for value in values)


def _cell(value: Any, text: bool) -> str:
    words = _words(value)
    kinds = ["text"] if text else []
    kinds += ["long"] if len(words) > _LONG_LETTERS or "\n" in words else []
    attribute = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<td{attribute}>{escape(words)}</td>"


def _words(value: Any) -> str:
    """Return a value as people read it; CSV has all its digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list | tuple):
        return ", ".join(_words(each) for each in value[:8]) + (", …" if len(value) > 8 else "")
    return str(value)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
