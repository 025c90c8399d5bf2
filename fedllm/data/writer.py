"""Writer of the cache of tokens; it works block by block to limit memory."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedllm.data.cache import INDEX, TARGETS, CacheIndex, IndexedClient, SplitRows
from fedllm.data.columns import INTEGER_PREFIX, rows_by_client
from fedllm.data.files.splits import TEST, TRAIN
from fedllm.data.tokenize import EncodedRow, RowEncoder
from fedllm.data.turns import TURNS, TextRow, Turn
from fedllm.storage.kept_records import Count, Tally, uncounted
from fedllm.storage.publishing.folders import publishing_folder

# version of the files' content, part of the folder's fingerprint: raise it with any change
FORMAT = 3
# rows tokenised at a time: 20 to 60 MiB as Python objects
_BLOCK_ROWS = 2048
# no run reads rows of another split
_TOKENISED = (TRAIN, TEST)


@dataclass(kw_only=True)
class _ClientTally:
    """Counts and properties of one client over all splits."""

    category: str = ""
    integers: dict[str, set[int]] = field(default_factory=dict)
    splits: dict[str, SplitRows] = field(default_factory=dict)
    dropped: int = 0
    cut_prompts: int = 0
    cut_answers: int = 0
    train_tokens: int = 0

    def indexed(self, client: str) -> IndexedClient:
        return IndexedClient(
            id=client,
            category=self.category,
            integers={n: v for n, (v, *more) in sorted(self.integers.items()) if not more},
            splits=self.splits,
            dropped_rows=self.dropped,
            cut_prompts=self.cut_prompts,
            cut_answers=self.cut_answers,
            train_tokens=self.train_tokens,
        )


def write_clients(
    folder: Path,
    tables: dict[str, pa.Table],
    encoder: RowEncoder,
    count: Count = uncounted,
    *,
    sources: Sequence[Path] = (),
) -> None:
    """Tokenise tables of canonical columns, one per split, and publish them as `folder`.

    Validation rows are not tokenised: no run reads them. Every table is removed from `tables` when
    it is needed, so that its memory can be freed. Only who may read the `sources` may read the
    folder.
    """
    with publishing_folder(folder, sources=sources) as beside:
        tallies: dict[str, _ClientTally] = {}
        total = sum(len(tables[split]) for split in _TOKENISED if split in tables)
        progress = Tally(what="rows tokenised", count=count, total=total)
        for split in list(tables):
            rows = _SplitOfClients(split, tables, tallies)
            rows.describe()
            if split in _TOKENISED:
                rows.write(beside / f"{split}.arrow", encoder, progress)
        clients = [tallies[client].indexed(client) for client in sorted(tallies)]
        index = CacheIndex(clients=clients, answer_form=encoder.answer_form)
        (beside / INDEX).write_bytes(index.to_bytes())


class _SplitOfClients:
    """Rows of one split, in the order of their clients; removes its table from `tables`."""

    def __init__(
        self, split: str, tables: dict[str, pa.Table], tallies: dict[str, _ClientTally]
    ) -> None:
        owners = list(rows_by_client(tables[split]))
        self._split = split
        self._sizes = np.array([len(owner.indices) for owner in owners], dtype=np.int64)
        self._tallies = [tallies.setdefault(owner.client, _ClientTally()) for owner in owners]
        self._table = _take_rows(tables, split, np.concatenate([owner.indices for owner in owners]))

    def describe(self) -> None:
        """Store category and integer columns of every client in its tally."""
        starts = np.cumsum(self._sizes) - self._sizes
        categories = self._table["category"].take(pa.array(starts)).to_pylist()
        for tally, category in zip(self._tallies, categories, strict=True):
            tally.category = tally.category or category
        for name in self._table.column_names:
            if name.startswith(INTEGER_PREFIX) and not self._table[name].null_count:
                self._describe_integers(name, starts)

    def _describe_integers(self, name: str, starts: npt.NDArray[np.int64]) -> None:
        values = self._table[name].to_numpy()
        lowest = np.minimum.reduceat(values, starts).tolist()
        highest = np.maximum.reduceat(values, starts).tolist()
        for tally, low, high in zip(self._tallies, lowest, highest, strict=True):
            tally.integers.setdefault(name.removeprefix(INTEGER_PREFIX), set()).update((low, high))

    def write(self, file: Path, encoder: RowEncoder, progress: Tally) -> None:
        """Tokenise all rows into `file`, and count the dropped and cut ones."""
        ids = pa.list_(pa.uint16() if encoder.fits_16_bits else pa.int32())
        references = pa.list_(pa.large_string())
        schema = pa.schema(
            {"prompt": ids, "answer": ids, "references": references, TARGETS: pa.list_(pa.int32())}
        )
        owners = np.repeat(np.arange(len(self._sizes)), self._sizes)
        kept = np.zeros(len(self._sizes), dtype=np.int64)
        # a Python file, because its errors tell when the disk is full
        with file.open("wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for start in range(0, len(owners), _BLOCK_ROWS):
                block = slice(start, start + _BLOCK_ROWS)
                table = self._table.slice(start, _BLOCK_ROWS)
                encoded = encoder.encode(text_rows(table))
                self._count(owners[block].tolist(), encoded)
                keep = np.array([bool(row.answer_ids) for row in encoded])
                kept += np.bincount(owners[block][keep], minlength=len(kept))
                writer.write_batch(_batch(schema, encoded, table["references"], keep))
                progress.add(len(encoded))
        self._set_positions(kept)

    def _count(self, owners: Sequence[int], encoded: Sequence[EncodedRow]) -> None:
        for owner, row in zip(owners, encoded, strict=True):
            tally = self._tallies[owner]
            if not row.answer_ids:
                tally.dropped += 1
                continue
            tally.cut_prompts += row.prompt_cut
            tally.cut_answers += row.answer_cut
            if self._split == "train":
                tally.train_tokens += len(row.prompt_ids) + len(row.answer_ids)

    def _set_positions(self, kept: npt.NDArray[np.int64]) -> None:
        ends = np.cumsum(kept).tolist()
        for tally, rows, end in zip(self._tallies, kept.tolist(), ends, strict=True):
            tally.splits[self._split] = SplitRows(start=end - rows, rows=rows)


def _take_rows(tables: dict[str, pa.Table], split: str, order: npt.NDArray[np.int64]) -> pa.Table:
    """Remove a table from `tables` and return its rows in `order`.

    It works column by column, so that memory holds at most one column twice. Arrow joins the
    chunks of a table for every `take`, so all rows are taken at once and not block by block.
    """
    rows, table = pa.array(order), tables.pop(split)
    columns = {}
    for name in table.column_names:
        columns[name] = table[name].combine_chunks().take(rows)
        table = table.drop_columns([name])
        pa.default_memory_pool().release_unused()
    return pa.table(columns)


def text_rows(table: pa.Table) -> list[TextRow]:
    """Return the rows of a table of canonical columns."""
    columns = (table[name].to_pylist() for name in ("instruction", "input", "references"))
    has_turns = TURNS in table.column_names
    conversations = table[TURNS].to_pylist() if has_turns else [None] * table.num_rows
    return [
        TextRow(
            instruction=instruction,
            input=text,
            references=references,
            turns=tuple(Turn(**turn) for turn in turns or ()),
        )
        for instruction, text, references, turns in zip(*columns, conversations, strict=True)
    ]


def _batch(
    schema: pa.Schema,
    encoded: Sequence[EncodedRow],
    references: pa.ChunkedArray,
    keep: npt.NDArray[np.bool_],
) -> pa.RecordBatch:
    rows = [row for row in encoded if row.answer_ids]
    return pa.record_batch(
        [
            _lists([row.prompt_ids for row in rows], schema.field("prompt").type),
            _lists([row.answer_ids for row in rows], schema.field("answer").type),
            references.filter(pa.array(keep)).combine_chunks(),
            _lists([row.prompt_targets for row in rows], schema.field(TARGETS).type),
        ],
        schema=schema,
    )


def _lists(rows: Sequence[Sequence[int]], type_: pa.ListType) -> pa.ListArray:
    """Return lists of numbers as an Arrow array, ten times faster than Arrow's own conversion."""
    flat = array("H" if type_.value_type == pa.uint16() else "i")
    for row in rows:
        flat.extend(row)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = pa.array(np.frombuffer(flat, dtype=flat.typecode), type_.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), values)
