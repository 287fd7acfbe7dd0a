"""Images with text, drawn from a source, prepared by the model's own processor and joined to sequences."""

import json
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase

from lmq.errors import DamagedFile, InputError
from lmq.images.pairs import (
    PairDraw,
    first_pair,
    load_pair_processor,
    pack_pairs,
    read_packed,
    sample_pair,
    write_pairs,
)
from lmq.text.calibration import seeded_order
from tests.vision_language import IMAGE_TOKEN, save_processor, save_vision_language_model

TEXTS = ["a small cat sits", "two dogs run", "the sea", "a red house by a road"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
)


@pytest.fixture(params=["llava", "idefics3"])
def model(request: pytest.FixtureRequest, tiny_gemma: Path, tmp_path: Path) -> Path:
    """A tiny model with its processor, whose tokenizer puts a token in front."""
    save_vision_language_model(request.param, tmp_path / "model")
    save_processor(request.param, tmp_path / "model", AutoTokenizer.from_pretrained(tiny_gemma))
    return tmp_path / "model"


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def png(number: int) -> bytes:
    stream = BytesIO()
    picture(number).save(stream, "PNG")
    return stream.getvalue()


def table(path: Path, texts: Sequence[Any] = TEXTS, images: Sequence[bytes] | None = None) -> str:
    images = images or [png(number) for number in range(len(texts))]
    pq.write_table(pa.table({"image": images, "caption": texts}), path)
    return str(path)


def draw_of(source: str, **changes: Any) -> PairDraw:
    options = {"text_column": "caption", "sequences": 2, "sequence_length": 20} | changes
    return PairDraw(source=source, **options)


def words_of(tokenizer: PreTrainedTokenizerBase, token_ids: torch.Tensor, is_text: torch.Tensor) -> str:
    return tokenizer.decode(token_ids[is_text])


def test_sequences_are_pairs_as_the_processor_makes_them(model: Path, tmp_path: Path) -> None:
    packed = pack_pairs(draw_of(table(tmp_path / "pairs.parquet")), model)
    processor = load_pair_processor(model)
    assert packed.token_ids.shape == packed.is_text.shape == (2, 20)
    seen = []
    for row, is_text, pairs in zip(packed.token_ids, packed.is_text, packed.pairs, strict=True):
        joined = torch.cat([pair["input_ids"][0] for pair in pairs])
        assert torch.equal(joined[:20], row.long())
        assert sum(pair["input_ids"].shape[1] for pair in pairs[:-1]) < 20 <= len(joined)
        assert not is_text[row == IMAGE_TOKEN].any()
        assert not is_text[row == processor.tokenizer.bos_token_id].any()
        for pair in pairs:
            ids = pair["input_ids"][0]
            text = next(each for each in TEXTS if processor.tokenizer.decode(ids, skip_special_tokens=True) == each)
            made = processor(images=[picture(TEXTS.index(text))], text=[f"<image>{text}"], return_tensors="pt")
            assert pair.keys() == made.keys() - {"attention_mask"}
            assert all(torch.equal(tensor, made[name]) for name, tensor in pair.items())
            seen.append(text)
        words = words_of(processor.tokenizer, row, is_text)
        assert "".join(seen[-len(pairs) :]).startswith(words)
    assert len(set(seen)) == len(seen)


def test_they_are_read_as_written_and_drawn_by_the_seed(model: Path, tmp_path: Path) -> None:
    source = table(tmp_path / "pairs.parquet")
    packed = pack_pairs(draw_of(source), model)
    write_pairs(tmp_path / "packed", packed)
    again = read_packed(tmp_path / "packed")
    assert torch.equal(again.token_ids, packed.token_ids)
    assert torch.equal(again.is_text, packed.is_text)
    for ours, theirs in zip(again.pairs, packed.pairs, strict=True):
        assert [{name: tensor.tolist() for name, tensor in pair.items()} for pair in ours] == [
            {name: tensor.tolist() for name, tensor in pair.items()} for pair in theirs
        ]
    assert any(
        not torch.equal(pack_pairs(draw_of(source, seed=seed), model).token_ids, packed.token_ids) for seed in range(3)
    )
    (tmp_path / "packed").write_bytes(b"no")
    with pytest.raises(DamagedFile, match="is damaged"):
        read_packed(tmp_path / "packed")


