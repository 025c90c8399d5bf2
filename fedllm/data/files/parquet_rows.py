"""Parquet files as rows."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fedllm.data.blocks import RowBlock, row_number
from fedllm.data.columns import columns_to_read
from fedllm.data.row_formats import RowColumns
from fedllm.errors import DataError


def peek_parquet(file: Path) -> dict[str, bool] | None:
    """Return the columns of a file and whether they hold lists; None for a file without rows.

    Raises:
        DataError: it is not a parquet file.
    """
    try:
        with pq.ParquetFile(file) as opened:
            schema, rows = opened.schema_arrow, opened.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error
    return nested_columns(schema) if rows else None


def nested_columns(schema: pa.Schema) -> dict[str, bool]:
    """Return the columns of a schema and whether they hold lists."""
    return {field.name: pa.types.is_nested(field.type) for field in schema}


def read_parquet(file: Path, columns: RowColumns) -> Iterator[RowBlock]:
    """Yield the rows of a parquet file in one block: Arrow's tables take little memory.

    Raises:
        DataError: it is not a parquet file, or a column is missing.
    """
    try:
        schema = pq.read_schema(file)
        columns.check(schema.names, str(file))
        table = pq.read_table(file, columns=columns_to_read(schema, columns))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error
    names = tuple(schema.names)
    yield RowBlock(table=table, names=names, where=str(file), place=row_number)


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"data.path: {file} cannot be read as parquet ({error})")
