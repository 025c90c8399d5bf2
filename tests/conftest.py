"""Fixtures that more than one room of tests needs."""

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the Natural Instructions clients and the small base model."""
    if not SHARED.is_dir():
        message = f"needs {SHARED} (Natural Instructions clients and a small base model): absent"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    return SHARED
