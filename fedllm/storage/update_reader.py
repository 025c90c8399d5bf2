"""A reader of a round's updates for observers; the coordinator alone judges unreadable files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from fedllm.storage.checked import DamagedUpdateError
from fedllm.storage.paths import RoundPaths
from fedllm.storage.updates import HasOrigin, Origin, update_files

AnyUpdate = TypeVar("AnyUpdate", bound=HasOrigin)


class UpdateReader(Generic[AnyUpdate]):
    """Reader of a round's updates; it reads each file once.

    Args:
        paths: the round.
        origin: updates of another run, round or base model are left out.
        read: reads the needed part of a file. FileNotFoundError, another OSError,
            DamagedUpdateError or ValueError mean that the file is on its way or damaged: the next
            call reads it again.
    """

    def __init__(
        self, paths: RoundPaths, origin: Origin, read: Callable[[Path], Sequence[AnyUpdate]]
    ) -> None:
        self._paths, self._origin, self._read = paths, origin, read
        self._known: dict[str, list[AnyUpdate]] = {}

    def look(self) -> list[AnyUpdate]:
        """Return the updates published so far, in the order of the files' names."""
        return [update for name in update_files(self._paths) for update in self._updates_in(name)]

    def _updates_in(self, name: str) -> list[AnyUpdate]:
        if name not in self._known:
            try:
                updates = self._read(self._paths.updates / name)
            except (OSError, DamagedUpdateError, ValueError):
                return []
            self._known[name] = [
                update for update in updates if self._origin.problem(update) is None
            ]
        return self._known[name]
