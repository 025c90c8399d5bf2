"""One coordinator at a time, and the next one when it is gone."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedllm.errors import LeaseError
from fedllm.storage.lease import (
    Lease,
    boot_id,
    current_lease,
    machine_id,
    process_is_gone,
    process_start_time,
)
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import LeaseRecord, RunRecord
from tests.storage.interference import just_before

HOLD = """
import sys, time
from pathlib import Path
from fedllm.storage.lease import Lease
from fedllm.storage.paths import RunPaths
lease = Lease.acquire(RunPaths(root=Path(sys.argv[1])))
print(lease.number, flush=True)
sys.stdin.readline()
lease.release()
"""


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(root=tmp_path)


@contextmanager
def coordinator(paths: RunPaths) -> Iterator["subprocess.Popen[str]"]:
    """Start a process that holds the lease until it reads a line."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(paths.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "1\n"
        try:
            yield process
        finally:
            process.kill()


def holder(number: int = 1, **changes: object) -> LeaseRecord:
    own = LeaseRecord(
        number=number,
        host=socket.gethostname(),
        boot_id=boot_id(),
        pid=os.getpid(),
        start_time=process_start_time(os.getpid()) or "",
    )
    return own.model_copy(update=changes)


def hold(paths: RunPaths, **changes: object) -> LeaseRecord:
    record = holder(**changes)  # type: ignore[arg-type]
    assert record.publish_once(paths.lease(record.number))
    return record


def test_the_first_coordinator_holds_lease_one(paths: RunPaths) -> None:
    assert current_lease(paths) == (0, None)
    lease = Lease.acquire(paths)
    assert lease.number == 1
    lease.check()
    assert current_lease(paths) == (1, lease.record)


def test_a_second_coordinator_is_refused_and_the_first_is_named(paths: RunPaths) -> None:
    with coordinator(paths) as process:
        with pytest.raises(LeaseError) as caught:
            Lease.acquire(paths)
        place = f"host {socket.gethostname()}, pid {process.pid}"
        assert str(caught.value) == (
            f"{paths.root}: coordinator 1 holds this run: {place}; wait for it or end it first"
        )
        assert current_lease(paths)[0] == 1


def test_a_lease_that_was_given_back_is_free(paths: RunPaths) -> None:
    with coordinator(paths) as process:
        process.communicate("end\n")
        assert process.returncode == 0
        assert Lease.acquire(paths, gone=lambda _: pytest.fail("nobody to ask for")).number == 2


@pytest.mark.parametrize("buried", [True, False])
def test_a_killed_holder_is_taken_over(paths: RunPaths, buried: bool) -> None:
    with coordinator(paths) as process:
        process.send_signal(signal.SIGKILL)
        # a killed process is a zombie until its parent waits for it
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        if buried:
            process.wait()
        assert process_start_time(process.pid) is None
        assert Lease.acquire(paths).number == 2


def test_a_process_id_that_was_given_to_another_process_is_gone(paths: RunPaths) -> None:
    hold(paths, start_time="1")
    assert Lease.acquire(paths).number == 2


def test_after_a_reboot_the_holder_is_gone(paths: RunPaths) -> None:
    held = hold(paths, boot_id="another boot", machine_id=machine_id())
    if not machine_id():
        # a container without an id cannot tell
        assert process_is_gone(held) is None
        return
    assert Lease.acquire(paths).number == 2


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"pid_namespace": "pid:[1]"},
        {"boot_id": "another boot", "machine_id": "another machine"},
        {"boot_id": "another boot", "machine_id": ""},
        {"boot_id": "another boot", "machine_id": None},
    ],
)
def test_a_holder_of_another_container_or_machine_of_this_name_is_unknown(
    paths: RunPaths, elsewhere: dict[str, str]
) -> None:
    assert process_is_gone(hold(paths, **elsewhere)) is None
    with pytest.raises(LeaseError, match="unknown from here"):
        Lease.acquire(paths)


def test_a_removed_lease_folder_makes_no_second_coordinator(paths: RunPaths) -> None:
    RunRecord(run_id="r", result_fingerprint="", versions={}).publish(paths.run)
    first = Lease.acquire(paths, take_over=True)
    shutil.rmtree(paths.leases)
    with pytest.raises(LeaseError, match=r"no leases any more.*add --take-over"):
        Lease.acquire(paths)
    with pytest.raises(LeaseError, match="was removed; it stops"):
        first.check()
    second = Lease.acquire(paths, take_over=True)
    assert second.number == first.number
    with pytest.raises(LeaseError, match="was removed"):
        first.check()
    second.check()


