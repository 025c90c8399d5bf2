"""A run with options of its method: killed, resumed, refused with others."""

import re
from pathlib import Path

import pytest

from fedllm.storage.paths import RunPaths
from fedllm.storage.records import AggregateRecord
from tests.cli.commands import in_process, one_line, start, wait_until
from tests.rounds.simulation import states
from tests.tiny import Tiny

KEEP = ("--set", "method.options.truncated=keep")


@pytest.mark.nightly
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


@pytest.mark.parametrize("command", ["plan", "prepare"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["method.name=factor_mean"],
            "factor_mean averages factors of one rank, but",
        ),
        (["method.name=lora_fair"], "lora_fair averages factors of one rank"),
        (["method.name=rbla", "clients.tiers.large.ranks=33"], "takes at most 32; lower it"),
        (["method.name=hetlora", "clients.tiers.large.ranks=33"], "takes at most 32; lower it"),
        (["method.options.truncate=keep"], "did you mean `method.options.truncated`?"),
        (["method.server=fedadam"], "method.server: fedadam keeps moments of every entry, but the"),
        (
            ["method.server_options.momentum=0.5"],
            "method.server_options.momentum: an option of fedavgm; none has no options",
        ),
        (
            ["privacy.clip_norm=1"],
            "aggregation.weights: got rows; with privacy.clip_norm it has to be uniform",
        ),
        (
            ["privacy.clip_norm=1", "aggregation.weights=uniform", "method.name=rbla"],
            "privacy.clip_norm: method.name rbla cannot bound what one client changes",
        ),
        (["method.local=slora"], "method.local: got 'slora', which is a value of method.name"),
        (["method.options.ridge=1"], "method.options.ridge: an option of lora_fair; flexlora has"),
    ],
)
def test_what_a_method_cannot_do_is_told_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, command: str, changes: list[str], words: str
) -> None:
    cache = tmp_path / "cache"
    given = [*changes, f"storage.cache={cache}"]
    line = one_line(in_process(command, tiny.config, *(w for c in given for w in ("--set", c))))
    assert words in line
    assert not cache.exists()


def test_a_run_does_not_go_on_with_another_method(tiny: Tiny, tmp_path: Path) -> None:
    root = tmp_path / "run"
    quick = ["--set", "rounds=1", "--set", "evaluation.every=5", "--set", "training.max_steps=1"]
    assert in_process("run", tiny.config, "--run-dir", root, *quick).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    for name in ("rbla", "hetlora"):
        line = one_line(in_process("resume", root, "--set", f"method.name={name}"))
        assert f"method.name (flexlora in the run, now {name})" in line
        assert "start another run" in line
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


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
    assert (
        "method.options.truncated: an option of flexlora, slora; factor_mean has no options" in line
    )


def test_plan_prints_what_the_whole_run_says_about_a_client(tiny: Tiny) -> None:
    private = ["privacy.clip_norm=1", "privacy.noise_multiplier=4", "aggregation.weights=uniform"]
    keep = ["method.options.truncated=keep"]
    changes = [word for change in [*private, *keep] for word in ("--set", change)]
    done = in_process("plan", tiny.config, *changes)
    assert done.returncode == 0, done.stderr
    words = r"privacy of a client after 2 rounds: epsilon \d+\.\d\d at delta 1e-05 "
    assert re.search(words + r"\(fixed cohorts of 4 of 8 clients\)", done.stdout), done.stdout


def test_plan_refuses_a_device_that_is_not_here_where_jobs_run_here(
    tiny: Tiny, tmp_path: Path
) -> None:
    cache = ["--set", f"storage.cache={tmp_path / 'cache'}"]
    line = one_line(in_process("plan", tiny.config, *cache, "--set", "training.device=npx"))
    assert "training.device: got 'npx'; need auto, cpu, cuda or cuda:N" in line
    assert not (tmp_path / "cache").exists()
