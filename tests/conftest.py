"""Fixtures that more than one room of tests needs."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.tiny import Tiny

# workers and coordinators that tests start inherit these
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# a busy machine is no failure, and CI says the same of the same commit
settings.register_profile("fedllm", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("fedllm")

SHARED = Path(__file__).resolve().parents[2] / "shared"
NEEDED = {
    "data/natural-instructions": "README.md, Natural Instructions, says how to make it",
    "models/nano-base": "a Llama of 6 layers and 6.5 M parameters, with its tokenizer",
}


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
