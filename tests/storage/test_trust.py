"""What lies in a run directory is opened, and shown, only as what it has to be."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.errors import DataError, RunDirectoryError
from fedllm.reporting.status.logs import client_log, tail
from fedllm.storage.checked import DamagedUpdateError
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.publish import storage_errors
from fedllm.storage.records import (
    BundleRecord,
    ClaimRecord,
    ErrorRecord,
    SubmissionRecord,
    UpdateRecord,
)
from fedllm.storage.trust.printable import MAX_LINE, one_line, printable
from fedllm.storage.trust.regular_files import (
    MAX_RECORD_BYTES,
    append_regular,
    open_regular,
)
from fedllm.storage.updates import Origin, UpdateScanner, read_update
from tests.storage.samples import record_of
from tests.storage.updates import publish, round_in

ODD: dict[str, Callable[[Path], object]] = {
    "a FIFO": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "a symbolic link": lambda path: path.symlink_to("/etc/hostname"),
}


@pytest.mark.parametrize("kind", ODD)
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "odd.json"
    ODD[kind](place)
    with pytest.raises(OSError, match=rf"is {kind}.*need a regular file"):
        open_regular(place)
    with (
        pytest.raises(RunDirectoryError, match="need a regular file"),
        storage_errors(place),
        append_regular(place),
    ):
        pass
    with pytest.raises(RunDirectoryError, match=rf"odd\.json: is {kind}"):
        ErrorRecord.read(place)
    with pytest.raises(DamagedUpdateError, match=rf"is {kind}"):
        read_update(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
def test_a_file_of_a_stranger_is_refused_and_one_of_the_group_is_not(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    os.chown(file, 4321, 4321)
    with pytest.raises(OSError, match="is of user 4321"):
        open_regular(file)
    os.chown(tmp_path, 1234, 4321)
    open_regular(file).close()


def test_a_record_has_a_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.touch()
    os.truncate(path, MAX_RECORD_BYTES + 1)
    with pytest.raises(RunDirectoryError, match="is no record"):
        ErrorRecord.read(path)


def test_an_odd_file_among_the_updates_is_damaged_and_the_others_count(tmp_path: Path) -> None:
    paths = round_in(tmp_path)
    good = publish(paths, "12")
    os.mkfifo(paths.updates / "00-000-00.safetensors")
    header = paths.updates / "00-001-00.safetensors"
    header.write_bytes((1 << 62).to_bytes(8, "little"))
    scan = UpdateScanner(
        round=paths, origin=Origin(run_id="run", round=3, base_fingerprint="base")
    ).scan()
    assert [update.file for update in scan.published.values()] == [good.name]
    assert scan.damaged.keys() == {"00-000-00.safetensors", header.name}


def test_offsets_that_are_no_whole_numbers_are_damage(tmp_path: Path) -> None:
    path = publish(round_in(tmp_path), "12")
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].replace(b'"data_offsets":[0,', b'"data_offsets":[0.0,').rstrip()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    with pytest.raises(DamagedUpdateError, match="header cannot be read"):
        read_update(path)


def test_text_of_clients_commands_no_terminal() -> None:
    boom = "boom\x1b[2J\r\nfedllm: all is well\u202e"
    assert printable(boom) == "boom\\x1b[2J\\r\nfedllm: all is well\\u202e"
    assert one_line(boom) == "boom\\x1b[2J\\r\\nfedllm: all is well\\u202e"
    assert printable("émoji 🦊\ttab") == "émoji 🦊\ttab"
    assert len(one_line("x" * 10**6)) < MAX_LINE + 10
    sent = record_of("12", reason=boom)
    assert UpdateRecord.model_validate(sent.model_dump()).reason == one_line(boom)


def test_logs_shows_only_logs_of_the_run(tmp_path: Path) -> None:
    paths = RunPaths(root=tmp_path / "run")
    attempt = paths.round(1).attempt(1)
    bundle = BundleRecord(number=0, worker_class="a", clients=["12"], cost=1.0)
    SubmissionRecord(
        token="t", lease=1, kind="client", command=[], arrays=[], bundles=[bundle]
    ).publish(attempt.submission)

    def shown(log: str) -> str:
        ClaimRecord(bundle=0, task="t", node="n", log=log).publish(attempt.claim(0))
        found = client_log(paths, 1, "12")
        assert found is not None
        return tail(found, 5)

    (paths.all_logs / "0001").mkdir(parents=True)
    (paths.all_logs / "0001" / "w.log").write_text("said\n")
    assert shown(str(paths.all_logs / "0001" / "w.log")) == "said"
    assert shown("/before/it/moved/logs/0001/w.log") == "said"
    for elsewhere in ("/etc/passwd/../hostname", "/x/logs/../../../../etc/hostname"):
        with pytest.raises(DataError, match="outside"):
            shown(elsewhere)
    (paths.all_logs / "0001" / "link.log").symlink_to("/etc/hostname")
    with pytest.raises(DataError, match="outside"):
        shown(str(paths.all_logs / "0001" / "link.log"))
