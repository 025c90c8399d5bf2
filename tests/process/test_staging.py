"""Base model and data are copied to a node's disk once, or read from shared storage."""

import fcntl
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from peft.tuners.lora import LoraLayer

from fedllm.cli.execution import start
from fedllm.config.loading import read_config
from fedllm.errors import ModelError
from fedllm.process.session import Session
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.staging import staged_folder
from fedllm.storage.records import PreparedRecord
from tests.storage.mounts import python_on_tmpfs
from tests.tiny import Tiny

NAME = Path("models/abc")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"w" * 100_000)
    (folder / "sub" / "more.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "huge").write_text("not to be loaded")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_copy_on_the_nodes_disk_is_named_by_its_content(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH_OF_NODE", str(tmp_path))
    place, problem = staged_folder(source, NAME, "$SCRATCH_OF_NODE/local")
    assert (place, problem) == (tmp_path / "local" / NAME, "")
    expected = contents(source)
    del expected[".cache/huge"]
    assert contents(place) == expected
    # the second task of the node finds the copy, even without the shared files
    shutil.rmtree(source)
    assert staged_folder(source, NAME, "$SCRATCH_OF_NODE/local") == (place, "")


def test_tasks_of_a_node_copy_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = threading.Barrier(4)
    copied: list[Path] = []
    places: list[tuple[Path, str]] = []

    def task() -> None:
        wait.wait()
        places.append(staged_folder(source, NAME, str(tmp_path / "local")))

    def counted(origin: Path, place: Path) -> None:
        copied.append(origin)
        copy(origin, place)

    copy = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", counted)
    threads = [threading.Thread(target=task) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(places) == {(tmp_path / "local" / NAME, "")}
    assert sorted(copied) == [source / "sub" / "more.json", source / "weights.bin"]


def test_a_copy_that_died_half_way_is_begun_again_and_leaves_nothing(
    source: Path, tmp_path: Path
) -> None:
    killed = (
        "import os, shutil, signal, sys\n"
        "from pathlib import Path\n"
        "from fedllm.storage.publishing.staging import staged_folder\n"
        "die = lambda event, _: os.kill(os.getpid(), 9) if event == 'os.rename' else None\n"
        "sys.addaudithook(die)\n"
        f"staged_folder(Path({str(source)!r}), Path({str(NAME)!r}), {str(tmp_path / 'local')!r})\n"
    )
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -9
    folder = tmp_path / "local" / NAME.parent
    assert len(list(folder.glob(".*.part"))) == 1
    place, problem = staged_folder(source, NAME, str(tmp_path / "local"))
    assert (problem, place.is_dir()) == ("", True)
    assert sorted(path.name for path in folder.iterdir()) == ["abc", "abc.lock"]


def test_a_task_waits_for_the_copy_of_another(source: Path, tmp_path: Path) -> None:
    lock = tmp_path / "local" / NAME.parent / "abc.lock"
    lock.parent.mkdir(parents=True)
    place = tmp_path / "local" / NAME

    def copied_by_another() -> None:
        shutil.copytree(source / "sub", place)
        fcntl.flock(held, fcntl.LOCK_UN)

    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        another = threading.Timer(0.3, copied_by_another)
        another.start()
        assert staged_folder(source, NAME, str(tmp_path / "local")) == (place, "")
        another.join()
    # the other process's copy stays
    assert list(contents(place)) == ["more.json"]


@pytest.mark.parametrize(
    ("configured", "message"),
    [
        ("$NOT_SET_HERE/x", "$NOT_SET_HERE/x is no absolute path on this node"),
        ("relative", "relative is no absolute path on this node"),
        ("/dev/null/x", "File exists: '/dev/null'"),
    ],
)
def test_without_a_usable_folder_the_shared_files_are_read_and_this_is_reported(
    source: Path, configured: str, message: str
) -> None:
    place, problem = staged_folder(source, NAME, configured)
    assert place == source
    assert message in problem
    assert problem.startswith(f"storage.node_local: {configured}: ")
    assert problem.endswith(f"; reading {source} itself")


def test_a_disk_without_room_is_left_alone(source: Path, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from fedllm.storage.publishing.staging import staged_folder\n"
        f"folder = Path({str(tmp_path / 'disk')!r})\n"
        f"place, problem = staged_folder(Path({str(source)!r}), Path({str(NAME)!r}), str(folder))\n"
        "print(place, problem, [p.name for p in folder.rglob('*')], sep='\\n')\n"
    )
    place, problem, left = python_on_tmpfs(tmp_path / "disk", "size=64k", script).splitlines()
    assert place == str(source)
    assert "GiB needed" in problem
    assert left == "['models', 'abc.lock']"


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    overrides = ["rounds=1", "evaluation.every=0"]
    return RunPaths(root=start(tiny.config, overrides, tmp_path_factory.mktemp("run") / "run"))


def test_a_session_loads_model_and_data_from_the_copies(
    run: RunPaths, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, prepared = read_config(run.config), PreparedRecord.read(run.prepared)
    session, far = Session(), Session()
    session.stage(str(tmp_path), prepared)
    # the shared files are not needed any more
    moved = prepared.model_copy(update={"model_path": "/gone", "data_path": "/gone too"})
    session.stage(str(tmp_path), moved)
    model = session.slots(config, moved).model
    assert not any(isinstance(layer, LoraLayer) for layer in model.modules())
    client = prepared.clients[0].id
    expected = far.data(prepared).rows(client, "train")
    assert session.data(moved).rows(client, "train") == expected
    assert not capfd.readouterr().err
    far.stage("$NOT_SET_HERE", prepared)
    assert len(capfd.readouterr().err.splitlines()) == 2
    assert far.data(prepared).rows(client, "train") == expected


def test_a_copy_that_is_another_model_is_named(run: RunPaths, tmp_path: Path) -> None:
    config, prepared = read_config(run.config), PreparedRecord.read(run.prepared)
    copy = tmp_path / "models" / prepared.model_fingerprint
    shutil.copytree(prepared.model_path, copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    session = Session()
    session.stage(str(tmp_path), prepared)
    with pytest.raises(ModelError, match=f"{copy}: not the model .*; remove this copy of it"):
        session.slots(config, prepared)
