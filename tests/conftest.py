"""Fixtures that more than one room of tests needs."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from fedllm.process.session import Session
    from fedllm.storage.paths import AttemptPaths
    from tests.tiny import Tiny

# workers and coordinators that tests start inherit these
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_sessionstart() -> None:
    """Give the session a cache of its own, so that no test reads or fills that of the user."""
    folder = tempfile.mkdtemp(prefix="fedllm-cache-")
    # processes of xdist do not clean up what pytest knows
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = folder


# a busy machine is no failure, and CI says the same of the same commit
settings.register_profile("fedllm", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("fedllm")

SHARED = Path(__file__).resolve().parents[2] / "shared"
NEEDED = {
    "data/natural-instructions": "README.md, Natural Instructions, says how to make it",
    "models/nano-base": "a Llama of 6 layers and 6.5 M parameters, with its tokenizer",
}


@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A secret for the tests' updates, not the developer's own; processes that start inherit it."""
    from fedllm.storage.trust.secret import STATE_VARIABLE, user_secret

    os.environ[STATE_VARIABLE] = str(tmp_path_factory.mktemp("state"))
    user_secret(create=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the Natural Instructions clients and the small base model."""
    missing = [f"{SHARED / name} ({how})" for name, how in NEEDED.items() if not _is_there(name)]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    return SHARED


def _is_there(name: str) -> bool:
    return (SHARED / name).is_dir()


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """End the commands that a failed test left in the background."""
    from tests.cli.commands import end_started

    yield
    end_started()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "Tiny":
    """A small base model, its clients and a configuration, made once."""
    from tests.tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def nobody_else_handles_sigterm() -> Iterator[None]:
    """Coverage does, by ending the process: a worker passes the signal on."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def done(tiny: "Tiny", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undisturbed round."""
    from fedllm.cli.execution import start

    overrides = ["rounds=1", "evaluation.every=5", "scheduler.clients_per_bundle=2"]
    return start(tiny.config, overrides, tmp_path_factory.mktemp("done") / "run")


@pytest.fixture(scope="session")
def finished(tiny: "Tiny", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds, for tests that only read it."""
    from fedllm.cli.execution import start

    return start(tiny.config, [], tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="module")
def session() -> "Session":
    """What a worker keeps loaded."""
    from fedllm.process.session import Session

    return Session()


@pytest.fixture
def attempt(done: Path, tmp_path: Path) -> "AttemptPaths":
    """The same round, planned but not yet trained."""
    from fedllm.storage.paths import RunPaths
    from tests.worker.attempts import untrained

    shutil.copytree(done, tmp_path / "run")
    return untrained(RunPaths(root=tmp_path / "run").round(1))
