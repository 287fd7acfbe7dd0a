import contextlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmq.errors import DamagedFile
from lmq.tables import MODULE_FIELDS, TableSchema, read_rows, read_table, write_rows, write_table

SCHEMA = TableSchema("costs", 2, pa.schema([*MODULE_FIELDS, pa.field("cost", pa.float64())]))
ROWS = [{"layer": layer, "kind": kind, "cost": layer / 3} for layer in range(40) for kind in ("q_proj", "o_proj")]


def test_rows_are_read_back_and_what_was_not_measured_is_null(tmp_path: Path) -> None:
    rows = [*ROWS, {"layer": 40, "kind": "q_proj", "cost": None}]
    write_rows(tmp_path / "table.parquet", SCHEMA, rows)
    assert read_rows(tmp_path / "table.parquet", SCHEMA) == rows
    table = pq.read_table(tmp_path / "table.parquet")
    assert table.schema.metadata[b"lmq.schema"] == b"costs/2"
    assert table.column("cost").null_count == 1


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", SCHEMA, ROWS)
    write_table(tmp_path / "table.parquet", SCHEMA, pa.Table.from_pylist(ROWS, schema=SCHEMA.columns))
    assert (tmp_path / "rows.parquet").read_bytes() == (tmp_path / "table.parquet").read_bytes()


def test_a_table_without_rows_keeps_its_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "table.parquet", SCHEMA, [])
    assert read_table(tmp_path / "table.parquet", SCHEMA).column_names == ["layer", "kind", "cost"]


@pytest.mark.parametrize("other", [TableSchema("costs", 1, SCHEMA.columns), TableSchema("sizes", 2, SCHEMA.columns)])
def test_a_table_of_another_schema_is_refused(other: TableSchema, tmp_path: Path) -> None:
    write_rows(tmp_path / "table.parquet", SCHEMA, ROWS)
    with pytest.raises(DamagedFile, match=f"holds a table 'costs/2' where '{other.label}' was expected; remove it"):
        read_table(tmp_path / "table.parquet", other)


def test_a_table_of_another_program_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "table.parquet")
    with pytest.raises(DamagedFile, match="holds a table 'none'"):
        read_table(tmp_path / "table.parquet", SCHEMA)


@pytest.mark.parametrize("length", [0, 3, 100, -1, -30])
def test_a_truncated_file_is_named(length: int, tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    write_rows(path, SCHEMA, ROWS)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedFile, match=r"table\.parquet is not a readable Parquet table"):
        read_table(path, SCHEMA)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match=r"nowhere\.parquet is not a readable Parquet table"):
        read_table(tmp_path / "nowhere.parquet", SCHEMA)


def test_a_changed_value_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    write_rows(path, SCHEMA, ROWS)
    data = path.read_bytes()
    assert data.count(b"q_proj") > 0
    path.write_bytes(data.replace(b"q_proj", b"k_proj", 1))
    with pytest.raises(DamagedFile, match="could not verify page integrity"):
        read_rows(path, SCHEMA)


@pytest.mark.parametrize("byte", [*range(0, 1200, 37), 548, 560, 1013])
def test_a_flipped_byte_crashes_no_reader(byte: int, tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    write_rows(path, SCHEMA, ROWS)
    data = bytearray(path.read_bytes())
    data[byte] ^= 0xFF
    path.write_bytes(data)
    with contextlib.suppress(DamagedFile):
        read_rows(path, SCHEMA)


def test_a_null_where_none_is_allowed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'layer' with null values to non-nullable"):
        write_rows(tmp_path / "table.parquet", SCHEMA, [{"layer": None, "kind": "q_proj", "cost": 1.0}])
