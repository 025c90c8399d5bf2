"""A damaged `run.json` is made again from its copy: nothing of the run is lost."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.errors import RunDirectoryError
from fedllm.storage.frozen_config import mended_run_record
from fedllm.storage.paths import RunPaths
from tests.cli.commands import in_process, one_line
from tests.rounds.simulation import Simulation, complete


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    complete(tmp_path / "run", Simulation())
    return RunPaths(root=tmp_path / "run")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(100)),
    "half": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_resume_makes_it_again(run: RunPaths, damage: str) -> None:
    before = run.run.read_bytes()
    DAMAGES[damage](run.run)
    done = in_process("resume", run.root)
    assert done.returncode == 0, done.stderr
    assert "made again from" in done.stdout + done.stderr
    assert run.run.read_bytes() == before


def test_what_only_looks_says_how_and_changes_nothing(run: RunPaths) -> None:
    run.run.write_bytes(b"junk")
    line = one_line(in_process("status", run.root))
    assert "`fedllm resume RUN` makes it again" in line
    assert run.run.read_bytes() == b"junk"


def test_a_lost_copy_is_made_again_and_without_both_nothing_is_guessed(run: RunPaths) -> None:
    before = run.run_copy.read_bytes()
    run.run_copy.unlink()
    assert in_process("resume", run.root).returncode == 0
    assert run.run_copy.read_bytes() == before == run.run.read_bytes()
    for path in (run.run, run.run_copy):
        path.write_bytes(b"junk")
    with pytest.raises(RunDirectoryError, match="damaged record"):
        mended_run_record(run)
