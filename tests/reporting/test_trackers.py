"""Trackers get the metrics of finished rounds once, and never end a run."""

import json
import os
import sqlite3
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.models import Config, ReportingSection
from fedllm.errors import ConfigError
from fedllm.reporting.results.metrics import metric_rows
from fedllm.reporting.trackers.trackers import TRACKERS, export_rounds, require_trackers
from fedllm.storage.kept_records import ExportedRecord
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import RoundRecord
from tests.planning.federations import config_of
from tests.reporting.runs import aggregated, begin, evaluation


def finished(paths: RunPaths, number: int, loss: float) -> None:
    here = paths.round(number)
    aggregated(number).publish(here.aggregate_record)
    evaluation(number, {"a": loss, "d": loss}).publish(here.evaluation_record)
    RoundRecord(round=number, lease=1, state_sha256="", clients=4).publish(here.record)


def tracking(*names: str) -> Config:
    return config_of(rounds=2, reporting__trackers=list(names))


@pytest.fixture
def tensorboard() -> None:
    if find_spec("tensorboard") is None:
        assert not os.environ.get("CI"), "pip install tensorboard"
        pytest.skip("tensorboard is not installed")


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    paths = begin(tmp_path / "run", rounds=2)
    finished(paths, 0, 4.0)
    return paths


def events_of(folder: Path) -> dict[int, dict[str, float]]:
    """Return step -> tag -> value, as TensorBoard reads its files."""
    readers: Any = import_module("tensorboard.backend.event_processing.event_file_loader")
    found: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("events.*")):
        for event in readers.LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                assert value.tag not in found.setdefault(event.step, {})
                found[event.step][value.tag] = value.simple_value
    return found


@pytest.mark.usefixtures("tensorboard")
def test_tensorboard_has_every_round_once(run: RunPaths) -> None:
    said: list[str] = []
    export_rounds(run, tracking("tensorboard"), said.append)
    finished(run, 1, 3.0)
    export_rounds(run, tracking("tensorboard"), said.append)
    export_rounds(run, tracking("tensorboard"), said.append)
    found = events_of(run.tracker("tensorboard"))
    assert found.keys() == {0, 1}
    for row in metric_rows(run):
        number = row["round"]
        assert isinstance(number, int)
        assert found[number]["train_loss"] == row["train_loss"]
        assert found[number]["dev_rouge_l"] == pytest.approx(row["dev_rouge_l"])
    assert said == []


@pytest.mark.usefixtures("tensorboard")
def test_a_tracker_that_fails_is_named_and_gets_its_rounds_later(run: RunPaths) -> None:
    said: list[str] = []
    publish_bytes(run.tracker("tensorboard"), b"a file where its folder should be")
    export_rounds(run, tracking("tensorboard"), said.append)
    (line,) = said
    assert line.startswith("reporting.trackers: tensorboard: ")
    assert not run.exported("tensorboard").exists()
    run.tracker("tensorboard").unlink()
    finished(run, 1, 3.0)
    export_rounds(run, tracking("tensorboard"), said.append)
    assert events_of(run.tracker("tensorboard")).keys() == {0, 1}
    assert ExportedRecord.read(run.exported("tensorboard")).round == 1


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_has_every_round_once_and_says_nothing(
    run: RunPaths,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    said: list[str] = []
    export_rounds(run, tracking("trackio"), said.append)
    finished(run, 1, 3.0)
    export_rounds(run, tracking("trackio"), said.append)
    export_rounds(run, tracking("trackio"), said.append)
    assert (said, capsys.readouterr().out) == ([], "")
    with sqlite3.connect(tmp_path / "trackio" / "fedllm.db") as tables:
        rows = tables.execute("select run_name, step, metrics from metrics order by step")
        found = [(name, step, json.loads(metrics)) for name, step, metrics in rows]
    wanted = metric_rows(run)
    assert [(step, metrics["train_loss"]) for _, step, metrics in found] == [
        (row["round"], row["train_loss"]) for row in wanted
    ]
    (name,) = {name for name, _, _ in found}
    assert name.startswith("run ")


def test_a_missing_package_is_one_line_with_the_command() -> None:
    absent = [name for name, tracker in TRACKERS.items() if find_spec(tracker.package) is None]
    for name in absent:
        with pytest.raises(ConfigError, match=f"{name}, which is not installed here; pip install"):
            require_trackers(tracking(name).reporting)
    require_trackers(ReportingSection())


def test_the_coordinator_loads_no_tracker_that_the_run_does_not_name() -> None:
    code = (
        "import sys, fedllm.rounds.ending.finishing; "
        f"print([n for n in {tuple(TRACKERS)!r} if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"
