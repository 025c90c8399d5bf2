"""Columns: from a user's table to the columns that everything here works on.

The canonical columns are `client`, `category`, `instruction`, `input` (text) and `references`
(a list of text, whose first is the answer to train). The user's integer columns come along as
`integer.<name>`, because `clients.held_out_from` may ask for them.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fedllm.config.models import ColumnsSection
from fedllm.errors import DataError
from fedllm.planning.seeding import seed_of

INTEGER_PREFIX = "integer."
_OPTIONAL = {"category", "instruction", "input"}


@dataclass(frozen=True, kw_only=True)
class ClientRows:
    """Where the rows of one client are: indices into a table, in the table's order."""

    client: str
    indices: npt.NDArray[np.int64]


def canonical(raw: pa.Table, columns: ColumnsSection, where: str) -> pa.Table:
    """Return the canonical columns of a user's table; ids become text, missing text is empty.

    Raises:
        DataError: a column is missing or holds neither text nor numbers, or a client id is null.
    """
    check_columns(raw.column_names, columns, where)
    names: dict[str, str | None] = columns.model_dump()
    arrays = {
        key: _text(raw, name, f"data.columns.{key}")
        for key, name in names.items()
        if key in {"client", *_OPTIONAL}
    }
    if raw[columns.client].null_count:
        raise DataError(
            f"data.columns.client: {raw[columns.client].null_count} rows of {where} have no "
            f"`{columns.client}`; give every row its client"
        )
    arrays["references"] = _references(raw, columns.output)
    for field in raw.schema:
        if pa.types.is_integer(field.type):
            arrays[INTEGER_PREFIX + field.name] = raw[field.name].cast(pa.int64())
    return pa.table(arrays)


def check_columns(found: Sequence[str], columns: ColumnsSection, where: str) -> None:
    """Refuse data without a column that the configuration names.

    Raises:
        DataError: it names all that are missing, their keys and the columns there are.
    """
    missing = [
        f"data.columns.{key}: no column `{name}`"
        + (f" (null if there is none: data.columns.{key}=null)" if key in _OPTIONAL else "")
        for key, name in columns.model_dump().items()
        if name is not None and name not in found
    ]
    if missing:
        raise DataError(
            f"{'; '.join(missing)}; {where} has {', '.join(found)}: name the right one, for "
            "example --set data.columns.client=NAME"
        )


def needed_columns(schema: pa.Schema, columns: ColumnsSection) -> list[str]:
    """Return the names that `canonical` reads, for readers that can leave the others out."""
    named = set(columns.model_dump().values())
    return [f.name for f in schema if f.name in named or pa.types.is_integer(f.type)]


def rows_by_client(table: pa.Table) -> Iterator[ClientRows]:
    """Yield every client's rows, clients in canonical order."""
    encoded = pc.dictionary_encode(table["client"].combine_chunks())
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(encoded.dictionary) + 1))
    names: list[str] = encoded.dictionary.to_pylist()
    for code in sorted(range(len(names)), key=names.__getitem__):
        yield ClientRows(client=names[code], indices=order[starts[code] : starts[code + 1]])


def split_rows(table: pa.Table, fraction: float, seed: int) -> dict[str, pa.Table]:
    """Split rows into train and test: of every client a seeded `fraction`, rounded.

    A client with two rows or more has at least one in train and, where `fraction` is above zero,
    one in test; a client with one row has it in train.
    """
    is_test = np.zeros(table.num_rows, dtype=bool)
    for rows in rows_by_client(table):
        count = len(rows.indices)
        wanted = min(count - 1, max(1, round(fraction * count))) if fraction else 0
        draw = random.Random(seed_of("test rows", seed, rows.client))
        is_test[rows.indices[draw.sample(range(count), wanted)]] = True
    return {"train": table.filter(pa.array(~is_test)), "test": table.filter(pa.array(is_test))}


def _text(raw: pa.Table, name: str | None, key: str) -> pa.ChunkedArray:
    if name is None:
        return pa.chunked_array([pa.repeat(pa.scalar("", pa.large_string()), raw.num_rows)])
    values = raw[name]
    if pa.types.is_nested(values.type) or pa.types.is_binary(values.type):
        raise DataError(f"{key}: column `{name}` holds {values.type}, need text or numbers")
    return pc.fill_null(values.cast(pa.large_string()), "")


def _references(raw: pa.Table, name: str) -> pa.ChunkedArray:
    values = raw[name]
    wanted = pa.list_(pa.large_string())
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        if pa.types.is_nested(values.type.value_type):
            raise DataError(f"data.columns.output: column `{name}` holds {values.type}, need text")
        return pc.fill_null(values.cast(wanted), pa.scalar([], wanted))
    text = _text(raw, name, "data.columns.output")
    return pa.chunked_array([_one_each(chunk) for chunk in text.chunks], type=wanted)


def _one_each(chunk: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.arange(len(chunk) + 1, dtype=np.int32)), chunk)
