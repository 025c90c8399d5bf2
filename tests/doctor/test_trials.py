"""Trial writes to folders, as runs do them."""

from pathlib import Path

import pytest

from fedllm.doctor.trials import (
    file_system,
    nearest_folder,
    seconds_until,
    trial_folder,
    try_folder,
)
from fedllm.errors import RunDirectoryError


def test_a_folder_that_keeps_its_promises_passes_and_nothing_is_left(tmp_path: Path) -> None:
    with trial_folder(tmp_path) as folder:
        assert try_folder(folder) >= 0
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with (
        pytest.raises(RunDirectoryError, match="/proc: cannot be written"),
        trial_folder(Path("/proc")),
    ):
        pass


def test_the_nearest_folder_that_exists_is_where_a_run_would_be_made(tmp_path: Path) -> None:
    assert nearest_folder(tmp_path / "runs" / "mine") == tmp_path
    assert nearest_folder(tmp_path) == tmp_path


def test_waiting_ends(tmp_path: Path) -> None:
    there = tmp_path / "there"
    assert seconds_until(there.exists, max_seconds=0.0) is None
    there.touch()
    assert seconds_until(there.exists, max_seconds=0.0) is not None


def test_the_kind_of_a_file_system_is_that_of_the_nearest_mount() -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/")) != "proc"
