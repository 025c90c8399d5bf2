"""Tokenised clients on disk: one Arrow file per split, sorted by client, and an index of clients.

The folder's name is the fingerprint of everything that decides its content. A folder that exists
is therefore complete and correct, and is never written again. Jobs map the files into memory and
read the rows of the clients they train.
"""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from fedllm.errors import DataError
from fedllm.storage.fingerprints import sha256_of
from fedllm.storage.records import Record

INDEX = "index.json"
# folders of earlier versions do not have this column
TARGETS = "targets"


class SplitRows(Record):
    """Position of a client's rows in the file of one split: `rows` rows from `start`."""

    start: int
    rows: int


class IndexedClient(Record):
    """Client in the cache; `integers` are its integer columns that hold one value only."""

    id: str
    category: str
    integers: dict[str, int]
    splits: dict[str, SplitRows]
    dropped_rows: int = 0
    cut_prompts: int = 0
    cut_answers: int = 0
    train_tokens: int = 0

    def num_rows(self, split: str) -> int:
        """Return the number of rows in a split."""
        position = self.splits.get(split)
        return position.rows if position else 0


class AnswerForm(Record):
    """Text around answers: tokens `ends` end them, and a template writes `leads` before them."""

    ends: tuple[int, ...] = ()
    leads: tuple[str, ...] = ()


BARE_ANSWERS = AnswerForm()
"""Answers that end with an end token of the tokenizer or the model, and have no lead."""


class CacheIndex(Record):
    """Index of all clients, in canonical order."""

    clients: list[IndexedClient]
    answer_form: AnswerForm = BARE_ANSWERS


@dataclass(frozen=True, kw_only=True)
class Row:
    """Row ready to train or score; `answer_ids` includes the end of the turn.

    `prompt_targets` are the places of the prompt's tokens that have a loss: earlier answers.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    references: list[str]
    prompt_targets: Sequence[int] = ()


class TokenizedClients:
    """Clients of one tokenised data set; their rows are read from mapped files on demand."""

    def __init__(self, index: CacheIndex, files: Mapping[str, "_SplitFile"]) -> None:
        self.clients = {client.id: client for client in index.clients}
        self.answer_form = index.answer_form
        self._files = files
        self._opened: dict[str, pa.Table] = {}

    @classmethod
    def open(cls, folder: Path, sha256: Mapping[str, str] | None = None) -> "TokenizedClients":
        """Open a folder that `writer.write_clients` published.

        Args:
            folder: the folder.
            sha256: the digests of its files as they were prepared; a file of rows is compared with
                its digest when its rows are first read. Empty or None: nothing is compared.

        Raises:
            DataError: there is no such folder, or its index is not the one that was prepared.
        """
        index = folder / INDEX
        if not index.is_file():
            raise DataError(f"{folder}: no tokenised data here; run `fedllm prepare` again")
        if sha256 and sha256_of(index) != sha256.get(INDEX):
            raise _not_prepared(index)
        files = {
            file.stem: _SplitFile(path=file, sha256=sha256.get(file.name, "") if sha256 else None)
            for file in sorted(folder.glob("*.arrow"))
        }
        return cls(CacheIndex.read(index), files)

    def rows(self, client: str, split: str) -> list[Row]:
        """Return a client's rows of `train`, `validation` or `test`, in the order of its data.

        Raises:
            DataError: there is no such client.
        """
        position = self.client(client).splits.get(split)
        if position is None:
            return []
        table = self._table(split).slice(position.start, position.rows)
        columns = (
            _lists(table["prompt"]),
            _lists(table["answer"]),
            table["references"].to_pylist(),
            _lists(table[TARGETS]) if TARGETS in table.column_names else [()] * len(table),
        )
        return [
            Row(prompt_ids=prompt, answer_ids=answer, references=references, prompt_targets=targets)
            for prompt, answer, references, targets in zip(*columns, strict=True)
        ]

    def longest_row(self, client: str, split: str) -> int:
        """Return the tokens of a client's longest row in a split, 0 without rows.

        Raises:
            DataError: there is no such client.
        """
        position = self.client(client).splits.get(split)
        if position is None or not position.rows:
            return 0
        table = self._table(split).slice(position.start, position.rows)
        parts = (pc.list_value_length(table[name]) for name in ("prompt", "answer"))
        longest: int = pc.max(pc.add(*parts)).as_py()
        return longest

    def largest_token(self) -> int:
        """Return the largest token id of all rows, -1 without rows."""
        tables = map(self._table, self._files)
        columns = (t[name] for t in tables for name in ("prompt", "answer"))
        return max((pc.max(pc.list_flatten(c)).as_py() or -1 for c in columns), default=-1)

    def client(self, client: str) -> IndexedClient:
        """Return a client's entry of the index.

        Raises:
            DataError: there is no such client.
        """
        entry = self.clients.get(client)
        if entry is None:
            raise DataError(unknown_client(client, list(self.clients)))
        return entry

    def _table(self, split: str) -> pa.Table:
        if split not in self._opened:
            self._opened[split] = self._files[split].table()
        return self._opened[split]


@dataclass(frozen=True, kw_only=True)
class _SplitFile:
    """File of the rows of a split; `sha256` is what it has to be, None: that is not known."""

    path: Path
    sha256: str | None

    def table(self) -> pa.Table:
        """Map the file into memory, the very file that was compared with the digest."""
        with self.path.open("rb") as file:
            if self.sha256 not in {None, hashlib.file_digest(file, "sha256").hexdigest()}:
                raise _not_prepared(self.path)
            try:
                mapped = pa.memory_map(f"/proc/self/fd/{file.fileno()}")
                return pa.ipc.open_file(mapped).read_all()
            except pa.ArrowInvalid as error:
                raise _not_prepared(self.path) from error


def digests_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the files of a folder of tokenised clients."""
    return {
        file.name: sha256_of(file) for file in (folder / INDEX, *sorted(folder.glob("*.arrow")))
    }


def _not_prepared(file: Path) -> DataError:
    return DataError(
        f"{file}: damaged, or replaced since it was prepared; remove {file.parent}, then resume: "
        "it is prepared again"
    )


def _lists(column: pa.ChunkedArray) -> list[list[int]]:
    """Return an Arrow column as lists of numbers, ten times faster than through Arrow's scalars."""
    lists: list[list[int]] = []
    for chunk in column.chunks:
        values = chunk.flatten().to_numpy().tolist()
        offsets = chunk.offsets.to_numpy().tolist()
        first = offsets[0] if offsets else 0
        lists.extend(values[start - first : end - first] for start, end in pairwise(offsets))
    return lists


def unknown_client(client: str, known: Sequence[str]) -> str:
    """Return the message that there is no such client, with the nearest ids."""
    near = difflib.get_close_matches(client, known, n=3, cutoff=0.0)
    shown = ", ".join(near) or "none"
    return f"client {client}: not among the {len(known)} clients of the data; nearest: {shown}"
