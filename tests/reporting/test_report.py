"""The report page: one file with every chart and table, for runs in any state."""

import base64
import csv
import io
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedllm.reporting.page.contents import (
    BarChart,
    IntervalChart,
    LineChart,
    PageSection,
    PageTable,
    Report,
)
from fedllm.reporting.page.drawing import inline_svg
from fedllm.reporting.page.page_html import report_page
from fedllm.reporting.page.quality_sections import training_section
from fedllm.reporting.page.run_page import run_report
from fedllm.reporting.page.sweep_page import sweep_report
from fedllm.storage.kept_records import FailureRecord
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import CollectionRecord, RoundRecord
from tests.cli.commands import in_process, one_line
from tests.planning.federations import client, prepared_of
from tests.reporting.runs import CLIENTS, aggregated, begin, draw, evaluation, hold, module
from tests.reporting.sweeps import sweep_of

CHARTS = {
    *("scores-loss", "scores-rouge-l", "scores-exact-match", "categories", "tiers"),
    *("training-loss", "loss-against-bytes", "loss-against-time"),
    *("tiers-memory", "tiers-seconds", "tiers-sent", "spectra", "truncation", "effective-rank"),
    *("partitions-reach", "partitions-energy-share", "partitions-lost-share", "stages", "tasks"),
}


