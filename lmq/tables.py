"""Parquet tables with a declared, versioned schema; the same rows always give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lmq.errors import DamagedFile


@dataclass(frozen=True)
class TableSchema:
    """Name, version and columns of one kind of table. A change of columns takes a new version."""

    name: str
    version: int
    columns: pa.Schema

    @property
    def label(self) -> str:
        """`name/version`, as written into the file's metadata."""
        return f"{self.name}/{self.version}"


SPEC_FIELDS = (
    pa.field("bits", pa.int32(), nullable=False),
    pa.field("group_size", pa.int32(), nullable=False),
    pa.field("meta_bits", pa.int32(), nullable=False),
    pa.field("meta_group_size", pa.int32(), nullable=False),
)
MODULE_FIELDS = (
    pa.field("layer", pa.int32(), nullable=False),
    pa.field("kind", pa.string(), nullable=False),
)


def write_rows(path: Path, schema: TableSchema, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a list of rows; a value that was not measured is None, never 0."""
    write_table(path, schema, pa.Table.from_pylist(list(rows), schema=schema.columns))


def write_table(path: Path, schema: TableSchema, table: pa.Table) -> None:
    """Write a table that has the declared columns."""
    labelled = table.cast(schema.columns).replace_schema_metadata({"lmq.schema": schema.label})
    pq.write_table(
        labelled,
        path,
        compression="zstd",
        use_dictionary=["kind"] if "kind" in table.column_names else False,
        write_page_checksum=True,
    )


def read_table(path: Path, schema: TableSchema) -> pa.Table:
    """Read a table, checking that it is one of this schema. Raises DamagedFile otherwise."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        stored = (table.schema.metadata or {}).get(b"lmq.schema", b"none").decode()
        columns = table.column_names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedFile(
            f"{path} is not a readable Parquet table: {error}; remove it, it will be made again"
        ) from error
    if stored != schema.label:
        raise DamagedFile(
            f"{path} holds a table {stored!r} where {schema.label!r} was expected; remove it and run again"
        )
    if columns != schema.columns.names:
        raise DamagedFile(f"{path} has columns {columns}, not {schema.columns.names}; remove it and run again")
    return table


def read_rows(path: Path, schema: TableSchema) -> list[dict[str, Any]]:
    """Read a table as a list of rows."""
    return read_table(path, schema).to_pylist()
