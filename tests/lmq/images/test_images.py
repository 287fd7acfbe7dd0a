from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from lmq.errors import InputError
from lmq.images.prepared import (
    ImageDraw,
    check_images,
    check_probe,
    load_processor,
    prepare_images,
    read_prepared,
    write_images,
)
from lmq.images.sources import identify_images, read_images
from tests.towers import CLASSES, IMAGE, make_encoder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("images") / "vit", "vit")


def picture(number: int) -> Image.Image:
    values = np.random.default_rng(number).integers(0, 256, (11, 9, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png(number: int) -> bytes:
    stream = BytesIO()
    picture(number).save(stream, "PNG")
    return stream.getvalue()


def folder_of(path: Path, classes: dict[str, int]) -> Path:
    number = 0
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for _ in range(count):
            (path / name / f"{number:03d}.png").write_bytes(png(number))
            number += 1
    return path


def test_digits_are_those_of_scikit_learn() -> None:
    found = read_images("digits")
    theirs = load_digits()
    assert found.labels == theirs.target.tolist()
    values = np.array(found.images[17].decoded().convert("L"))
    np.testing.assert_allclose(values / 255, theirs.images[17] / 16, atol=1 / 255)
    assert identify_images("digits") == identify_images("digits")


def test_halves_share_no_image_and_are_drawn_by_the_seed(vit: Path) -> None:
    first, second = (prepare_images(ImageDraw(source="digits", part=part), vit) for part in ("first", "second"))
    assert len(first.pixels) + len(second.pixels) == 1797
    assert first.pixels.shape[1:] == (3, IMAGE, IMAGE)
    again = prepare_images(ImageDraw(source="digits", part="first", count=5, skipped=2), vit)
    torch.testing.assert_close(again.pixels, first.pixels[2:7])
    other = prepare_images(ImageDraw(source="digits", part="first", count=5, skipped=2, seed=1), vit)
    assert not torch.equal(other.pixels, again.pixels)


def test_pixels_are_what_the_models_own_processor_makes(vit: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", {"0": 2, "1": 1})
    found = prepare_images(ImageDraw(source=str(folder)), vit)
    processor = load_processor(vit)
    expected = {
        label: processor(images=[picture(number)], return_tensors="pt")["pixel_values"][0]
        for number, label in ((0, 0), (1, 0), (2, 1))
    }
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == [0, 0, 1]
    torch.testing.assert_close(found.pixels[found.labels == 1][0], expected[1])


def test_parquet_holds_bytes_or_what_datasets_writes(tmp_path: Path, vit: Path) -> None:
    bytes_file, struct_file = tmp_path / "bytes.parquet", tmp_path / "struct.parquet"
    pq.write_table(pa.table({"image": [png(0), png(1)], "label": [3, 1]}), bytes_file)
    cells = [{"bytes": png(0), "path": "a.png"}, {"bytes": png(1), "path": "b.png"}]
    pq.write_table(pa.table({"image": cells, "label": [3, 1]}), struct_file)
    plain, nested = (prepare_images(ImageDraw(source=str(path)), vit) for path in (bytes_file, struct_file))
    torch.testing.assert_close(plain.pixels, nested.pixels)
    assert plain.labels is not None
    assert sorted(plain.labels.tolist()) == [1, 3]
    write_images(tmp_path / "prepared", plain)
    again = read_prepared(tmp_path / "prepared")
    assert again.labels is not None
    assert torch.equal(again.pixels, plain.pixels)
    assert torch.equal(again.labels, plain.labels)


def test_images_without_labels_have_none(tmp_path: Path, vit: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    assert prepare_images(ImageDraw(source=str(tmp_path)), vit).labels is None


def test_names_of_classes_are_the_models_numbers(tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    path = make_encoder(tmp_path / "model", "vit")
    model = ViTForImageClassification.from_pretrained(path)
    names = ["gnu", *(f"other {number}" for number in range(1, CLASSES - 1)), "ant"]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.config.save_pretrained(path)
    folder = folder_of(tmp_path / "set", {"ant": 1, "gnu": 2})
    labels = prepare_images(ImageDraw(source=str(folder)), path).labels
    assert labels is not None
    assert sorted(labels.tolist()) == [0, 0, CLASSES - 1]
    folder_of(tmp_path / "set" / "zebra", {"": 1})
    with pytest.raises(InputError, match=r"class 'zebra' and 0 more that the model does not have; .* gnu, other 1"):
        check_images(ImageDraw(source=str(folder)), path)


def test_damaged_images_are_named_and_counted(tmp_path: Path, vit: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path / "set", {"0": 3, "1": 1})
    (folder / "1" / "broken.png").write_bytes(png(9)[:40])
    with pytest.raises(InputError, match=r"1 of 5 images of .* cannot be used, where a share of 0\.01 may"):
        prepare_images(ImageDraw(source=str(folder)), vit)
    assert "1/broken.png cannot be read" in caplog.text
    assert len(prepare_images(ImageDraw(source=str(folder), unreadable=0.2), vit).pixels) == 4


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda path: folder_of(path / "a", {"0": 3}), {"count": 4}, "has 3 images, where 4 are asked for"),
        (lambda path: path, {}, "holds no images"),
        (lambda path: path / "missing", {}, "there are no images"),
        (lambda _: "digit", {}, "unknown source of images 'digit'.*'digits'"),
        (lambda _: __file__, {}, "no folder and no Parquet file"),
    ],
)
def test_sources_that_cannot_be_used_say_what_can(
    make: object, options: dict[str, int], message: str, tmp_path: Path, vit: Path
) -> None:
    source = str(make(tmp_path))  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        prepare_images(ImageDraw(source=source, **options), vit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b""]}, r"no column 'image' \(it has: picture\); set images\.column"),
        ({"image": [b""], "label": [CLASSES]}, f"a label {CLASSES}, where the model has {CLASSES} classes"),
        ({"image": [b""], "label": [-1]}, "a label -1, which is neither a number"),
        ({"image": [b""], "label": [None]}, "a label None, which is neither a number"),
    ],
)
def test_labels_and_columns_that_do_not_suit_are_named(
    columns: dict[str, list[object]], message: str, tmp_path: Path, vit: Path
) -> None:
    path = tmp_path / "set.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(InputError, match=message):
        check_images(ImageDraw(source=str(path)), vit)


def test_a_probe_needs_labels_of_the_same_classes(tmp_path: Path) -> None:
    fitted, judged = folder_of(tmp_path / "a", {"x": 1, "y": 1}), folder_of(tmp_path / "b", {"x": 1, "z": 1})
    check_probe(str(fitted), str(fitted))
    with pytest.raises(InputError, match="differ in their classes"):
        check_probe(str(fitted), str(judged))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "0.png").write_bytes(png(0))
    with pytest.raises(InputError, match=r"plain has no labels, which a linear probe needs; leave out images\.probe"):
        check_probe(str(fitted), str(tmp_path / "plain"))


def test_a_model_without_a_processor_says_which_file_is_missing(vit: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((vit / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"has no image processor .*preprocessor_config\.json"):
        check_images(ImageDraw(source="digits"), tmp_path)
