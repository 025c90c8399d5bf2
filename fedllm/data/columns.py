"""Columns: from a user's table to canonical columns, the same for every format.

The canonical columns are `client`, `category`, `instruction`, `input` (text) and `references` (a
list of texts; the first is the answer to train). Conversations also have `turns`. The user's
integer columns are kept as `integer.<name>`, because `clients.held_out_from` may name them.

A missing value (null, NaN) becomes an empty text; in references it is omitted; a missing client is
refused. A client that is a number has to be whole: 3 and 3.0 are the same client.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fedllm.data.blocks import Place, RowBlock
from fedllm.data.conversations import TURN_LISTS, answers, turn_lists
from fedllm.data.row_formats import SYSTEM, RowColumns
from fedllm.data.turns import TURNS
from fedllm.errors import DataError
from fedllm.planning.seeding import seed_of
from fedllm.storage.hub import first_line

INTEGER_PREFIX = "integer."

# above this, one floating point number stands for several integers
_LARGEST_EXACT = 2**53
# conversations turned into Python objects at a time
_BLOCK_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class ClientRows:
    """Rows of one client, as indices into a table, in the table's order."""

    client: str
    indices: npt.NDArray[np.int64]


def canonical_block(block: RowBlock, columns: RowColumns) -> pa.Table:
    """Return the canonical columns of a block; ids become text, missing text is empty.

    Raises:
        DataError: a column holds neither text nor numbers, a client is missing or is a number
            that is not whole, or `turn_lists` refuses a conversation.
    """
    names = columns.names
    arrays = {
        # a partition names the clients of rows without any
        "client": _texts(block, "client", None)
        if names.client is None
        else _clients(block, names.client),
        "category": _texts(block, "category", names.category),
        "instruction": _texts(block, "instruction", names.instruction),
        "input": _texts(block, "input", names.input),
    }
    if columns.conversations:
        arrays[TURNS] = _turns(block, names.output)
        arrays["references"] = answers(arrays[TURNS])
    else:
        arrays["references"] = _references(block, names.output)
    for name in block.table.column_names:
        integers = _integers(block.table[name])
        if integers is not None:
            arrays[INTEGER_PREFIX + name] = integers
    return pa.table(arrays)


def client_text(value: Any) -> str | None:
    """Return a client's id as text; None for a number that is not whole or too large."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < _LARGEST_EXACT else None
    if isinstance(value, Decimal):
        return str(int(value)) if value == value.to_integral_value() else None
    return str(value)


def client_error(value: Any, where: str) -> DataError:
    """Return the error about a number that cannot name a client."""
    return DataError(
        f"data.columns.client: {where}: {value} is not a whole number below 2**53; name "
        "clients by whole numbers or by text"
    )


def client_texts(indices: pa.Array, values: Sequence[Any], where: str, place: Place) -> pa.Array:
    """Return the clients' ids as text: for every index, the value that it points to.

    Raises:
        DataError: a value is a number that is not whole (with the place of its first row).
    """
    texts = [client_text(value) for value in values]
    if None in texts:
        bad = texts.index(None)
        index = pc.index(indices, pa.scalar(bad, indices.type)).as_py()
        raise client_error(values[bad], f"{where} {place(index)}")
    return pa.array(texts, pa.large_string()).take(indices)


def columns_to_read(schema: pa.Schema, columns: RowColumns) -> list[str]:
    """Return the columns that `canonical_block` reads; readers can skip all others."""
    return [
        schema.field(place).name
        for place in uniquely_named(schema)
        if schema.field(place).name in columns.readable or pa.types.is_integer(schema.types[place])
    ]


def uniquely_named(schema: pa.Schema) -> list[int]:
    """Return the places of the columns whose name is not empty and occurs once."""
    counts = Counter(schema.names)
    return [place for place, name in enumerate(schema.names) if name and counts[name] == 1]


def rows_by_client(table: pa.Table) -> Iterator[ClientRows]:
    """Yield the rows of every client, clients in canonical order."""
    encoded = pc.dictionary_encode(table["client"].combine_chunks())
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(encoded.dictionary) + 1))
    names: list[str] = encoded.dictionary.to_pylist()
    for code in sorted(range(len(names)), key=names.__getitem__):
        yield ClientRows(client=names[code], indices=order[starts[code] : starts[code + 1]])


def split_rows(table: pa.Table, fraction: float, seed: int) -> dict[str, pa.Table]:
    """Split rows into train and test; test gets a seeded, rounded `fraction` of every client.

    A client with two rows or more has at least one in train and, if `fraction` is above zero, one
    in test. A client's only row is in train.
    """
    is_test = np.zeros(table.num_rows, dtype=bool)
    for rows in rows_by_client(table):
        count = len(rows.indices)
        num_test = min(count - 1, max(1, round(fraction * count))) if fraction else 0
        draw = random.Random(seed_of("test rows", seed, rows.client))
        is_test[rows.indices[draw.sample(range(count), num_test)]] = True
    return {"train": table.filter(pa.array(~is_test)), "test": table.filter(pa.array(is_test))}


def _clients(block: RowBlock, name: str) -> pa.ChunkedArray:
    values = _decoded_type(block.table[name])
    if pa.types.is_floating(values.type):
        values = values.cast(pa.float64())
        values = pc.if_else(pc.is_nan(values), None, values)
    if pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
        encoded = pc.dictionary_encode(values.combine_chunks())
        distinct = encoded.dictionary.to_pylist()
        texts = client_texts(encoded.indices, distinct, block.where, block.place)
        clients = pa.chunked_array([texts])
    else:
        clients = _as_text(values, block, "client", name)
    missing = pc.fill_null(pc.equal(clients, ""), True)
    count = pc.sum(missing).as_py() or 0
    if count:
        first = block.place(pc.index(missing, True).as_py())
        raise DataError(
            f"data.columns.client: {block.where} {first} has no `{name}`"
            f"{f', nor have {count - 1:,} other rows' if count > 1 else ''}; give every row its "
            "client"
        )
    return clients


def _texts(block: RowBlock, key: str, name: str | None) -> pa.ChunkedArray:
    if name is None:
        empty = pa.repeat(pa.scalar("", pa.large_string()), block.table.num_rows)
        return pa.chunked_array([empty])
    return pc.fill_null(_as_text(_decoded_type(block.table[name]), block, key, name), "")


def _references(block: RowBlock, name: str) -> pa.ChunkedArray:
    """Return the list of every row's answers that are not empty."""
    lists = pa.list_(pa.large_string())
    chunks = []
    for chunk in _decoded_type(block.table[name]).chunks:
        owners, items = np.arange(len(chunk)), chunk
        if _is_list(chunk.type):
            owners, items = pc.list_parent_indices(chunk).to_numpy(), pc.list_flatten(chunk)
        values = _decoded_type(pa.chunked_array([items]))
        texts = _as_text(values, block, "output", name).combine_chunks()
        kept = pc.fill_null(pc.not_equal(texts, ""), False)
        counts = np.bincount(owners[kept.to_numpy(zero_copy_only=False)], minlength=len(chunk))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets), texts.filter(kept)))
    return pa.chunked_array(chunks, type=lists)


