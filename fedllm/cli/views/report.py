"""`fedllm report`: write what a run recorded as one page."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.options import RunOrSweep, existing_run, fresh_folder, say_with_paths
from fedllm.cli.sweeps import existing_sweep
from fedllm.errors import RunDirectoryError, UserError, counted
from fedllm.storage.publishing.publish import publish_bytes, storage_errors

_FORMATS = ("pdf", "svg")


def report(
    run: RunOrSweep,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page. Default: report.html in the folder."),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option("--figures", metavar="DIR", help="Also write every chart as a file."),
    ] = None,
    kind: Annotated[
        str, typer.Option("--format", metavar="F", help="Of the figures: pdf or svg.")
    ] = "pdf",
    tables: Annotated[
        Path | None,
        typer.Option("--tables", metavar="DIR", help="Also write every table as CSV."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="METRIC=X",
            help="Add what it took to reach a score: loss=2.5 or unseen.rouge_l=0.3.",
        ),
    ] = None,
) -> None:
    """Write charts and tables of a run or a sweep as one page.

    It may be unfinished or failed. The page needs no network and no other file.
    """
    from fedllm.reporting.page.drawing import require_matplotlib, save_figure
    from fedllm.reporting.page.page_html import report_page
    from fedllm.reporting.page.run_page import run_report
    from fedllm.reporting.page.sweep_page import sweep_report
    from fedllm.reporting.results.cost_to_target import target_of

    sweep = existing_sweep(run)
    default = sweep.report if sweep else existing_run(run).report
    targets = [target_of(text) for text in target or []]
    if sweep and targets:
        raise UserError("--target: is for a run; arms of a sweep are compared at equal spending")
    if kind not in _FORMATS:
        raise UserError(f"--format: got {kind!r}, need one of {', '.join(_FORMATS)}")
    require_matplotlib()
    for folder in filter(None, [figures, tables]):
        fresh_folder(folder)
    page = _page_file(out or default)
    found = sweep_report(run) if sweep else run_report(run, targets)
    publish_bytes(page, report_page(found).encode())
    say_with_paths(
        f"{page}: {counted(len(found.charts), 'chart')}, {counted(len(found.tables), 'table')}"
    )
    if figures:
        with _writing(figures):
            for chart in found.charts:
                save_figure(chart, figures / f"{chart.name}.{kind}")
    if tables:
        with _writing(tables):
            for table in found.tables:
                (tables / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Make a folder; its errors become one line."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield


def _page_file(path: Path) -> Path:
    if path.is_dir():
        raise RunDirectoryError(f"--out {path}: is a folder; name a file, such as report.html")
    return path
