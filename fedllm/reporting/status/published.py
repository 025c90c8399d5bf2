"""What clients sent, without reading what they trained: no tensor, no shape, no norm."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from fedllm.storage.checked import LENGTH_BYTES, METADATA, RECORDS
from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import Record
from fedllm.storage.update_reader import UpdateReader
from fedllm.storage.updates import Origin

_METADATA_COMES_FIRST = f'{{"{METADATA}":'


class Sent(Record):
    """The little of an update's record that tells how its client fared."""

    run_id: str
    round: int
    base_fingerprint: str
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

    def __init__(self, paths: RoundPaths, origin: Origin) -> None:
        self._reader = UpdateReader(paths, origin, read_sent)

    def read(self) -> Mapping[str, Sent]:
        """Return the first update of every client."""
        found: dict[str, Sent] = {}
        for sent in self._reader.look():
            found.setdefault(sent.client, sent)
        return found


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