class Page(HTMLParser):
    """A page's ids, links, elements and words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.elements: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in {"src", "href"}:
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def made(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page, the figures and the tables of a finished run."""
    out = tmp_path_factory.mktemp("report")
    done = in_process(
        *("report", finished, "--out", out / "page.html", "--figures", out / "figures"),
        *("--format", "svg", "--tables", out / "tables", "--target", "dev.rouge_l=2"),
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def page(made: Path) -> Page:
    return Page((made / "page.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_but_itself(made: Path, page: Page) -> None:
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "script" not in page.elements
    assert not re.search(r"url\((?!#)|@import", (made / "page.html").read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert {link for link in page.links if re.fullmatch(r"#[a-z-]+", link)} <= {
        f"#{id_}" for id_ in page.ids
    }


def test_every_chart_is_on_the_page_and_a_figure(made: Path, page: Page) -> None:
    assert {path.stem for path in (made / "figures").iterdir()} == CHARTS
    assert page.elements.count("svg") == len(CHARTS)
    assert {f"{name}-title" for name in CHARTS} <= set(page.ids)
    for path in (made / "figures").iterdir():
        text = path.read_text(encoding="utf-8")
        assert "<text" in text, f"{path.name}: text is no text"
        assert "#0a0b" not in text, f"{path.name}: a colour of the page's theme"


def test_every_table_is_csv_on_the_page_and_as_a_file(made: Path, page: Page) -> None:
    files = {path.read_text(encoding="utf-8") for path in (made / "tables").iterdir()}
    links = [link for link in page.links if link.startswith("data:text/csv")]
    assert {base64.b64decode(link.partition(",")[2]).decode() for link in links} == files
    clients = (made / "tables" / "clients.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(clients)))
    assert len(rows) == 8
    assert {row["client"] for row in rows} & {"émoji 🦊", "../up", "a/b", "white space"}
    assert all(int(row["peak_memory_bytes"]) > 0 for row in rows)


def test_a_target_that_was_never_reached_says_so(made: Path) -> None:
    text = (made / "tables" / "targets.csv").read_text(encoding="utf-8")
    (row,) = csv.DictReader(io.StringIO(text))
    assert (row["clients"], row["target"], row["rounds"]) == (
        "dev clients",
        "rouge_l 2",
        "not reached",
    )


def test_the_page_of_a_run_is_the_same_every_time(finished: Path) -> None:
    chart = run_report(finished).charts[0]
    assert inline_svg(chart) == inline_svg(chart)


def test_an_unfinished_run_has_a_page_that_says_so(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    shutil.rmtree(RunPaths(root=root).round(2).root)
    done = in_process("report", root)
    assert done.returncode == 0, done.stderr
    words = (root / "report.html").read_text(encoding="utf-8")
    assert "This run is not finished (stopped): 1 of 2 rounds done." in words


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    begin(tmp_path)
    words = report_page(run_report(tmp_path))
    assert "0 of 3 rounds done" in words
    assert "Nothing was evaluated yet." in words


def test_a_failed_run_shows_why_and_equal_failures_as_one_line(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepared_of([client(id_) for id_ in CLIENTS]).publish(paths.prepared)
    draw(paths, 1)
    CollectionRecord(
        round=1,
        lease=1,
        updates=[],
        failed={id_: f"the loss of step 1 is nan (log /l/{id_})" for id_ in CLIENTS[:3]},
        missing=[CLIENTS[3]],
    ).publish(paths.round(1).collection)
    lease = hold(paths)
    FailureRecord(
        lease=1, round=1, step="train", kind="RunFailed", message="quorum", exit_code=1
    ).publish(paths.failure(1))
    lease.release()
    report = run_report(tmp_path)
    assert any(notice.startswith("This run failed") for notice in report.notices)
    assert "Failed in train of round 1: quorum" in report.notices
    (table,) = [table for table in report.tables if table.name == "failures"]
    assert [list(row) for row in table.rows] == [
        [1, "client left out", "the loss of step 1 is nan", 3],
        [1, "client without an update", "not there when collected", 1],
        [1, "run failed in train", "quorum", 1],
    ]


def test_names_of_the_user_are_text_everywhere(tmp_path: Path) -> None:
    paths = begin(tmp_path, rounds=1)
    name = '<b onclick="x">$\\frac$ & 漢'
    prepared_of([client(id_, category=name) for id_ in CLIENTS]).publish(paths.prepared)
    for number, loss in ((0, 2.0), (1, 1.0)):
        here = paths.round(number)
        aggregated(number, module(1.0, r2=0.75)).publish(here.aggregate_record)
        evaluation(number, {CLIENTS[0]: loss}, {CLIENTS[0]: name}).publish(here.evaluation_record)
        RoundRecord(round=number, lease=1, state_sha256="", clients=1).publish(here.record)
    text = report_page(run_report(tmp_path))
    assert "<b onclick" not in text
    assert name in "".join(Page(text).words)


def test_a_group_without_categories_has_a_page_too(tmp_path: Path) -> None:
    paths = begin(tmp_path, rounds=1)
    prepared_of([client(CLIENTS[0], category="k"), client("d1")]).publish(paths.prepared)
    for number in (0, 1):
        here = paths.round(number)
        aggregated(number).publish(here.aggregate_record)
        evaluation(number, {CLIENTS[0]: 2.0, "d1": 1.0}).publish(here.evaluation_record)
    names = [section.name for section in run_report(tmp_path).sections]
    assert "categories" not in names
    assert "tiers" in names


def test_many_rounds_show_one_loss_a_round_and_the_steps_of_the_newest() -> None:
    rows = [
        {"round": n, "tier": "a", "training_loss": float(n), "training_losses": (n + 1.0, n - 1.0)}
        for n in range(1, 14)
    ]
    by_round, by_step = training_section(rows).charts
    assert isinstance(by_round, LineChart)
    assert isinstance(by_step, LineChart)
    assert list(by_round.series["a"])[-1] == (13, 13.0)
    assert list(by_step.series["a"]) == [(12.25, 14.0), (12.75, 12.0), (13, None)]
    (alone,) = training_section(rows[:12]).charts
    assert alone.name == "training-loss"


def test_long_tables_are_cut_on_the_page_and_whole_in_csv() -> None:
    table = PageTable(name="t", title="T", header=["a"], rows=[[n] for n in range(5)], shown=2)
    assert table.csv().split() == ["a", "0", "1", "2", "3", "4"]
    section = PageSection(name="s", title="S", words="", tables=[table])
    text = report_page(Report(title="", subtitle="", notices=[], facts=[], sections=[section]))
    assert text.count("<td>") == 2
    assert "The first 2 of 5 rows." in text


def test_gaps_and_values_that_are_not_finite_are_drawn() -> None:
    svg = inline_svg(
        LineChart(
            name="c",
            title="T",
            text="",
            series={"a": [(0, None), (1, float("nan")), (2, 1.0)], "b": []},
            x_label="x",
            y_label="y",
        )
    )
    assert svg.startswith("<svg")


def test_bars_say_their_values_without_powers_of_ten() -> None:
    values = {"Cause Effect Classification": 2379.6, "small": 9.316}
    svg = inline_svg(BarChart(name="c", title="T", text="", values=values, x_label="MiB"))
    assert all(f">{words}<" in svg for words in ("2,380", "9.32", *values))


def test_a_sweep_has_a_page_of_its_arms_with_their_seeds(tmp_path: Path) -> None:
    paths = sweep_of(tmp_path, {"a": [1.0, 2.0], "b": [3.0, 5.0], "<i>": [4.0, None]})
    report = sweep_report(tmp_path)
    assert report.notices == [
        "This sweep is not finished (stopped): 5 of 6 runs are done. The report shows what is "
        "recorded so far."
    ]
    loss = report.charts[0]
    assert isinstance(loss, LineChart)
    assert list(loss.series) == ["a", "b", "<i>"]
    assert loss.bands["a"][-1] == pytest.approx((1, 1.15, 2.15))
    (models,) = [chart for chart in report.charts if chart.name == "differences-models"]
    assert isinstance(models, IntervalChart)
    low, middle, high = models.intervals["a - b"]
    assert low <= middle <= high
    assert middle == pytest.approx(-2.5)
    assert in_process("report", tmp_path).returncode == 0
    words = paths.report.read_text(encoding="utf-8")
    assert "<i>" not in words
    wrong = in_process("report", tmp_path, "--target", "loss=1")
    assert "--target: is for a run" in one_line(wrong)


def test_a_sweep_without_a_comparison_says_why(tmp_path: Path) -> None:
    sweep_of(tmp_path, {"a": [1.0], "b": [None]})
    (section,) = [s for s in sweep_report(tmp_path).sections if s.name == "comparison"]
    assert section.words.startswith("None yet: ")


def test_wrong_options_are_one_line_and_write_nothing(finished: Path, tmp_path: Path) -> None:
    before = sorted(finished.iterdir())
    for wrong, words in (
        (["--format", "png"], "--format: got 'png', need one of pdf, svg"),
        (["--target", "loss"], "--target loss: need METRIC=NUMBER"),
        (["--out", tmp_path], "is a folder; name a file"),
        (["--figures", finished], "exists and is not empty"),
    ):
        assert words in one_line(in_process("report", finished, *wrong))
    assert "no run here" in one_line(in_process("report", tmp_path))
    assert sorted(finished.iterdir()) == before


def test_without_matplotlib_the_command_names_what_to_install(finished: Path) -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None; from fedllm.cli.main import run; "
        f"sys.exit(run(['report', {str(finished)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "python -m pip install 'fedllm[report]'" in one_line(done)
