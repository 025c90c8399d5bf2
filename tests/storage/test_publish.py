"""Published files are whole or absent, whatever happens; only one process gets a name."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedllm.errors import FedllmError, Incomplete, RunDirectoryError, StorageFull
from fedllm.storage.publishing.publish import (
    make_folder,
    publish_bytes,
    publish_once,
    publishing,
    storage_errors,
    sync_folder,
)
from tests.storage.interference import just_before
from tests.storage.mounts import python_on_tmpfs

BLOCK_BYTES = 1 << 20
# publishes blocks of one letter for ever, each letter in turn
FOREVER = """
import itertools, sys
from pathlib import Path
from fedllm.storage.publishing.publish import publish_bytes, publish_once
folder, size = Path(sys.argv[1]), int(sys.argv[2])
for number in itertools.count():
    content = bytes([97 + number % 26]) * size
    publish_bytes(folder / "same", content)
    publish_once(folder / f"own-{number}", content)
    print(number, flush=True)
"""
# claims the names 0, 1, ... at a signal on stdin and prints those it got
CLAIM = """
import sys
from pathlib import Path
from fedllm.storage.publishing.publish import publish_once
folder, mine = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
won = [n for n in range(40) if publish_once(folder / "claims" / str(n), mine.encode())]
print(*won)
"""


def visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def is_whole(path: Path) -> bool:
    content = path.read_bytes()
    return len(content) == BLOCK_BYTES and len(set(content)) == 1


@pytest.mark.parametrize("patience_ms", [0, 1, 2, 3, 5, 8, 13, 21])
def test_a_file_is_whole_or_absent_when_its_writer_is_killed_at_any_moment(
    tmp_path: Path, patience_ms: int
) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", FOREVER, str(tmp_path), str(BLOCK_BYTES)], stdout=subprocess.PIPE
    )
    assert writer.stdout
    writer.stdout.readline()
    deadline = time.monotonic() + patience_ms / 1000
    while time.monotonic() < deadline:
        assert is_whole(tmp_path / "same")
    writer.kill()
    writer.wait()
    writer.stdout.close()
    found = visible(tmp_path)
    assert found
    assert all(is_whole(path) for path in found)


def test_of_eight_processes_exactly_one_gets_a_name(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(tmp_path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    won = {n: process.communicate()[0].split() for n, process in enumerate(processes)}
    assert sorted(int(name) for names in won.values() for name in names) == list(range(40))
    for winner, names in won.items():
        for name in names:
            assert (tmp_path / "claims" / name).read_bytes() == str(winner).encode()
    assert len(list((tmp_path / "claims").iterdir())) == 40


def test_a_name_that_is_taken_keeps_its_content(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    assert publish_once(path, b"first")
    assert not publish_once(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_whose_answer_was_lost_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    with just_before("os.link", lambda source, target, *_: os.link(source, target)):
        assert publish_once(path, b"mine")
    assert path.read_bytes() == b"mine"


def test_a_rename_whose_answer_was_lost_is_done(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with just_before("os.rename", lambda source, target, *_: Path(source).rename(target)):
        publish_bytes(path, b"mine")
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("other", [None, b"theirs"])
def test_a_file_that_vanished_before_its_rename_is_an_error(
    tmp_path: Path, other: bytes | None
) -> None:
    path = tmp_path / "record.json"
    if other:
        path.write_bytes(other)
    with (
        just_before("os.rename", lambda source, *_: Path(source).unlink()),
        pytest.raises(FileNotFoundError),
    ):
        publish_bytes(path, b"mine")
    assert (path.read_bytes() if path.exists() else None) == other


def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "record.json"
    publish_bytes(path, b"old")

    def write() -> None:
        with publishing(path) as beside:
            beside.write_bytes(b"half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_folders_are_made_with_all_their_parents(tmp_path: Path) -> None:
    make_folder(tmp_path / "rounds" / "0001" / "updates")
    make_folder(tmp_path / "rounds" / "0001" / "updates")
    assert (tmp_path / "rounds" / "0001" / "updates").is_dir()


def test_a_file_system_that_cannot_sync_folders_is_good_enough() -> None:
    proc = os.open("/proc", os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(proc)
    os.close(proc)
    sync_folder(Path("/proc"))


def test_a_failing_disk_is_reported_and_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, "no", descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(Incomplete, match="input/output error; repair the disk"):
        publish_bytes(tmp_path / "record.json", b"new")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="no"):
        sync_folder(tmp_path)


FULL = """
from pathlib import Path
from fedllm.errors import StorageFull
from fedllm.storage.publishing.publish import publish_bytes, publish_once
folder = Path({folder!r})
publish_bytes(folder / "old.json", b"old")
for publish in (publish_bytes, publish_once):
    for name in ("new.json", "old.json"):
        try:
            publish(folder / name, b"x" * 100_000)
        except StorageFull as error:
            print(error)
