"""A disk that becomes read-only in the midst of a round, under both schedulers."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedllm.storage.paths import RunPaths
from tests.cli.commands import fedllm, start
from tests.rounds.simulation import states
from tests.slurm.cluster import Cluster, until
from tests.slurm.runs import ON_CLUSTER, PATIENCE_SECONDS, each_trained_once, settings
from tests.tiny import Tiny

pytestmark = [pytest.mark.slurm, pytest.mark.nightly]

SIZE = 48 << 20
KINDS = {
    "local": ("scheduler.kind=local", "storage.visibility_seconds=1"),
    "slurm": ON_CLUSTER,
}


class Disk:
    """An ext4 file system of its own, mounted where every process sees it."""

    def __init__(self, folder: Path) -> None:
        self.place, self._image = folder / "disk", folder / "image"
        self.place.mkdir()
        with self._image.open("wb") as file:
            file.truncate(SIZE)
        _do("mkfs.ext4", "-q", "-F", self._image)
        self.mount()

    def mount(self) -> None:
        _do("mount", "-o", "loop,errors=remount-ro", self._image, self.place)

    def break_down(self) -> None:
        """Let it fail as after an error of the device: the kernel stops all writing."""
        _do("mount", "-o", "remount,abort", self.place)

    def mend(self) -> None:
        """Mend it as an administrator does."""
        # processes that still have files of it open keep it
        until(self._is_unmounted, seconds=60)
        subprocess.run(["e2fsck", "-fy", self._image], capture_output=True, check=False)
        self.mount()

    def _is_unmounted(self) -> bool:
        return subprocess.run(["umount", self.place], check=False).returncode == 0

    def remove(self) -> None:
        subprocess.run(["umount", "--lazy", self.place], check=False)


def _do(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4: a file system is mounted to fail")
    one = Disk(tmp_path)
    yield one
    one.remove()


# a full disk: tests/cli/test_run.py without Slurm, tests/chaos with it
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fails_is_exit_3_and_the_run_goes_on_once_it_is_mended(
    kind: str,
    tiny: Tiny,
    disk: Disk,
    cluster: Cluster,
    undisturbed: dict[str, str],
    tmp_path: Path,
) -> None:
    run, log = RunPaths(root=disk.place / "run"), tmp_path / "log"
    words = settings("evaluation.every=0", "rounds=1", *KINDS[kind])
    process = start("run", tiny.config, "--run-dir", run.root, *words, log=log)
    # workers are at their first clients; their logs lie there too
    until(lambda: list(run.round(1).attempt(1).claims.glob("*.json")), seconds=PATIENCE_SECONDS)
    disk.break_down()
    assert process.wait(timeout=PATIENCE_SECONDS) == 3, log.read_text()
    said = log.read_text()
    assert "read-only file system" in said.splitlines()[-1], said
    assert "Traceback" not in said
    assert "a bug?" not in said
    until(lambda: not cluster.slurm("squeue", "-h"), seconds=PATIENCE_SECONDS)
    disk.mend()
    done = fedllm("resume", run.root)
    assert done.returncode == 0, done.stderr
    assert states(run.root) == {n: undisturbed[n] for n in ("0000", "0001")}
    assert each_trained_once(run.round(1))
