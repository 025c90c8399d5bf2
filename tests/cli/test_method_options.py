"""A run with options of its method: killed, resumed, refused with others."""

from pathlib import Path

from fedllm.storage.paths import RunPaths
from fedllm.storage.records import AggregateRecord
from tests.cli.commands import in_process, one_line, start, wait_until
from tests.rounds.simulation import states
from tests.tiny import Tiny

KEEP = ("--set", "method.options.truncated=keep")


def test_a_killed_run_that_keeps_directions_resumes_to_the_same_bits(
    tiny: Tiny, tmp_path: Path
) -> None:
    quiet, drop, killed = tmp_path / "quiet", tmp_path / "drop", tmp_path / "killed"
    assert in_process("run", tiny.config, "--run-dir", quiet, *KEEP).returncode == 0
    assert in_process("run", tiny.config, "--run-dir", drop).returncode == 0
    arguments = ["run", tiny.config, "--run-dir", killed, *KEEP, "--set", "scheduler.kind=local"]
    process = start(*arguments, log=tmp_path / "log")
    paths = RunPaths(root=killed)
    wait_until(lambda: paths.round(2).attempt(1).claims.exists())
    process.kill()
    process.wait()
    done = in_process("resume", killed)
    assert done.returncode == 0, done.stderr
    assert states(killed) == states(quiet)
    assert states(quiet) != states(drop)
    record = AggregateRecord.read(RunPaths(root=quiet).round(2).aggregate_record)
    for found in record.modules.values():
        assert found.partitions[0].first == 1
        assert all(part.energy_lost == 0 for part in found.partitions)
    line = one_line(in_process("run", tiny.config, "--run-dir", quiet))
    assert "method.options ({'truncated': 'keep'} in the run, now {})" in line


def test_options_of_another_value_or_name_are_one_line(tiny: Tiny, tmp_path: Path) -> None:
    for change, words in {
        "truncated=maybe": "method.options.truncated: got 'maybe', need 'drop' or 'keep'",
        "trunc=keep": "unknown option; did you mean `method.options.truncated`?",
    }.items():
        arguments = ["run", tiny.config, "--run-dir", tmp_path / "r"]
        found = in_process(*arguments, "--set", f"method.options.{change}")
        assert words in one_line(found)
        assert found.returncode == 2
    arguments += ["--set", "method.name=factor_mean", *KEEP]
    line = one_line(in_process(*arguments))
    assert "method.options.truncated: an option of flexlora; factor_mean has no options" in line