def _turns(block: RowBlock, name: str) -> pa.ChunkedArray:
    values = block.table[name]
    if block.has_turns:
        return values
    systems = block.table[SYSTEM] if SYSTEM in block.table.column_names else None
    chunks = [
        turn_lists(
            values.slice(start, _BLOCK_ROWS).to_pylist(),
            None if systems is None else systems.slice(start, _BLOCK_ROWS).to_pylist(),
            block.where,
            partial(_offset_place, block.place, start),
        )
        for start in range(0, len(values), _BLOCK_ROWS)
    ]
    return pa.chunked_array(chunks, type=TURN_LISTS)


def _offset_place(place: Place, start: int, index: int) -> str:
    return place(start + index)


def _integers(values: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Return a column of integers as int64; None for other columns or too large integers."""
    values = _decoded_type(values)
    if not pa.types.is_integer(values.type):
        return None
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid:
        return None


def _decoded_type(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the values of an extension type or a dictionary as their plain Arrow type."""
    if isinstance(values.type, pa.BaseExtensionType):
        values = pa.chunked_array([c.storage for c in values.chunks], values.type.storage_type)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values


def _as_text(values: pa.ChunkedArray, block: RowBlock, key: str, name: str) -> pa.ChunkedArray:
    """Return values as text; null stays null, NaN and infinite numbers become null."""
    where = f"data.columns.{key}: column `{name}` of {block.where}"
    type_ = values.type
    if pa.types.is_nested(type_) or _is_binary(type_):
        raise DataError(f"{where} holds {type_}, need text or numbers")
    if pa.types.is_floating(type_):
        values = values.cast(pa.float32()) if pa.types.is_float16(type_) else values
        values = pc.if_else(pc.is_finite(values), values, None)
    try:
        texts = values.cast(pa.large_string())
        # Arrow's readers do not check that the bytes of a text are UTF-8
        texts.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{where} holds {type_} that is not text ({first_line(error)})") from error
    return texts


def _is_list(type_: pa.DataType) -> bool:
    kinds = pa.types
    tests = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list, kinds.is_list_view)
    return any(test(type_) for test in (*tests, kinds.is_large_list_view))


def _is_binary(type_: pa.DataType) -> bool:
    kinds = pa.types
    tests = (kinds.is_binary, kinds.is_large_binary, kinds.is_fixed_size_binary)
    return any(test(type_) for test in (*tests, kinds.is_binary_view))
