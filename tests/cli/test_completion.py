"""Completion in the shell: run directories, configurations, keys after `--set`; without torch."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedllm.cli.completion import complete_configs, complete_keys, complete_runs
from tests.cli.commands import FEDLLM

CONFIG = "rounds: 1\nclients:\n  tiers: {phone: {ranks: 2}, server: {ranks: 8}}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration, a run and a sweep."""
    (tmp_path / "mine.yaml").write_text(CONFIG)
    for path in ("runs/one/run.json", "elsewhere/two/run.json", "runs/grid/sweep.json"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text("{}")
    (tmp_path / "runs/no-run").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keys(incomplete: str, *words: str) -> list[str]:
    """Return what `--set` offers after the words of a command."""
    context = cast("Any", SimpleNamespace(args=list(words)))
    return [key for key, _ in complete_keys(context, incomplete)]


@pytest.mark.usefixtures("here")
def test_runs_and_sweeps_are_offered_and_other_folders_are_not() -> None:
    assert list(complete_runs("run")) == ["runs/grid", "runs/one"]
    assert "elsewhere/two" in complete_runs("else")
    assert list(complete_configs("m")) == ["mine.yaml"]


@pytest.mark.usefixtures("here")
def test_keys_come_with_their_defaults_and_with_the_tiers_of_the_configuration() -> None:
    assert keys("training.sched") == ["training.schedule=linear"]
    assert keys("clients.tiers.server.r", "mine.yaml") == ["clients.tiers.server.ranks=null"]
    assert not keys("clients.tiers.server.r", "runs/one")
    assert len(keys("")) > 100


def test_a_written_key_offers_its_values() -> None:
    assert keys("scheduler.kind=") == [f"scheduler.kind={w}" for w in ("inline", "local", "slurm")]
    assert keys("method.name=flexl") == ["method.name=flexlora"]
    assert keys("training.threads=") == ["training.threads=1"]


def test_a_shell_asks_for_keys_and_no_compute_stack_is_loaded(here: Path) -> None:
    # a module that cannot be imported: that of torch
    (here / "torch.py").write_text("raise ImportError")
    environment = {
        "_FEDLLM_COMPLETE": "complete_bash",
        "COMP_WORDS": "fedllm run mine.yaml --set clients.tiers.phone.ranks",
        "COMP_CWORD": "4",
        "PYTHONPATH": str(here),
    }
    done = subprocess.run([FEDLLM], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr) == (["clients.tiers.phone.ranks=null"], "")
