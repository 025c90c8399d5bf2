"""The meter of a job's progress."""

from pathlib import Path

from fedllm.process.meter import Meter
from fedllm.storage.kept_records import ProgressRecord


class Clock:
    """A clock that is set by hand."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end(tmp_path: Path) -> None:
    lines: list[str] = []
    clock = Clock()
    meter = Meter(tmp_path / "progress.json", lines.append, clock)
    for second in range(1, 41):
        clock.seconds = float(second)
        meter.count("rows tokenised", 100 * second, 4000)
    assert lines == [
        "rows tokenised: 1,000 of 4,000, 100 a second, 30 s left",
        "rows tokenised: 2,000 of 4,000, 100 a second, 20 s left",
        "rows tokenised: 3,000 of 4,000, 100 a second, 10 s left",
        "rows tokenised: 4,000 of 4,000, 40 s",
    ]


def test_the_record_is_written_every_five_seconds_and_at_the_end(tmp_path: Path) -> None:
    clock = Clock()
    file = tmp_path / "progress.json"
    meter = Meter(file, lambda _line: None, clock)
    seen = []
    for second in (1, 2, 4, 6, 7, 8):
        clock.seconds = float(second)
        meter.count("rows scored", second, 8)
        seen.append(ProgressRecord.read(file).done)
    assert seen == [1, 1, 1, 6, 6, 8]


def test_other_work_has_a_rate_of_its_own() -> None:
    lines: list[str] = []
    clock = Clock()
    meter = Meter(None, lines.append, clock)
    clock.seconds = 100.0
    meter.count("steps", 10, 10)
    clock.seconds = 110.0
    meter.count("rows tokenised", 1000, 2000)
    clock.seconds = 120.0
    meter.count("rows tokenised", 2000, 2000)
    assert lines[-1] == "rows tokenised: 2,000 of 2,000, 20 s"


def test_work_without_time_has_no_end_in_sight() -> None:
    record = ProgressRecord(what="rows scored", done=0, total=5, seconds=0.0)
    assert record.left_seconds is None
    assert record.text == "rows scored: 0 of 5"