def test_a_chat_template_makes_the_text_an_answer_to_the_image(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text(TEMPLATE)
    draw = draw_of(table(tmp_path / "pairs.parquet", ["a cat <image>"]))
    token_ids = first_pair(draw, model)["input_ids"][0]
    processor = load_pair_processor(model)
    text = processor.tokenizer.decode(token_ids, skip_special_tokens=True)
    assert text == "user:  assistant: a cat "
    assert (token_ids == IMAGE_TOKEN).sum() == (sample_pair(model)["input_ids"] == IMAGE_TOKEN).sum()


def test_a_folder_with_metadata_is_a_data_set(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(len(TEXTS)):
        (folder / f"{number}.png").write_bytes(png(number))
    rows = [{"file_name": f"{number}.png", "caption": text} for number, text in enumerate(TEXTS)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = pack_pairs(draw_of(f"dataset:{folder}"), model)
    assert torch.equal(found.token_ids, pack_pairs(draw_of(table(tmp_path / "pairs.parquet")), model).token_ids)
    with pytest.raises(InputError, match=r"photos has no texts beside its images; .*dataset:FOLDER"):
        first_pair(draw_of(str(folder)), model)


def test_pairs_that_cannot_be_used_are_named_and_counted(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [*TEXTS, None, "  ", "broken"] * 2
    images = [png(number) if text != "broken" else png(number)[:40] for number, text in enumerate(texts)]
    source = table(tmp_path / "pairs.parquet", texts, images)
    with pytest.raises(InputError, match=r"6 of 14 pairs of image and text of .*share of 0\.01"):
        pack_pairs(draw_of(source, sequences=4), model)
    assert "pairs.parquet row 4 has no text in 'caption' and is left out" in caplog.text
    assert "pairs.parquet row 6 cannot be read" in caplog.text
    assert pack_pairs(draw_of(source, sequences=3, unreadable=0.5), model).token_ids.shape == (3, 20)


def test_a_later_pair_that_the_processor_refuses_is_left_out(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = "{% if 'dogs' in messages[1]['content'][0]['text'] %}{{ raise_exception('no dogs') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refusal + TEMPLATE)
    source = table(tmp_path / "pairs.parquet")
    by_place = {seeded_order(len(TEXTS), seed).index(1): seed for seed in range(30)}
    with pytest.raises(InputError, match=r"processor refuses pairs.parquet row 1: no dogs"):
        pack_pairs(draw_of(source, seed=by_place[0]), model)
    later = draw_of(source, seed=by_place[1], sequences=1, sequence_length=40)
    with pytest.raises(InputError, match=r"1 of \d pairs of image and text of .* cannot be used"):
        pack_pairs(later, model)
    assert "a pair is left out: the model's processor refuses pairs.parquet row 1: no dogs" in caplog.text
    assert pack_pairs(replace(later, unreadable=0.5), model).token_ids.shape == (1, 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences": 9}, r"fill \d sequences of 20 tokens, where 9 are asked for"),
        ({"text_column": "text"}, r"no column 'text' \(it has: image, caption\); set images\.text_column"),
        ({"column": "photo"}, r"no column 'photo' .*; set images\.column"),
        ({"sequence_length": 4}, r"takes \d+ tokens, of which the first 4 hold no text; set .*sequence_length to \d+"),
        ({"source": "digits"}, "digits has no texts beside its images"),
        ({"source": "missing.parquet"}, "there are no images"),
    ],
)
def test_what_cannot_be_drawn_says_why(changes: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    options = {"source": table(tmp_path / "pairs.parquet")} | changes
    with pytest.raises(InputError, match=message):
        pack_pairs(draw_of(**options), model)


def test_a_source_without_a_text_is_refused_before_all_is_read(model: Path, tmp_path: Path) -> None:
    source = table(tmp_path / "pairs.parquet", ["", None])
    with pytest.raises(InputError, match=r"has no image with a text in 'caption'; set images\.text_column"):
        first_pair(draw_of(source), model)


def test_a_processor_that_does_not_say_where_images_go_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = load_pair_processor(model)
    del processor.image_token
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    with pytest.raises(InputError, match="neither a chat template nor an image_token"):
        load_pair_processor(model)


@pytest.mark.parametrize("tokenizer", [False, True])
def test_a_missing_processor_is_named(tokenizer: bool, tiny_gemma: Path, tmp_path: Path) -> None:
    save_vision_language_model("llava", tmp_path)
    if tokenizer:
        AutoTokenizer.from_pretrained(tiny_gemma).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no processor of images with text .*processor_config\.json"):
        sample_pair(tmp_path)
