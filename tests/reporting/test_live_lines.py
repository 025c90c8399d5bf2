"""The live view: what a run does now, how far it is, and how well it does."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from fedllm.reporting.status.history import sparkline
from fedllm.reporting.status.live_lines import LiveLine, fitted, live_lines, plain_line
from fedllm.reporting.status.pace import Estimate, pace_of
from fedllm.reporting.status.status import RunStatus, StatusReader
from fedllm.storage.kept_records import ProgressRecord
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import RoundRecord, SubmissionRecord
from tests.reporting.runs import CLIENTS, aggregated, begin, claim, draw, evaluation, prepare
from tests.storage.updates import publish


def job(paths: RunPaths, number: int, what: str, done: int, total: int) -> None:
    """Submit an evaluation of a round, which is so far."""
    job = paths.round(number).evaluation_job(1)
    plan = SubmissionRecord(token="t", lease=1, kind="evaluate", command=[], arrays=[])
    plan.publish(job.submission)
    ProgressRecord(what=what, done=done, total=total, seconds=2.0).publish(job.progress_of("t"))


def read(paths: RunPaths) -> RunStatus:
    return StatusReader(paths, gone=lambda _holder: False).read()


@pytest.fixture
def training(tmp_path: Path) -> RunPaths:
    """A run whose round 1 trains while round 0 is scored."""
    paths = begin(tmp_path / "run", rounds=3)
    prepare(paths)
    aggregated(0).publish(paths.round(0).aggregate_record)
    job(paths, 0, "rows scored", 20, 100)
    draw(paths, 1)
    claim(paths, 1, 1, 1)
    publish(paths.round(1), CLIENTS[0], bundle=0, run_id="run", round=1)
    return paths


def test_before_a_run_is_prepared_its_rows_are_counted(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    assert [line.words for line in live_lines(read(paths))] == [("a worker starts",)]
    assert plain_line(read(paths)) == "prepare: a worker starts"
    plan = SubmissionRecord(token="t", lease=1, kind="prepare", command=[], arrays=[])
    plan.publish(paths.prepare_job(1).submission)
    record = ProgressRecord(what="rows tokenised", done=12_000, total=40_000, seconds=12.0)
    record.publish(paths.prepare_job(1).progress)
    (line,) = live_lines(read(paths))
    assert (line.label, line.share) == ("prepare", 0.3)
    assert line.words == ("rows tokenised: 12,000 of 40,000", "1,000 a second", "28 s left")


def test_the_round_and_the_evaluation_beside_it_are_shown(training: RunPaths) -> None:
    round_line, score_line, run_line = live_lines(read(training))
    assert (round_line.label, round_line.share) == ("round 1", 0.25)
    assert round_line.words[:2] == ("1 of 4 clients", "1 at work")
    assert score_line == LiveLine(
        label="score 0",
        share=0.2,
        words=("rows scored: 20 of 100", "10 a second", "8 s left"),
    )
    assert (run_line.label, run_line.words[0]) == ("run", "0 of 3 rounds")
    assert plain_line(read(training)).startswith("round 1: 1 of 4 clients, 1 at work")


def test_a_round_that_lay_still_does_not_outlast_the_run(training: RunPaths) -> None:
    pace = pace_of(round_number=1, clients=1, tokens=9, seconds=1000.0, training_seconds=1000.0)
    status = read(training)
    assert status.current
    status = replace(status, current=replace(status.current, pace=pace))
    for seconds, is_told in ((3000.0, True), (60.0, False)):
        end = Estimate(seconds=seconds, how="rounds so far")
        round_line, *_ = live_lines(replace(status, estimate=end))
        assert ("50 min left" in round_line.words) == is_told


def test_the_last_scores_have_the_trend_of_equal_rows_only(training: RunPaths) -> None:
    few = {"a": 3.0}
    evaluation(0, {"a": 4.0, "b": 4.0}).publish(training.round(0).evaluation_record)
    for number, loss in ((1, 3.0), (2, 2.0)):
        RoundRecord(round=number, lease=1, state_sha256="", clients=0).publish(
            training.round(number).record
        )
        evaluation(number, few | {"a": loss}).publish(training.round(number).evaluation_record)
    line = live_lines(read(training))[-1]
    assert line.words == ("training clients loss 2.000 █▁", "Rouge-L 0.200", "round 2")


def test_a_sparkline_has_its_smallest_bar_for_the_lowest_value() -> None:
    assert sparkline([1.0, 2.0, 8.0]) == "▁▂█"
    assert sparkline([2.0, 2.0]) == "▅▅"
    assert sparkline([]) == ""


@given(st.integers(min_value=20, max_value=120), st.floats(min_value=0.0, max_value=1.0))
def test_a_line_fits_any_terminal_and_its_words_stay_whole(width: int, share: float) -> None:
    words = ("17 of 1,600 clients", "12 at work", "12,345 tokens/s", "88 min left")
    label, bar, text = fitted(LiveLine(label="round 1234", share=share, words=words), width)
    shown = f"{label}{bar} {text}" if bar else f"{label}{text}"
    assert cell_len(shown) <= max(width, cell_len(f"{label}{bar} "))
    assert ", ".join(words).startswith(text)
    assert not text or text.endswith(words[text.count(", ")])


@given(st.integers(min_value=20, max_value=120))
def test_the_first_words_matter_more_than_the_bar(width: int) -> None:
    words = ("steps of the embedded base: 100 of 400", "2.1 a second")
    label, bar, text = fitted(LiveLine(label="prepare", share=0.25, words=words), width)
    assert bool(text) == (len(label) + len(words[0]) <= width)
    assert bar or len(label) + len(words[0]) + 1 + width // 5 > width
