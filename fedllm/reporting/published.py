"""What clients sent, without reading what they trained: no tensor, no shape, no norm."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from fedllm.storage.checked import LENGTH_BYTES, METADATA, RECORDS
from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import Record
from fedllm.storage.updates import update_files

_METADATA_COMES_FIRST = f'{{"{METADATA}":'


class Sent(Record):
    """The little of an update's record that tells how its client fared."""

    run_id: str
    round: int
    client: str
    status: Literal["ok", "failed"] = "ok"
    reason: str = ""
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    node: str = ""
    log: str = ""


_SENT = TypeAdapter(list[Sent])


class SentUpdates:
    """Published updates of one round; a file that was read once is not read again."""

    def __init__(self, paths: RoundPaths, run_id: str) -> None:
        self._paths = paths
        self._run_id = run_id
        self._known: dict[str, list[Sent]] = {}

    def read(self) -> Mapping[str, Sent]:
        """Return the first update of every client; unreadable and foreign files are passed over."""
        found: dict[str, Sent] = {}
        for name in update_files(self._paths):
            for sent in self._read(name):
                if (sent.run_id, sent.round) == (self._run_id, self._paths.number):
                    found.setdefault(sent.client, sent)
        return found

    def _read(self, name: str) -> list[Sent]:
        if name not in self._known:
            try:
                self._known[name] = read_sent(self._paths.updates / name)
            except (OSError, ValueError):
                # on its way, or damaged: the coordinator sets it aside
                return []
        return self._known[name]


def read_sent(path: Path) -> list[Sent]:
    """Read the records of an update file by the first part of its header.

    The layout of the tensors, thousands of entries a client, follows and stays undecoded.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not an update file.
    """
    with path.open("rb") as file:
        count = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if count > path.stat().st_size:
            raise ValueError(f"{path}: truncated")
        text = file.read(count).decode()
    if not text.startswith(_METADATA_COMES_FIRST):
        raise ValueError(f"{path}: not an update file")
    try:
        metadata, _ = json.JSONDecoder().raw_decode(text, len(_METADATA_COMES_FIRST))
        return _SENT.validate_json(metadata[RECORDS])
    except (ValidationError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no records of updates") from error
