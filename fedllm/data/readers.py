"""Readers: from `data.path` to tables of canonical columns, one per split.

Every kind of file has two functions: one looks at its first rows, one reads all rows in blocks.
`FILE_KINDS` lists them all. If there is no test split, `data.test_fraction` of every client's rows
becomes the test split.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import pyarrow as pa

from fedllm.config.models import ColumnsSection, DataSection
from fedllm.data.blocks import RowBlock, row_number
from fedllm.data.columns import canonical_block, columns_to_read, split_rows
from fedllm.data.files.csv_rows import peek_csv, read_csv
from fedllm.data.files.json_objects import peek_json, read_json
from fedllm.data.files.parquet_rows import nested_columns, peek_parquet, read_parquet
from fedllm.data.files.splits import TEST, TRAIN, VALIDATION, kind_of, shorten_files, split_files
from fedllm.data.huggingface import fetch_dataset, is_saved_dataset, read_saved_dataset
from fedllm.data.partitions import COLUMN, partition_tables
from fedllm.data.row_formats import RowColumns, detect_format, row_columns, shorten_names
from fedllm.embedded.embedded_clients import embedded_rows
from fedllm.errors import DataError
from fedllm.storage.fingerprints import fingerprint_files, fingerprint_values
from fedllm.storage.paths import CachePaths

EMBEDDED = "embedded"

Tables = dict[str, pa.Table]
# the columns of some rows, and whether they hold lists; None: there are no rows
Peek = dict[str, bool] | None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Source of rows; `read` returns a table of canonical columns per split.

    `notes` are lines for the user about format, splits and what is not read. `files` are those that
    hold the rows.
    """

    fingerprint: str
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    read: Callable[[], Tables]


@dataclass(frozen=True, kw_only=True)
class _FileKind:
    peek: Callable[[Path], Peek]
    read: Callable[[Path, RowColumns], Iterator[RowBlock]]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Rows of one split from one place: a file, or a split of a saved data set."""

    split: str
    name: str
    peek: Callable[[], Peek]
    read: Callable[[RowColumns], Iterator[RowBlock]]


@dataclass(frozen=True, kw_only=True)
class _RawSource:
    """All parts with the user's columns; `unread` names files that look like rows too."""

    path: str
    fingerprint: str
    files: Sequence[Path]
    parts: Sequence[_Part]
    unread: str = ""


def open_source(section: DataSection, cache: CachePaths, split_seed: int) -> Source:
    """Find the data that a configuration names; reads their fingerprint and first rows only.

    Args:
        section: path, format, columns and test fraction.
        cache: holds data sets of the Hugging Face hub, each fetched once.
        split_seed: decides the test rows if the data have no test split.

    Raises:
        DataError: there are no data, they cannot be read, or their rows have two formats.
    """
    source = _find_raw(section, cache)
    column_section = section.columns if section.path != EMBEDDED else ColumnsSection()
    partition = section.partition
    has_clients = partition.kind == COLUMN
    if not has_clients:
        column_section = column_section.model_copy(update={"client": None})
    peeks = [part.peek() for part in source.parts]
    used = [part for part, peek in zip(source.parts, peeks, strict=True) if peek is not None]
    empty = [part for part, peek in zip(source.parts, peeks, strict=True) if peek is None]
    if not any(part.split == TRAIN for part in used):
        names = ", ".join(part.name for part in empty if part.split == TRAIN)
        raise DataError(
            f"data.path: {source.path} has no rows to train on ({names} is empty); add rows"
        )
    columns = row_columns(_one_format(section, source, peeks, column_section), column_section)
    has_test = any(part.split == TEST for part in used)
    split_values = () if has_test else (section.test_fraction, split_seed)

    def read() -> Tables:
        tables = _read(used, columns)
        if not has_clients:
            tables = partition_tables(tables, partition)
        if not has_test:
            tables |= split_rows(tables[TRAIN], section.test_fraction, split_seed)
        _check_spellings(tables, section.path)
        # a small fraction, or one row per client, can give no test rows
        return {split: table for split, table in tables.items() if table.num_rows}

    is_embedded = section.path == EMBEDDED
    notes = () if is_embedded else _notes(source, used, empty, columns, section, peeks)
    return Source(
        fingerprint=fingerprint_values(
            *(source.fingerprint, column_section.model_dump(), split_values, columns.format),
            *(() if has_clients else (partition.model_dump(),)),
        ),
        files=tuple(source.files),
        notes=notes,
        read=read,
    )


