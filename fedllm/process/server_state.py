"""The server state of a round, checked against its record.

Terms of a change of the base are in the files of the rounds that made them; the folder of a later
round has links to these files. So a round's folder is whole, whatever is removed elsewhere.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from fedllm.errors import RunDirectoryError
from fedllm.methods.base_terms import is_term, live_terms
from fedllm.methods.protocol import StateNotes
from fedllm.storage.fingerprints import sha256_of
from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import AggregateRecord
from fedllm.storage.tensors import TensorFile

_NOTES, _EARLIER = "notes", "earlier"  # in the metadata


class StateFile(TensorFile):
    """The server state after a round: its file, and the terms in the files of earlier rounds.

    `sha256` is that of its own file, `earlier` has those of the others, by their round.
    """

    def __init__(self, paths: RoundPaths, sha256: str, earlier: Mapping[int, str]) -> None:
        """Open the files.

        Raises:
            FileNotFoundError: the round has no state.
            RunDirectoryError: a file is missing, truncated or not a tensor file.
        """
        super().__init__(paths.global_state)
        self.round, self.sha256, self.earlier = paths.number, sha256, dict(earlier)
        self._files = {number: _earlier_file(paths, number) for number in earlier}
        own = dict.fromkeys(self.names, self.round)
        terms = {
            name: number
            for number, file in self._files.items()
            for name in file.names
            if is_term(_part(name))
        }
        self._rounds = _without_old_terms({**own, **terms})
        self.names = tuple(self._rounds)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close all files."""
        for file in self._files.values():
            file.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        file = self._file_of(name)
        return file.shape(name) if file else super().shape(name)

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            RunDirectoryError: the state has no such tensor.
        """
        file = self._file_of(name)
        return file.get(name) if file else super().get(name)

    @property
    def terms(self) -> list[str]:
        """The tensors that are terms of the change of the base."""
        return [name for name in self.names if is_term(_part(name))]

    def round_of(self, name: str) -> int:
        """Return the round whose file has a tensor."""
        return self._rounds[name]

    def path_of(self, number: int) -> Path:
        """Return the path of the file of a round."""
        return self.path if number == self.round else self._files[number].path

    def check_earlier(self) -> None:
        """Compare the files of earlier rounds with what the record says of them.

        Raises:
            RunDirectoryError: one is damaged.
        """
        for number, file in self._files.items():
            if sha256_of(file.path) != self.earlier[number]:
                raise RunDirectoryError(
                    f"{file.path}: damaged, not the file that aggregate.json describes; restore it"
                )

    def _file_of(self, name: str) -> TensorFile | None:
        """Return the file of an earlier round that has a tensor; None: the round's own has it."""
        return self._files.get(self._rounds.get(name, self.round))


def _earlier_file(paths: RoundPaths, number: int) -> TensorFile:
    path = paths.earlier_state(number)
    try:
        return TensorFile(path)
    except FileNotFoundError as error:
        raise RunDirectoryError(f"{path}: missing, the state refers to it; restore it") from error


def _part(name: str) -> str:
    return name.rpartition(".")[2]


def _without_old_terms(rounds: Mapping[str, int]) -> dict[str, int]:
    """Return the tensors of a state without the terms that a newer matrix has in it."""
    modules: dict[str, list[str]] = {}
    for name in rounds:
        module, _, part = name.rpartition(".")
        if is_term(part):
            modules.setdefault(module, []).append(part)
    live = {f"{module}.{part}" for module, parts in modules.items() for part in live_terms(parts)}
    return {name: of for name, of in rounds.items() if name in live or not is_term(_part(name))}


def read_state(paths: RoundPaths) -> StateFile:
    """Open a round's server state, and check all of it.

    Raises:
        RunDirectoryError: it is missing (pruned, or the round is not done) or damaged.
    """
    file = open_own_state(paths)
    file.check_earlier()
    return file


def open_own_state(paths: RoundPaths) -> StateFile:
    """Open a round's server state; of its files only the round's own is checked.

    Raises:
        RunDirectoryError: it is missing (pruned, or the round is not done) or damaged.
    """
    record = AggregateRecord.find(paths.aggregate_record)
    if record is None:
        raise RunDirectoryError(f"{paths.root}: the round has no server state yet; resume the run")
    if not paths.global_state.exists():
        raise RunDirectoryError(
            f"{paths.global_state}: pruned (storage.keep_states, storage.keep_every); "
            "take another --round"
        )
    if sha256_of(paths.global_state) != record.sha256:
        raise RunDirectoryError(
            f"{paths.global_state}: damaged, not the file that aggregate.json describes; "
            "`fedllm resume` makes the newest one again"
        )
    return StateFile(paths, record.sha256, record.earlier)


def metadata_of_state(method: str, notes: StateNotes, earlier: Mapping[int, str]) -> dict[str, str]:
    """Return the metadata of a state file.

    It has the method's name, the JSON part and the checksums of the earlier states to which this
    one refers, if there are any: so the file's checksum is that of the whole state.
    """
    parts = {_NOTES: notes, _EARLIER: earlier}
    return {
        "method": method,
        **{
            name: json.dumps(part, sort_keys=True, separators=(",", ":"), allow_nan=False)
            for name, part in parts.items()
            if part
        },
    }


def notes_of(state: TensorFile) -> StateNotes:
    """Return the JSON part of a server state."""
    notes: StateNotes = json.loads(state.metadata.get(_NOTES, "{}"))
    return notes
