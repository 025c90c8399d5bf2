"""Updates of a round for those who only look; what cannot be read is the coordinator's to judge."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from fedllm.storage.checked import DamagedUpdateError
from fedllm.storage.paths import RoundPaths
from fedllm.storage.updates import Origin, SentBy, update_files

AnySent = TypeVar("AnySent", bound=SentBy)


class UpdateReader(Generic[AnySent]):
    """Reads each update file of a round once.

    Args:
        paths: the round.
        origin: updates of another run, round or base model are passed over.
        read: reads what is wanted of a file; FileNotFoundError, another OSError, DamagedUpdateError
            or ValueError: it is on its way or damaged, and read again at the next look.
    """

    def __init__(
        self, paths: RoundPaths, origin: Origin, read: Callable[[Path], Sequence[AnySent]]
    ) -> None:
        self._paths, self._origin, self._read = paths, origin, read
        self._known: dict[str, list[AnySent]] = {}

    def look(self) -> list[AnySent]:
        """Return what is published by now, in the order of the files' names."""
        return [sent for name in update_files(self._paths) for sent in self._in(name)]

    def _in(self, name: str) -> list[AnySent]:
        if name not in self._known:
            try:
                found = self._read(self._paths.updates / name)
            except (OSError, DamagedUpdateError, ValueError):
                return []
            self._known[name] = [sent for sent in found if self._origin.problem(sent) is None]
        return self._known[name]
