"""`fedllm report`: write what a run recorded as one page."""

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.options import RunFolder, existing_run, fresh_folder, say
from fedllm.errors import RunDirectoryError, UserError
from fedllm.storage.publishing.publish import publish_bytes

_FORMATS = ("pdf", "svg")


def report(
    run: RunFolder,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page. Default: RUN/report.html."),
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
            help="What a score took: loss=2.5 or unseen.rouge_l=0.3.",
        ),
    ] = None,
) -> None:
    """Write charts and tables of a run as one HTML page.

    The run may be unfinished or failed. The page needs no network and no other file.
    """
    from fedllm.reporting.page.drawing import require_matplotlib, save_figure
    from fedllm.reporting.page.page_html import report_page
    from fedllm.reporting.page.run_page import run_report
    from fedllm.reporting.results.cost_to_target import target_of

    paths = existing_run(run)
    targets = [target_of(text) for text in target or []]
    if kind not in _FORMATS:
        raise UserError(f"--format: got {kind!r}, need one of {', '.join(_FORMATS)}")
    require_matplotlib()
    folders = [fresh_folder(folder) for folder in (figures, tables) if folder]
    page = _page_file(out or paths.report)
    found = run_report(run, targets)
    publish_bytes(page, report_page(found).encode())
    say(f"{page}: {len(found.charts)} charts, {len(found.tables)} tables")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    if figures:
        for chart in found.charts:
            save_figure(chart, figures / f"{chart.name}.{kind}")
    if tables:
        for table in found.tables:
            (tables / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")


def _page_file(path: Path) -> Path:
    if path.is_dir():
        raise RunDirectoryError(f"--out {path}: is a folder; name a file, such as report.html")
    return path
