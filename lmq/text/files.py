"""Files of text: plain, JSON, JSON lines and Parquet, compressed or not."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lmq.errors import InputError
from lmq.text.rows import text_column, texts_of_rows, without_lone_surrogates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLAIN = ("", ".txt", ".text", ".raw", ".tokens", ".md", ".rst")
_LINES = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_READ_ERRORS = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException)


def text_format(path: Path) -> tuple[str, str]:
    """Suffixes of the text and of its compression, in lower case: (".jsonl", ".gz"); "" for none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSED else ""
    return (suffixes[-1] if suffixes else ""), compression


def read_text_file(
    path: Path, column: str, tokenizer: PreTrainedTokenizerBase | None, *, paragraphs: bool, instead: str
) -> list[str]:
    """The texts of a file; of a plain one its whole text, or its `paragraphs`.

    Raises InputError for a file that is damaged or of no format that is read; `instead` says what to pass.
    """
    suffix, compression = text_format(path)
    if suffix not in (*_PLAIN, *_LINES, ".json", ".parquet"):
        raise InputError(f"{str(path)!r} is not a text file that lmq reads; {instead}, or dataset:ORG/NAME")
    if suffix == ".parquet":
        return _parquet_texts(path, column, tokenizer)
    text = _decoded(path, compression)
    if suffix == ".json":
        return _record_texts(path, _json_records(path, text), column, tokenizer)
    if suffix in _LINES:
        return _record_texts(path, list(_line_records(path, text)), column, tokenizer)
    text = without_lone_surrogates(text)
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()] if paragraphs else [text]


def _decoded(path: Path, compression: str) -> str:
    try:
        content = path.read_bytes()
        if compression == ".zst":
            with pa.input_stream(pa.BufferReader(content), compression="zstd") as stream:
                content = stream.read()
        elif compression:
            content = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[compression].decompress(content)
    except _READ_ERRORS as error:
        raise InputError(f"{path} cannot be read: {error}; is it whole?") from error
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}; convert it, or pass a .jsonl or .parquet file") from error


def _line_records(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InputError(f"{path} line {number} is not JSON: {error}") from error


def _json_records(path: Path, text: str) -> list[Any]:
    """Records of an array, of the one array that an object holds, or of lines, which also go by this suffix."""
    try:
        content = json.loads(text)
    except ValueError as error:
        if text.count("\n") > 1 and text.lstrip().startswith("{"):
            return list(_line_records(path, text))
        raise InputError(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict):
        arrays = [value for value in content.values() if isinstance(value, list)]
        content = arrays[0] if len(arrays) == 1 else [content]
    if not isinstance(content, list):
        raise InputError(f"{path} holds {type(content).__name__}, not an array of texts or of objects with a text")
    return content


def _record_texts(path: Path, records: list[Any], column: str, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Texts of objects with the column; strings and conversations in the place of objects are texts themselves."""
    objects = [record for record in records if isinstance(record, dict)]
    if objects:
        columns = dict.fromkeys(name for record in objects for name in record)
        column = text_column(columns, column, str(path))
    values = [record.get(column) if isinstance(record, dict) else record for record in records]
    return texts_of_rows(values, column, str(path), tokenizer)


def _parquet_texts(path: Path, column: str, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    try:
        with pq.ParquetFile(path) as file:
            fields = {field.name: field.type for field in file.schema_arrow}
            column = text_column(fields, column, str(path))
            if not _may_hold_text(fields[column]):
                raise InputError(f"column {column!r} of {path} holds {fields[column]}, not text; set `column`")
            values = file.read(columns=[column]).column(column).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}") from error
    return texts_of_rows(values, column, str(path), tokenizer)


def _may_hold_text(kind: pa.DataType) -> bool:
    """Strings of every kind (long, views, categories), and lists, which may be conversations."""
    if pa.types.is_dictionary(kind):
        return _may_hold_text(kind.value_type)
    strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return strings or pa.types.is_list(kind) or pa.types.is_large_list(kind)