def columns_of(section: DataSection, cache: CachePaths) -> list[str]:
    """Return the columns of the data, as the first rows of all its files have them.

    Raises:
        DataError: there are no data, or they cannot be read.
    """
    peeks = (part.peek() or () for part in _find_raw(section, cache).parts)
    return list(dict.fromkeys(chain.from_iterable(peeks)))


def _one_format(
    section: DataSection, source: _RawSource, peeks: Sequence[Peek], column_section: ColumnsSection
) -> str:
    formats: dict[str, str] = {}
    for part, peek in zip(source.parts, peeks, strict=True):
        if peek is not None:
            formats.setdefault(
                detect_format(section.format, peek, column_section, part.name), part.name
            )
    if len(formats) > 1:
        (one, here), (two, there), *_ = formats.items()
        raise DataError(
            f"data.format: {here} holds rows of {one}, {there} of {two}; convert them, or give "
            "each format a run of its own"
        )
    return next(iter(formats))


def _read(parts: Sequence[_Part], columns: RowColumns) -> Tables:
    """Return the canonical tables of all parts, joined by split."""
    blocks: dict[str, list[pa.Table]] = {}
    names: dict[str, dict[str, dict[str, None]]] = {}
    for part in parts:
        for block in part.read(columns):
            blocks.setdefault(part.split, []).append(canonical_block(block, columns))
            part_columns = names.setdefault(part.split, {}).setdefault(part.name, {})
            part_columns.update(dict.fromkeys(block.names))
    for by_part in names.values():
        columns.check(
            list(dict.fromkeys(chain.from_iterable(by_part.values()))), ", ".join(by_part)
        )
        for name, part_columns in by_part.items():
            columns.check_part(list(part_columns), name)
    # an integer column that only some blocks have is null in the others
    return {
        split: pa.concat_tables(tables, promote_options="permissive")
        for split, tables in blocks.items()
    }


def _check_spellings(tables: Tables, path: str) -> None:
    """Raise an error if two clients are one number in two spellings, such as 3 and 3.0 as text.

    Each of the two would have only a part of the rows.
    """
    clients = set().union(*(table["client"].unique().to_pylist() for table in tables.values()))
    for client in sorted(clients):
        whole = re.fullmatch(r"([0-9]+)\.0*", client)
        if whole and whole[1] in clients:
            raise DataError(
                f"data.columns.client: {path} has the clients {whole[1]} and {client} (as text); "
                "write one client the same way in all rows"
            )


def _notes(
    source: _RawSource,
    used: Sequence[_Part],
    empty: Sequence[_Part],
    columns: RowColumns,
    section: DataSection,
    peeks: Sequence[Peek],
) -> tuple[str, ...]:
    """Return lines about the format, the splits and what is left out."""
    splits = []
    for split in (TRAIN, VALIDATION, TEST):
        names = [part.name for part in used if part.split == split]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            splits.append(f"{split} {names[0]}{more}")
    if not any(part.split == TEST for part in used):
        share = f"{section.test_fraction:.0%} of each client's training rows"
        splits.append(
            f"test {share}, since there is no test file" if section.test_fraction else "no test"
        )
    lines = [f"data: rows of format {columns.format}; {', '.join(splits)}"]
    if empty:
        lines.append(f"data: without rows, left out: {', '.join(part.name for part in empty)}")
    names_of_columns = dict.fromkeys(chain.from_iterable(peek or () for peek in peeks))
    unused = [name for name in names_of_columns if name not in columns.readable]
    if unused:
        lines.append(f"data: columns that no prompt and no answer has: {shorten_names(unused)}")
    if source.unread:
        lines.append(f"data: not read: {source.unread}")
    return tuple(lines)


