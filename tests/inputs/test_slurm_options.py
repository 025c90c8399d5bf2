"""sbatch options that people bring from other programs, and run directories as they call them."""

from pathlib import Path

import pytest

from tests.cli.commands import in_process, one_line
from tests.tiny import Tiny

ON_SLURM = ("--set", "scheduler.kind=slurm")


@pytest.mark.parametrize("command", ["plan", "run", "submit", "doctor"])
def test_options_that_change_what_a_task_is_are_all_refused_by_key(
    command: str, tiny: Tiny, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    given = ("default.ntasks-per-node=3", "client.M=far", "aggregate.clus=far", "prepare.n=1")
    options = [word for key in given for word in ("--set", f"scheduler.sbatch.{key}")]
    where = () if command == "plan" else ("--run-dir", root)
    done = in_process(command, tiny.config, *where, *ON_SLURM, *options)
    assert done.returncode == 2
    told = done.stdout + done.stderr
    for key in ("default.ntasks-per-node: got 3", "client.M: got far", "aggregate.clus: got far"):
        assert f"scheduler.sbatch.{key}; fedllm sets it (" in told
    # it says what fedllm says
    assert "prepare.n" not in told
    assert "a bug?" not in told
    assert not root.exists()


@pytest.mark.parametrize("command", ["run", "submit", "doctor"])
@pytest.mark.parametrize(("name", "word"), [("two\nlines", "line break"), ("a\\b", "backslash")])
def test_a_run_directory_that_slurm_cannot_be_told_is_refused_before_it_is_made(
    command: str, name: str, word: str, tiny: Tiny, tmp_path: Path
) -> None:
    root = tmp_path / name
    done = in_process(command, tiny.config, "--run-dir", root, *ON_SLURM)
    told = done.stdout if command == "doctor" else one_line(done)
    assert f"to a path with a {word}; take another --run-dir" in told
    assert done.returncode == 2
    assert not root.exists()


def test_only_what_runs_on_slurm_is_submitted(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"base: {tiny.config}\narms: {{a: {{}}}}\nseeds: [0, 1]\n", encoding="utf-8")
    for subject, command in ((tiny.config, "run"), (finished, "resume"), (sweep, "sweep")):
        where = () if subject is finished else ("--run-dir", root)
        line = one_line(in_process("submit", subject, *where))
        assert line.startswith(
            "fedllm: scheduler.kind: got inline, but `fedllm submit` is for Slurm;"
        )
        assert f"on this machine: fedllm {command} {subject};" in line
        assert not root.exists()
