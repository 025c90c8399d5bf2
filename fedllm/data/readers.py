"""Readers: from `data.path` to tables of canonical columns, one per split.

A reader is a function from files to a table; `FORMATS` is the whole list. Where there is no test
split, `data.test_fraction` of every client's rows becomes one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fedllm.config.models import ColumnsSection, DataSection
from fedllm.data.columns import canonical, check_columns, needed_columns, split_rows
from fedllm.data.embedded import embedded_rows
from fedllm.data.huggingface import (
    fetch_dataset,
    has_test_split,
    is_saved_dataset,
    read_saved_dataset,
)
from fedllm.data.json_files import read_json, read_json_lines
from fedllm.errors import DataError
from fedllm.storage.fingerprints import fingerprint_files, fingerprint_values
from fedllm.storage.paths import CachePaths

SPLITS = ("train", "validation", "test")
EMBEDDED = "embedded"

Tables = dict[str, pa.Table]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows come from; `read` gives a table of canonical columns per split."""

    fingerprint: str
    read: Callable[[], Tables]


@dataclass(frozen=True, kw_only=True)
class _Raw:
    """Tables with the user's columns, of the splits that there are."""

    fingerprint: str
    has_test: bool
    read: Callable[[], Tables]


def open_source(section: DataSection, cache: CachePaths, split_seed: int) -> Source:
    """Find the data that a configuration names; nothing is read yet but for its fingerprint.

    Args:
        section: path, columns and test fraction.
        cache: where a data set of the Hugging Face hub is fetched to, once.
        split_seed: decides the test rows where the data have no test split.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    raw = _find(section, cache)
    columns = section.columns if section.path != EMBEDDED else ColumnsSection()

    def read() -> Tables:
        tables = {
            split: canonical(table, columns, f"{section.path} ({split})")
            for split, table in raw.read().items()
        }
        if not raw.has_test:
            tables |= split_rows(tables["train"], section.test_fraction, split_seed)
        return tables

    made = () if raw.has_test else (section.test_fraction, split_seed)
    fingerprint = fingerprint_values(raw.fingerprint, columns.model_dump(), made)
    return Source(fingerprint=fingerprint, read=read)


def _find(section: DataSection, cache: CachePaths) -> _Raw:
    if section.path == EMBEDDED:
        return _embedded(section)
    path = Path(section.path).expanduser()
    if not path.exists():
        path = fetch_dataset(section.path, section.revision, cache)
    if path.is_dir() and is_saved_dataset(path):
        return _Raw(
            fingerprint=fingerprint_files(_files_below(path), path),
            has_test=has_test_split(path),
            read=lambda: read_saved_dataset(path),
        )
    files = _files_of(path)
    return _Raw(
        fingerprint=fingerprint_files(
            [file for split in files.values() for file in split],
            path if path.is_dir() else path.parent,
        ),
        has_test="test" in files,
        read=lambda: {split: _joined(found, section.columns) for split, found in files.items()},
    )


def _joined(files: Sequence[Path], columns: ColumnsSection) -> pa.Table:
    tables = [FORMATS[file.suffix](file, columns) for file in files]
    return pa.concat_tables(tables, promote_options="permissive")


def _embedded(section: DataSection) -> _Raw:
    rows = list(embedded_rows(section.embedded_clients, section.embedded_rows))
    columns = {
        "client_id": [row.client for row in rows],
        "category": [row.category for row in rows],
        "instruction": [row.instruction for row in rows],
        "input": [row.input for row in rows],
        "output": [row.output for row in rows],
    }
    return _Raw(
        fingerprint=fingerprint_values(columns),
        has_test=False,
        read=lambda: {"train": pa.table(columns)},
    )


def _files_below(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _files_of(path: Path) -> dict[str, list[Path]]:
    """Return the files of each split: `train.jsonl`, or the parts `train-*.jsonl`."""
    if path.is_file():
        if path.suffix not in FORMATS:
            raise DataError(f"data.path: {path} is no {' or '.join(FORMATS)} file; convert it")
        return {"train": [path]}
    found = {split: _files_of_split(path, split) for split in SPLITS}
    if not found["train"]:
        here = sorted(file.name for file in path.iterdir())
        shown = ", ".join(here[:6]) + (", ..." if len(here) > 6 else "") or "nothing"
        raise DataError(
            f"data.path: {path} holds {shown}; need train.parquet or train.jsonl (and, if there "
            "are any, validation.* and test.*), or a saved Hugging Face dataset"
        )
    return {split: files for split, files in found.items() if files}


def _files_of_split(folder: Path, split: str) -> list[Path]:
    for suffix in FORMATS:
        whole = folder / f"{split}{suffix}"
        if whole.is_file():
            return [whole]
        parts = sorted(folder.glob(f"{split}-*{suffix}"))
        if parts:
            return parts
    return []


def _read_parquet(file: Path, columns: ColumnsSection) -> pa.Table:
    try:
        schema = pq.read_schema(file)
        check_columns(schema.names, columns, str(file))
        return pq.read_table(file, columns=needed_columns(schema, columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"data.path: {file} cannot be read as parquet ({error})") from error


FORMATS: Mapping[str, Callable[[Path, ColumnsSection], pa.Table]] = {
    ".parquet": _read_parquet,
    ".jsonl": read_json_lines,
    ".json": read_json,
}
