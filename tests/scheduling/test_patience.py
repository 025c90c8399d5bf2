"""Patience with file servers, on a clock that the test moves."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedllm.errors import DataError, Incomplete, RunDirectoryError, StorageFull
from fedllm.scheduling.patience import Patience
from fedllm.storage.publishing.publish import storage_errors


class Clock:
    """A clock that stands still but for waiting."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waited: list[float] = []

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.waited.append(seconds)

    def patience(self, seconds: float, said: list[str]) -> Patience:
        return Patience(seconds=seconds, say=said.append, wait=self.wait, now=lambda: self.now)


def failing(errors: Iterator[Exception]) -> str:
    for error in errors:
        raise error
    return "done"


def stale() -> OSError:
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE), "a")


def test_pauses_grow_and_all_of_them_take_as_long_as_the_patience() -> None:
    clock, said = Clock(), list[str]()
    with pytest.raises(Incomplete, match="a: stale file handle, for 90 s; repair the disk"):
        clock.patience(90.0, said).retry(lambda: failing(iter([stale()])))
    assert clock.waited == [0.5, 1, 2, 4, 8, 16, 30, 28.5]
    assert said[0] == "a: stale file handle; trying again in 0.5 s"


def test_the_answer_is_returned_once_there_is_one_and_patience_begins_anew() -> None:
    clock = Clock()
    patience = clock.patience(3.0, [])
    for _ in range(5):
        errors = iter([stale(), stale()])
        assert patience.retry(lambda errors=errors: failing(errors)) == "done"  # type: ignore[misc]
    assert clock.waited == [0.5, 1] * 5


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO])
def test_an_error_that_was_made_one_line_counts_by_its_cause(code: int) -> None:
    clock = Clock()

    def publish() -> None:
        with storage_errors(paths):
            raise OSError(code, os.strerror(code), str(paths))

    paths = Path("rounds/0001")
    with pytest.raises(Incomplete):
        clock.patience(1.0, []).retry(publish)
    assert clock.now == 1.0


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DataError("wrong"), DataError),
        (FileNotFoundError(errno.ENOENT, "missing"), FileNotFoundError),
        (RunDirectoryError("another run"), RunDirectoryError),
        (KeyError("a bug"), KeyError),
        (StorageFull("full"), StorageFull),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), StorageFull),
    ],
)
def test_what_time_does_not_mend_is_raised_at_once(error: Exception, kind: type[Exception]) -> None:
    clock = Clock()
    with pytest.raises(kind):
        clock.patience(90.0, []).retry(lambda: failing(iter([error])))
    assert clock.waited == []
