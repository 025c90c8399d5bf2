"""Summaries of published updates, read without tensors, shapes or norms."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from fedllm.storage.checked import LENGTH_BYTES, MAX_HEADER_BYTES, METADATA, RECORDS
from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import Record
from fedllm.storage.trust.printable import Line
from fedllm.storage.trust.regular_files import open_regular
from fedllm.storage.update_reader import UpdateReader
from fedllm.storage.updates import Origin

_METADATA_COMES_FIRST = f'{{"{METADATA}":'


class UpdateSummary(Record):
    """The part of an update's record that tells how its client's training went."""

    run_id: str
    round: int
    base_fingerprint: str
    base_change: str | None = None
    client: str
    status: Literal["ok", "failed"] = "ok"
    reason: Line = ""
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    node: Line = ""
    log: Line = ""


_SUMMARIES = TypeAdapter(list[UpdateSummary])


class UpdateSummaries:
    """Summaries of one round's published updates; each file is read once."""

    def __init__(self, paths: RoundPaths, origin: Origin) -> None:
        self._reader = UpdateReader(paths, origin, read_summaries)

    def read(self) -> Mapping[str, UpdateSummary]:
        """Return the first update of every client."""
        summaries: dict[str, UpdateSummary] = {}
        for summary in self._reader.look():
            summaries.setdefault(summary.client, summary)
        return summaries


def read_summaries(path: Path) -> list[UpdateSummary]:
    """Read the records of an update file from the first part of its header.

    The layout of the tensors, thousands of entries per client, comes after them and is not decoded.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not an update file.
    """
    with open_regular(path) as file:
        count = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if count > min(path.stat().st_size, MAX_HEADER_BYTES):
            raise ValueError(f"{path}: truncated")
        text = file.read(count).decode()
    if not text.startswith(_METADATA_COMES_FIRST):
        raise ValueError(f"{path}: not an update file")
    try:
        metadata, _ = json.JSONDecoder().raw_decode(text, len(_METADATA_COMES_FIRST))
        return _SUMMARIES.validate_json(metadata[RECORDS])
    except (ValidationError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no records of updates") from error