def test_in_a_copy_of_the_directory_the_lease_holds_nothing(
    paths: RunPaths, tmp_path: Path
) -> None:
    original = Lease.acquire(RunPaths(root=paths.root / "run"))
    shutil.copytree(original.paths.root, paths.root / "copy")
    copy = RunPaths(root=paths.root / "copy")
    assert current_lease(copy) == (1, None)
    Lease.acquire(copy).check()
    original.check()
    # the same directory under another name is no copy
    (tmp_path / "link").symlink_to(original.paths.root)
    with pytest.raises(LeaseError, match="holds this run"):
        Lease.acquire(RunPaths(root=tmp_path / "link"))


def test_a_file_in_the_folder_of_other_leases_is_no_lease(paths: RunPaths) -> None:
    lease = Lease.acquire(paths)
    for name in ("0004/0999.json", "²/0001.json", "².json"):
        (paths.leases / name).parent.mkdir(exist_ok=True)
        shutil.copy(paths.lease(1), paths.leases / name)
    assert current_lease(paths)[0] == 1
    lease.check()


def test_a_holder_on_another_machine_is_unknown_and_unknown_is_not_gone(paths: RunPaths) -> None:
    record = hold(paths, host="elsewhere", slurm_job="77")
    assert process_is_gone(record) is None
    with pytest.raises(LeaseError, match="Slurm job 77, host elsewhere") as caught:
        Lease.acquire(paths)
    assert "if it ended, add --take-over" in str(caught.value)
    lease = Lease.acquire(paths, take_over=True)
    assert lease.number == 2
    lease.check()


def test_a_coordinator_that_was_taken_over_stops(paths: RunPaths) -> None:
    first = Lease.acquire(paths)
    Lease.acquire(paths, take_over=True)
    with pytest.raises(LeaseError, match=r"coordinator 2 .* took over from 1; this one stops"):
        first.check()
    # giving back a lease that is no longer held changes nothing
    first.release()
    with pytest.raises(LeaseError, match="coordinator 2 holds"):
        Lease.acquire(paths)


def test_one_of_two_coordinators_takes_over_from_a_holder_that_is_gone(paths: RunPaths) -> None:
    hold(paths, start_time="1")

    def rival_is_faster(record: LeaseRecord) -> bool | None:
        if record.number == 1:
            hold(paths, number=2)
        return process_is_gone(record)

    with pytest.raises(LeaseError, match="coordinator 2 holds"):
        Lease.acquire(paths, gone=rival_is_faster)


def test_take_over_does_not_apply_to_a_holder_that_came_meanwhile(
    paths: RunPaths,
) -> None:
    hold(paths, host="elsewhere")
    with (
        just_before("os.link", lambda *_: hold(paths, number=2)),
        pytest.raises(LeaseError, match="coordinator 2 holds"),
    ):
        Lease.acquire(paths, take_over=True)


def test_a_holder_in_a_batch_job_names_it_in_its_lease(paths: RunPaths) -> None:
    assert Lease.acquire(paths, job="12").record.slurm_job == "12"


def test_files_that_are_no_leases_are_ignored(paths: RunPaths) -> None:
    paths.leases.mkdir()
    (paths.leases / ".0001.json.0.part").write_text("half")
    assert current_lease(paths) == (0, None)
    Lease.acquire(paths).release()
    assert current_lease(paths)[0] == 1


def test_a_process_that_never_was_has_no_start_time() -> None:
    assert process_start_time(2**22 + 1) is None
    assert process_start_time(os.getpid()) == process_start_time(os.getpid())


def test_a_name_with_spaces_and_brackets_does_not_hide_the_start_time() -> None:
    script = "from pathlib import Path; Path('/proc/self/comm').write_text('a) Z (b 1'); input()"
    with subprocess.Popen(
        [sys.executable, "-c", f"{script}"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        before = process_start_time(process.pid)
        while Path(f"/proc/{process.pid}/comm").read_text() != "a) Z (b 1\n":
            pass
        assert process_start_time(process.pid) == before is not None
        process.communicate(b"\n")


def test_without_a_boot_id_there_is_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(boot_id()) == 36

    def unreadable(path: Path, **_: object) -> str:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert boot_id() == ""


def test_an_unattended_coordinator_keeps_the_origin_of_the_one_before(paths: RunPaths) -> None:
    def taken(*, unattended: bool) -> Lease:
        return Lease.acquire(paths, take_over=True, unattended=unattended)

    assert taken(unattended=True).since == 1
    assert [taken(unattended=True).since for _ in range(2)] == [1, 1]
    assert taken(unattended=False).since == 4
    requeued = taken(unattended=True)
    assert (requeued.number, requeued.since) == (5, 4)


def test_a_lease_a_minute_for_months_fills_no_folder(paths: RunPaths) -> None:
    for number in (1, 199, 200, 399, 400):
        hold(paths, number=number, start_time="1")
        assert current_lease(paths)[0] == number
    lease = Lease.acquire(paths)
    assert lease.number == 401
    lease.release()
    assert paths.released(401).parent == paths.lease(400).parent != paths.lease(399).parent
    # made for a lease that was not taken in the end
    (paths.leases / "0009").mkdir()
    assert current_lease(paths)[0] == 401
