"""A method of the user's own: found by every command and job, and held to its source."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from fedllm.methods.catalog import method_class
from fedllm.methods.spectral.flexlora import FlexLora
from fedllm.storage.own_code import import_from
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import RunRecord
from tests.cli.commands import fedllm, in_process, one_line, start, wait_until
from tests.lora.adapters import random_factors
from tests.methods.aggregating import aggregate
from tests.rounds.simulation import states
from tests.tiny import Tiny

PAGE = Path(__file__).resolve().parents[2] / "docs/own-method.md"


def block(language: str) -> str:
    """Return the page's block of that language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    assert len(found) == 1
    return str(found[0])


@pytest.fixture(scope="module")
def project(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's class and a configuration that names it."""
    folder = tmp_path_factory.mktemp("project")
    raw = yaml.safe_load(tiny.config.read_text(encoding="utf-8"))
    raw |= yaml.safe_load(block("yaml"))
    (folder / "own.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    (folder / "my_methods.py").write_text(block("python"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def killed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on workers, started elsewhere and killed in round 2."""
    root = tmp_path_factory.mktemp("runs") / "killed"
    arguments = ["run", project / "own.yaml", "--run-dir", root, "--set", "scheduler.kind=local"]
    process = start(*arguments, log=root.with_name("log"))
    paths = RunPaths(root=root)
    wait_until(lambda: paths.round(2).attempt(1).claims.exists())
    process.kill()
    process.wait()
    return root


def test_a_killed_run_resumes_elsewhere_to_the_same_bits_and_is_exported_and_scored(
    project: Path, killed: Path, tmp_path: Path
) -> None:
    # as the coordinator's job does
    run_on = fedllm("run", killed / "config.yaml", "--run-dir", killed, cwd=tmp_path)
    assert run_on.returncode == 0, run_on.stderr
    resumed = fedllm("resume", killed, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    quiet = tmp_path / "quiet"
    done = in_process("run", project / "own.yaml", "--run-dir", quiet)
    assert done.returncode == 0, done.stderr
    assert states(killed) == states(quiet)
    record = RunRecord.read(RunPaths(root=killed).run).own_code
    assert record is not None
    assert record.folders[0] == str(project)
    assert sorted(record.files) == ["my_methods"]
    exported = fedllm("export", killed, "--out", tmp_path / "adapter", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    scored = in_process("evaluate", killed, "--json")
    assert json.loads(scored.stdout)["round"] == 2, scored.stderr


def test_a_changed_source_is_named_and_nothing_goes_on(
    project: Path, killed: Path, tmp_path: Path
) -> None:
    source = project / "my_methods.py"
    before = source.read_bytes()
    source.write_bytes(before + b"# one more line\n")
    words = "method.name my_methods:MeanOfProducts: the source of my_methods changed since the run"
    try:
        for command in (
            ["resume", killed, "--set", "rounds=3"],
            ["export", killed, "--out", tmp_path / "adapter"],
        ):
            assert words in one_line(in_process(*command))
    finally:
        source.write_bytes(before)
    assert not (tmp_path / "adapter").exists()
    assert not RunPaths(root=killed).round(3).cohort.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "method.name=my_method:MeanOfProducts",
            "there is no module 'my_method' among the installed",
        ),
        (
            "method.name=my_methods:MeanOfProduct",
            "my_methods.py has no 'MeanOfProduct'; did you mean MeanOfProducts?",
        ),
        ("method.options.equals=true", "unknown option; did you mean `method.options.equal`?"),
        (
            "method.options.truncated=keep",
            "an option of flexlora, slora; my_methods:MeanOfProducts has equal",
        ),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan", "doctor"])
def test_a_class_or_an_option_that_is_not_there_is_one_line(
    project: Path, tmp_path: Path, command: str, change: str, words: str
) -> None:
    place = ["--run-dir", tmp_path / "run"] if command == "run" else []
    done = in_process(command, project / "own.yaml", *place, "--set", change)
    assert done.returncode == 2
    found = done.stdout if command == "doctor" else one_line(done)
    assert words in " ".join(found.split())
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_python_is_named_with_its_line(project: Path, tmp_path: Path) -> None:
    (project / "broken.py").write_text("class Mine:\n    def\n", encoding="utf-8")
    change = ["--set", "method.name=broken:Mine", "--run-dir", tmp_path / "run"]
    line = one_line(in_process("run", project / "own.yaml", *change))
    assert "broken.py: is not Python: invalid syntax (broken.py, line 2)" in line


def test_the_class_of_the_page_is_what_flexlora_does(project: Path) -> None:
    import_from([str(project)])
    like = FlexLora(seed=1, alpha=16.0)
    own = method_class("my_methods:MeanOfProducts")(seed=1, alpha=16.0)  # type: ignore[call-arg]
    sent = [random_factors(rank, out=11, in_=9, rank=rank) for rank in (2, 8, 3)]
    ours, theirs = (aggregate(m, sent, [1.0, 3.0, 4.0], [2, 8]) for m in (own, like))
    assert ours.diagnostics == theirs.diagnostics
    assert all(torch.equal(ours.state[part], theirs.state[part]) for part in theirs.state)
    assert len(block("python").splitlines()) <= 36