def _find_raw(section: DataSection, cache: CachePaths) -> _RawSource:
    if section.path == EMBEDDED:
        return _embedded(section)
    path = Path(section.path).expanduser()
    if not path.exists():
        path = fetch_dataset(section.path, section.revision, cache)
    if path.is_dir() and is_saved_dataset(path):
        return _saved(path, section.path)
    if path.is_dir():
        return _folder(path)
    if kind_of(path) not in FILE_KINDS:
        raise DataError(f"data.path: {path} is not a {' or '.join(FILE_KINDS)} file; convert it")
    fingerprint = fingerprint_files([path], path.parent)
    part = _file_part(TRAIN, path, path.parent)
    return _RawSource(path=section.path, fingerprint=fingerprint, files=[path], parts=[part])


def _folder(folder: Path) -> _RawSource:
    found = split_files(folder, FILE_KINDS)
    parts = [
        _file_part(split, file, folder) for split, files in found.splits.items() for file in files
    ]
    files = [file for split in found.splits.values() for file in split]
    return _RawSource(
        path=str(folder),
        fingerprint=fingerprint_files(files, folder),
        files=files,
        parts=parts,
        unread=shorten_files(found.unread, folder),
    )


def _file_part(split: str, file: Path, folder: Path) -> _Part:
    kind = FILE_KINDS[kind_of(file)]
    return _Part(
        split=split,
        name=str(file.relative_to(folder)),
        peek=partial(kind.peek, file),
        read=partial(kind.read, file),
    )


def _saved(folder: Path, name: str) -> _RawSource:
    saved, files = read_saved_dataset(folder), _files_below(folder)
    return _RawSource(
        path=name,
        fingerprint=fingerprint_files(files, folder),
        files=files,
        parts=[_table_part(split, table, str(folder)) for split, table in saved.tables.items()],
        unread=", ".join(saved.unread),
    )


def _embedded(section: DataSection) -> _RawSource:
    rows = list(embedded_rows(section.embedded_clients, section.embedded_rows))
    columns = {
        "client_id": [row.client for row in rows],
        "category": [row.category for row in rows],
        "instruction": [row.instruction for row in rows],
        "input": [row.input for row in rows],
        "output": [row.output for row in rows],
    }
    return _RawSource(
        path=EMBEDDED,
        fingerprint=fingerprint_values(columns),
        files=(),
        parts=[_table_part(TRAIN, pa.table(columns), EMBEDDED)],
    )


def _table_part(split: str, table: pa.Table, where: str) -> _Part:
    block = RowBlock(
        table=table,
        names=tuple(table.column_names),
        where=f"{where} ({split})",
        place=row_number,
    )

    def read(columns: RowColumns) -> Iterator[RowBlock]:
        columns.check(block.names, f"{where} ({split})")
        yield replace(block, table=table.select(columns_to_read(table.schema, columns)))

    peek = nested_columns(table.schema) if table.num_rows else None
    return _Part(split=split, name=f"split {split}", peek=lambda: peek, read=read)


def _files_below(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


FILE_KINDS: Mapping[str, _FileKind] = {
    ".parquet": _FileKind(peek=peek_parquet, read=read_parquet),
    **dict.fromkeys(
        (".jsonl", ".json", ".ndjson", ".jsonlines"), _FileKind(peek=peek_json, read=read_json)
    ),
    ".csv": _FileKind(peek=partial(peek_csv, delimiter=","), read=partial(read_csv, delimiter=",")),
    ".tsv": _FileKind(
        peek=partial(peek_csv, delimiter="\t"), read=partial(read_csv, delimiter="\t")
    ),
}
