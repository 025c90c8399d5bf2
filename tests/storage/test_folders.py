"""Whole folders: published once, or filled for the user, and never in part."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedllm.errors import RunDirectoryError
from fedllm.storage.publishing.folders import publishing_folder
from fedllm.storage.publishing.outputs import filling_folder
from tests.storage.mounts import python_on_tmpfs

FOREVER = """
import itertools, sys
from pathlib import Path
from fedllm.storage.publishing.folders import publishing_folder
for number in itertools.count():
    with publishing_folder(Path(sys.argv[1]) / str(number)) as beside:
        (beside / "deep").mkdir()
        for name in ("a", "b", "deep/c"):
            (beside / name).write_text("x" * 4096)
    print(number, flush=True)
"""


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def fill(folder: Path, **content: str) -> None:
    for name, text in content.items():
        (folder / name).write_text(text)


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "models" / "key"
    with publishing_folder(path) as beside:
        (beside / "deep").mkdir()
        fill(beside, a="1")
        fill(beside / "deep", b="2")
        assert not path.exists()
    assert tree(path) == {"a": "1", "deep/b": "2"}
    assert [child.name for child in path.parent.iterdir()] == ["key"]


@pytest.mark.parametrize("patience_ms", [0, 3, 10])
def test_a_folder_is_whole_or_absent_when_its_writer_is_killed_at_any_moment(
    tmp_path: Path, patience_ms: int
) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", FOREVER, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert writer.stdout
    writer.stdout.readline()
    time.sleep(patience_ms / 1000)
    writer.kill()
    writer.wait()
    writer.stdout.close()
    found = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert found
    for path in found:
        assert tree(path) == dict.fromkeys(("a", "b", "deep/c"), "x" * 4096)


def test_the_folder_that_was_published_first_stays(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with publishing_folder(path) as beside:
        fill(beside, a="mine")
        with publishing_folder(path) as faster:
            fill(faster, a="theirs", b="theirs")
    assert tree(path) == {"a": "theirs", "b": "theirs"}
    assert [child.name for child in tmp_path.iterdir()] == ["key"]


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a file")
    with (
        pytest.raises(RunDirectoryError, match=r"key: cannot be written \(not a directory\)"),
        publishing_folder(tmp_path / "key") as beside,
    ):
        fill(beside, a="mine")


def test_a_block_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), publishing_folder(tmp_path / "key") as beside:
        fill(beside, a="half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


FULL = """
from pathlib import Path
from fedllm.errors import StorageFull
from fedllm.storage.publishing.folders import publishing_folder
from fedllm.storage.publishing.outputs import filling_folder
folder = Path({folder!r})
for publishing in (publishing_folder(folder / "key"), filling_folder(folder / "out", last="a")):
    try:
        with publishing as beside:
            (beside / "a").write_bytes(b"x" * 100_000)
    except StorageFull as error:
        print(error)
print(list(folder.iterdir()))
"""


def test_a_full_disk_is_reported_and_leaves_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    said = python_on_tmpfs(folder, "size=16k", FULL.format(folder=str(folder))).splitlines()
    words = "no space left on device; make space, then resume the run"
    assert said == [f"{folder}/key: {words}", f"{folder}/out: {words}", "[]"]


def test_an_output_folder_is_filled_and_its_last_file_comes_last(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with filling_folder(out, last="a.json") as inside:
        fill(inside, **{"a.json": "1", "b.safetensors": "2"})
        (inside / "deep").mkdir()
        fill(inside / "deep", c="3")
        assert [path.name for path in out.iterdir()] == [inside.name]
    assert tree(out) == {"a.json": "1", "b.safetensors": "2", "deep/c": "3"}
    # a rename changes the inode's time
    assert max(out.iterdir(), key=lambda path: path.stat().st_ctime_ns).name == "a.json"


def test_a_failed_output_removes_its_new_folders(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        filling_folder(tmp_path / "new" / "out", last="a") as inside,
    ):
        fill(inside, a="half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_fails_while_its_files_move_leaves_only_the_files_of_others(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(RunDirectoryError, match=r"out: cannot be written \(is a directory\)"),
        filling_folder(out, last="z") as inside,
    ):
        fill(inside, a="1", b="2", z="3")
        (out / "b").mkdir()
        fill(out / "b", theirs="4")
    assert tree(out) == {"b/theirs": "4"}
