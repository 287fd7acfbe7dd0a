"""Where images and their labels come from: scikit-learn's digits, a folder, Parquet files, a data set.

An image is decoded when it is asked for, so that a set may be larger than memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lmq.errors import InputError, unknown_name
from lmq.model.source import nearest_sibling
from lmq.text.data_sets import PREFIX as DATA_SET
from lmq.text.data_sets import folder_digest, identify_data_set, load_data_set

if TYPE_CHECKING:
    from PIL.Image import Image

DIGITS = "digits"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_PARQUET = ".parquet"
_INSTEAD = f"pass a folder with a folder of images for each class, a .parquet file, dataset:NAME, or {DIGITS}"


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredImage:
    """An image as it is stored: a file, the bytes of one, or its grey values; `name` is what errors call it."""

    name: str
    content: Path | bytes | np.ndarray | Image | None

    def decoded(self) -> Image:
        """The image in RGB. Raises OSError or ValueError for what is no image."""
        from PIL import Image  # takes a moment

        content = self.content
        if content is None:
            raise ValueError("it is null")
        if isinstance(content, np.ndarray):
            return Image.fromarray(content).convert("RGB")
        if isinstance(content, Path | bytes):
            with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as opened:
                return opened.convert("RGB")
        return content.convert("RGB")


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSet:
    """Images with their labels, numbers of `classes`; classes that the source does not name are None."""

    images: Sequence[StoredImage]
    labels: Sequence[int] | None
    classes: tuple[str, ...] | None


def identify_images(source: str) -> tuple[str, str]:
    """What the content of a source is known by, and where it is read. Raises InputError for one that is not there."""
    if source == DIGITS:
        pixels, labels = _digits()
        return f"{DIGITS}@{hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()}", source
    if source.startswith(DATA_SET):
        return identify_data_set(source)
    path = _existing(source)
    if path.is_dir():
        return f"folder@{folder_digest(path)}", str(path)
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}", str(path)


def read_images(source: str, column: str = "image", label_column: str = "label") -> ImageSet:
    """The images of a source in its order; none is decoded yet.

    `digits` are the 1,797 handwritten digits of 8 × 8 grey values that scikit-learn carries. A folder has one folder of
    images for each class, in the order of their names, or images alone, or Parquet files. Of Parquet files and data
    sets `column` holds images (bytes, or `{bytes, path}`), `label_column` numbers or names of classes. Raises
    InputError for a source that is not there or holds no images.
    """
    if source == DIGITS:
        pixels, labels = _digits()
        images = [StoredImage(name=f"digit {number}", content=image) for number, image in enumerate(pixels)]
        return ImageSet(images=images, labels=labels.tolist(), classes=tuple(map(str, range(10))))
    if source.startswith(DATA_SET):
        return _of_data_set(source, column, label_column)
    path = _existing(source)
    if path.is_dir() and not (tables := sorted(path.rglob(f"*{_PARQUET}"))):
        return _of_folder(path)
    return _of_parquet(tables if path.is_dir() else [path], column, label_column)


def read_pairs(source: str, column: str, text_column: str) -> list[tuple[StoredImage, Any]]:
    """Images of a source and what `text_column` holds beside each, in its order; none is decoded yet.

    Raises InputError for a source that is not there, has no such columns, or is no Parquet file and no data set.
    """
    if source.startswith(DATA_SET):
        images, rows = _images_of_rows(source, column)
        _require(text_column, rows.column_names, source, "images.text_column")
        return list(zip(images, rows[text_column], strict=True))
    path = None if source == DIGITS else _existing(source)
    paths = [] if path is None else sorted(path.rglob(f"*{_PARQUET}")) if path.is_dir() else [path]
    if not paths:
        raise InputError(
            f"{source} has no texts beside its images; pass .parquet or dataset:NAME, or dataset:FOLDER for a folder "
            "with a metadata.jsonl of file_name and text"
        )
    found: list[tuple[StoredImage, Any]] = []
    for table in paths:
        _require(text_column, pq.read_schema(table).names, str(table), "images.text_column")
        found += zip(*_of_table(table, column, text_column), strict=True)
    return found


def _existing(source: str) -> Path:
    path = Path(source).expanduser().absolute()
    if path.is_dir() or (path.is_file() and path.suffix.lower() == _PARQUET):
        return path
    if path.exists():
        raise InputError(f"{path} is no folder and no Parquet file; {_INSTEAD}")
    if not path.suffix and "/" not in source:
        raise unknown_name("source of images", source, (DIGITS, "FOLDER", "FILE.parquet", "dataset:ORG/NAME"))
    raise InputError(f"there are no images {path}{nearest_sibling(path)}; {_INSTEAD}")


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Grey values uint8 [images, 8, 8], of which 16 levels are used, and labels int64 [images]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(f"{DIGITS} come with scikit-learn, which is not here; pip install 'lmq[vision]'") from error
    found: Any = load_digits()
    return np.rint(found.images * 255 / 16).astype(np.uint8), found.target.astype(np.int64)


def _of_folder(folder: Path) -> ImageSet:
    classes = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    found = [(file, number) for number, of_class in enumerate(classes) for file in _image_files(of_class)]
    if not found:
        files = list(_image_files(folder))
        if not files:
            raise InputError(f"{folder} holds no images ({', '.join(_SUFFIXES)}); {_INSTEAD}")
        return ImageSet(images=[_stored(file, folder) for file in files], labels=None, classes=None)
    return ImageSet(
        images=[_stored(file, folder) for file, _ in found],
        labels=[number for _, number in found],
        classes=tuple(path.name for path in classes),
    )


def _stored(file: Path, folder: Path) -> StoredImage:
    return StoredImage(name=file.relative_to(folder).as_posix(), content=file)


def _image_files(folder: Path) -> Iterable[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _SUFFIXES)


def _of_parquet(paths: Sequence[Path], column: str, label_column: str) -> ImageSet:
    images: list[StoredImage] = []
    labels: list[Any] = []
    for path in paths:
        found, values = _of_table(path, column, label_column)
        images, labels = images + found, labels + values
    return _labelled(images, labels, None, str(paths[0]))


def _of_table(path: Path, column: str, other: str) -> tuple[list[StoredImage], list[Any]]:
    """Images of a Parquet file and what its `other` column holds, nothing where it has none."""
    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            _require(column, there, str(path))
            table = file.read(columns=[column, *([other] if other in there else [])])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}") from error
    cells = table.column(column).to_pylist()
    images = [StoredImage(name=f"{path.name} row {row}", content=_bytes(item)) for row, item in enumerate(cells)]
    return images, table.column(other).to_pylist() if other in table.column_names else []


def _of_data_set(source: str, column: str, label_column: str) -> ImageSet:
    import datasets  # takes seconds

    images, rows = _images_of_rows(source, column)
    feature = rows.features.get(label_column)
    classes = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return _labelled(images, list(rows[label_column]) if feature is not None else [], classes, source)


def _images_of_rows(source: str, column: str) -> tuple[list[StoredImage], Any]:
    """Images of a data set and its rows."""
    import datasets  # takes seconds

    rows = load_data_set(source, _INSTEAD)
    _require(column, rows.column_names, source)
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    contents = (_bytes(item) for item in rows[column])
    return [StoredImage(name=f"row {row}", content=content) for row, content in enumerate(contents)], rows


def _bytes(item: Any) -> Path | bytes | None:
    """What a cell holds of an image: bytes, or `{bytes, path}` as `datasets` writes them."""
    if isinstance(item, dict):
        if item.get("bytes") is not None:
            item = item["bytes"]
        else:
            return Path(item["path"]) if item.get("path") else None
    return item if isinstance(item, bytes) else None


def _labelled(images: list[StoredImage], labels: list[Any], classes: tuple[str, ...] | None, source: str) -> ImageSet:
    """Labels as numbers; names of classes are numbered in their order. Raises InputError for other labels."""
    if not images:
        raise InputError(f"{source} holds no images; {_INSTEAD}")
    if not labels:
        return ImageSet(images=images, labels=None, classes=None)
    if all(isinstance(label, str) for label in labels):
        names = tuple(sorted(set(labels)))
        return ImageSet(images=images, labels=[names.index(label) for label in labels], classes=names)
    if wrong := [label for label in labels if isinstance(label, bool) or not isinstance(label, int) or label < 0]:
        raise InputError(f"{source} has a label {wrong[0]!r}, which is neither a number from 0 on nor a name")
    return ImageSet(images=images, labels=labels, classes=classes)


def _require(column: str, there: Sequence[str], source: str, key: str = "images.column") -> None:
    if column not in there:
        raise InputError(f"{source} has no column {column!r} (it has: {', '.join(there)}); set {key}")
