"""Observers of updates see what the coordinator would take, and read each file once."""

from pathlib import Path
from typing import Any

import pytest

from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import UpdateRecord
from fedllm.storage.update_reader import UpdateReader
from fedllm.storage.updates import Origin, UpdateScanner, read_records
from tests.storage.updates import publish, round_in

ORIGIN = Origin(run_id="run", round=3, base_fingerprint="base")


@pytest.fixture
def paths(tmp_path: Path) -> RoundPaths:
    return round_in(tmp_path)


def reader(paths: RoundPaths) -> UpdateReader[UpdateRecord]:
    return UpdateReader(paths, ORIGIN, read_records)


def clients(found: list[UpdateRecord]) -> list[str]:
    return [record.client for record in found]


@pytest.mark.parametrize(
    "change", [{"run_id": "other"}, {"round": 4}, {"base_fingerprint": "other"}]
)
def test_foreign_updates_are_left_out(paths: RoundPaths, change: dict[str, Any]) -> None:
    publish(paths, "1", bundle=0)
    foreign = publish(paths, "2", bundle=1, **change)
    scan = UpdateScanner(round=paths, origin=ORIGIN).scan()
    assert list(scan.published) == ["1"]
    assert list(scan.damaged) == [foreign.name]
    assert clients(reader(paths).look()) == ["1"]


def test_a_file_that_could_not_be_read_is_read_again(paths: RoundPaths) -> None:
    path = publish(paths, "1")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    looks = reader(paths)
    assert clients(looks.look()) == []
    path.write_bytes(whole)
    assert clients(looks.look()) == ["1"]


def test_a_file_is_read_once(paths: RoundPaths) -> None:
    reads: list[str] = []

    def read(path: Path) -> list[UpdateRecord]:
        reads.append(path.name)
        return read_records(path)

    looks: UpdateReader[UpdateRecord] = UpdateReader(paths, ORIGIN, read)
    first = publish(paths, "1", bundle=0)
    looks.look()
    second = publish(paths, "2", bundle=1)
    assert clients(looks.look()) == ["1", "2"]
    assert reads == [first.name, second.name]


def test_a_removed_file_is_no_longer_counted(paths: RoundPaths) -> None:
    path = publish(paths, "1")
    looks = reader(paths)
    assert clients(looks.look()) == ["1"]
    path.unlink()
    assert clients(looks.look()) == []
