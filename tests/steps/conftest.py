"""Rounds of the tiny federation that are planned but not yet trained."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedllm.cli.execution import start
from fedllm.steps.session import Session
from fedllm.storage.paths import AttemptPaths, RunPaths
from tests.steps.attempts import untrained
from tests.tiny import Tiny


@pytest.fixture(autouse=True)
def nobody_else_handles_sigterm() -> Iterator[None]:
    """Coverage does, by ending the process: a worker passes the signal on."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def done(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undisturbed round."""
    overrides = ["rounds=1", "evaluation.every=5", "scheduler.clients_per_bundle=2"]
    return start(tiny.config, overrides, tmp_path_factory.mktemp("done") / "run")


@pytest.fixture(scope="module")
def session() -> Session:
    return Session()


@pytest.fixture
def attempt(done: Path, tmp_path: Path) -> AttemptPaths:
    """The same round, planned but not yet trained."""
    shutil.copytree(done, tmp_path / "run")
    return untrained(RunPaths(root=tmp_path / "run").round(1))