print(sorted(path.name for path in folder.iterdir()), (folder / "old.json").read_text())
"""


def test_a_full_disk_is_named_and_leaves_the_old_files_whole(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    said = python_on_tmpfs(folder, "size=16k", FULL.format(folder=str(folder))).splitlines()
    assert said == [
        f"{folder}/{name}: no space left on device; make space, then resume the run"
        for name in ("new.json", "old.json", "new.json", "old.json")
    ] + ["['old.json'] old"]


READ_ONLY = """
from pathlib import Path
from fedllm.errors import RunDirectoryError
from fedllm.storage.publishing.publish import publish_bytes, publish_once
folder = Path({folder!r})
for publish in (publish_bytes, publish_once):
    for name in ("new.json", "sub/new.json"):
        try:
            publish(folder / name, b"new")
        except RunDirectoryError as error:
            print(error)
"""


def test_a_read_only_mount_is_named_with_the_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "frozen"
    said = python_on_tmpfs(folder, "ro", READ_ONLY.format(folder=str(folder))).splitlines()
    names = ("new.json", "sub/new.json")
    reason = "read-only file system"
    assert said == [
        f"{folder}/{name}: cannot be written ({reason}); choose a writable directory"
        for name in (*names, *names)
    ]


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    for path in (tmp_path / "run" / "run.json", tmp_path / "run" / "rounds" / "run.json"):
        with pytest.raises(RunDirectoryError, match=r"run.json: cannot be written \(file exists"):
            publish_bytes(path, b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunDirectoryError, match=r"folder: cannot be written \(is a directory"):
        publish_bytes(tmp_path / "folder", b"")


@pytest.mark.parametrize(
    ("code", "kind", "remedy"),
    [
        (errno.EDQUOT, StorageFull, "make space"),
        (errno.EACCES, RunDirectoryError, "choose a writable directory"),
        (errno.ESTALE, Incomplete, "repair the disk or file server"),
        (errno.EIO, Incomplete, "resume the run"),
    ],
)
def test_an_error_of_the_file_system_is_one_line_with_a_remedy(
    tmp_path: Path, code: int, kind: type[FedllmError], remedy: str
) -> None:
    def refuse() -> None:
        with storage_errors(tmp_path / "x"):
            raise OSError(code, "no")

    with pytest.raises(kind, match=remedy) as caught:
        refuse()
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: ")
    assert "\n" not in str(caught.value)


def test_other_errors_of_the_file_system_pass_as_they_are(tmp_path: Path) -> None:
    def refuse() -> None:
        with storage_errors(tmp_path):
            raise OSError(errno.EXDEV, "no")

    with pytest.raises(OSError, match="no") as caught:
        refuse()
    assert caught.value.errno == errno.EXDEV


def test_a_library_error_about_a_full_disk_is_understood(tmp_path: Path) -> None:
    def refuse(words: str) -> None:
        with storage_errors(tmp_path):
            raise RuntimeError(words)

    with pytest.raises(StorageFull, match="no space left on device; make space"):
        refuse("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="anything else"):
        refuse("anything else")


def refusing(code: int) -> None:
    raise OSError(code, os.strerror(code))


def test_a_file_system_without_hard_links_is_named(tmp_path: Path) -> None:
    with (
        just_before("os.link", lambda *_: refusing(errno.EOPNOTSUPP)),
        pytest.raises(RunDirectoryError, match="has no hard links"),
    ):
        publish_once(tmp_path / "claim.json", b"")
    with (
        just_before("os.link", lambda *_: refusing(errno.ENOSPC)),
        pytest.raises(StorageFull),
    ):
        publish_once(tmp_path / "claim.json", b"")
    assert list(tmp_path.iterdir()) == []
