"""A whole run of a vision-language model: its language model is measured and quantized, and it is opened whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

import lmq
from lmq.errors import InputError
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.spec import QuantSpec
from lmq.images.pairs import PairDraw, pack_pairs
from lmq.measurement.grids import load_grids
from lmq.measurement.replay import read_hidden_states
from lmq.measurement.sequence_fisher import SEQUENCE_FISHER_SCHEMA
from lmq.model.discovery import discover
from lmq.model.structure import ModuleId
from lmq.report.results import read_results
from lmq.tables import read_rows
from lmq_flows.cli import main
from lmq_flows.run.plan import check_run, plan_run
from lmq_tasks.stage import open_store
from tests.flows.conftest import run_and_look, tiny_config
from tests.vision_language import image_and_text, save_processor, save_vision_language_model


@pytest.fixture(scope="module")
def finished(server, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory):
    place = tmp_path_factory.mktemp("vision")
    model = shutil.copytree(tiny_llama, place / "model")  # its tokenizer
    save_vision_language_model("qwen2-vl", model)
    config = tiny_config(
        model,
        place,
        strategies=["uniform", "loss-aware"],
        measure={"quantizer": "fisher-gptq", "menu": ["b2g64", "b3g64", "b4g64", "b8g64"]},
        embeddings=True,
    )
    return config, model, run_and_look(config)


def test_predicted_bytes_count_what_is_kept(finished) -> None:
    config, model, done = finished
    assert done.state.is_completed()
    structure = discover(model, embeddings=True)
    visual = {name for name in load_file(model / "model.safetensors") if "visual." in name}
    for result in read_results(config.run_dir / "results.json")[1:]:
        assert result.error is None
        tensors = load_file(config.run_dir / result.checkpoint / "model.safetensors")
        assert visual <= tensors.keys()
        stored = sum(tensor.nbytes for tensor in tensors.values())
        assert stored == result.size_bytes + structure.other_bytes
        assert result.size_bytes <= result.budget_bytes


@torch.no_grad()
def test_the_checkpoint_says_of_an_image_what_its_weights_make(finished) -> None:
    config, model, _ = finished
    path = config.run_dir / read_results(config.run_dir / "results.json")[-1].checkpoint
    expected = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    reader = QuantizedCheckpoint(path)
    for name in reader.specs:
        expected.get_submodule(name).weight.copy_(reader.weight(name))
    opened = lmq.load(path, dtype=torch.float32)
    assert type(opened) is Qwen2VLForConditionalGeneration
    inputs = image_and_text("qwen2-vl")
    torch.testing.assert_close(opened(**inputs).logits, expected(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_it_is_evaluated_beside_its_source(finished, capsys: pytest.CaptureFixture[str]) -> None:
    config, model, _ = finished
    checkpoint = config.run_dir / read_results(config.run_dir / "results.json")[-1].checkpoint
    options = ["--tokens", "256", "--window", "64", "--stride", "32"]
    assert main(["evaluate", str(checkpoint), "--reference", str(model), *options]) == 0
    assert "KL to the reference" in capsys.readouterr().out


def pairs_table(path: Path, count: int = 12) -> str:
    """Parquet with images of noise, and a text for each."""
    for number in range(count):
        values = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(values).save(path.with_suffix(f".{number}.png"))
    images = [path.with_suffix(f".{number}.png").read_bytes() for number in range(count)]
    pq.write_table(pa.table({"image": images, "caption": [f"the image number {n}" for n in range(count)]}), path)
    return str(path)


def pairs_config(family: str, tokenizer: Path, place: Path, **changes: Any) -> Any:
    """A run of a model with its processor, measured on images with text."""
    save_vision_language_model(family, place / "model")
    save_processor(family, place / "model", AutoTokenizer.from_pretrained(tokenizer))
    measure = {"quantizer": "fisher-gptq", "menu": ["b2g64", "b3g64", "b4g64", "b8g64"]}
    images = {"source": pairs_table(place / "pairs.parquet"), "text_column": "caption"}
    options = {"images": images, "measure": measure, "strategies": ["uniform", "sensi-boost", "loss-aware"]}
    return tiny_config(place / "model", place, **options | changes)


def test_blocks_are_measured_on_images_with_text(server, tiny_llama: Path, tmp_path: Path) -> None:
    config = pairs_config("llava", tiny_llama, tmp_path)
    check_run(config)
    done = run_and_look(config)
    assert done.state.is_completed(), done.state.message
    assert "pairs" in done.ran()
    assert "calibration" not in done.ran()
    for result in read_results(config.run_dir / "results.json"):
        assert result.error is None
        assert result.perplexity is not None  # of text
    planned = plan_run(config).nodes
    assert all(item.cached for item in planned if item.node.stage.name != "report")
    (embed,) = (item for item in planned if item.node.stage.name == "embed")
    store = open_store(config.store)
    ref = store.find(*embed.uri.split("/"))
    entering = read_hidden_states(store.path(ref, "hidden-states.parquet"))
    draw = PairDraw(source=config.images.source, text_column="caption", sequences=3, sequence_length=32)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    packed = pack_pairs(draw, tmp_path / "model")
    for found, pairs in zip(entering, packed.pairs, strict=True):
        with torch.no_grad():
            states = [model(**pair, output_hidden_states=True).hidden_states[0][0] for pair in pairs]
        torch.testing.assert_close(found, torch.cat(states)[:32], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": ["auto"]}, r"tiny is measured on images with text .*, on which trials is not measured"),
        ({"embeddings": True}, "embeddings = true is measured on text"),
        ({"polish": {"steps": 1}}, "polish is not measured"),
        ({"learned_rounding": {"steps": 1}}, "learned_rounding is not measured"),
        ({"measure": {"also": ["module_errors"]}}, "module_errors is not measured"),
        ({"calibration": {"sequence_length": 500}}, "sequence_length = 500 is more than the 256 tokens"),
        ({"calibration": {"sequence_length": 8}}, None),
        ({"images": {"source": "digits", "text_column": "text"}}, "digits has no texts beside its images"),
    ],
)
def test_what_images_with_text_cannot_measure_is_said_before_work(
    changes: dict[str, Any], message: str | None, tiny_llama: Path, tmp_path: Path
) -> None:
    config = pairs_config("idefics3", tiny_llama, tmp_path, **changes)
    if message is None:
        check_run(config)
        return
    with pytest.raises(InputError, match=message):
        check_run(config)


def test_models_that_images_with_text_are_not_for_are_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    images = {"source": pairs_table(tmp_path / "pairs.parquet"), "text_column": "caption"}
    config = tiny_config(tiny_llama, tmp_path, images=images)
    with pytest.raises(InputError, match=r"tiny is no vision-language model, which images\.text_column is for"):
        check_run(config)
    save_vision_language_model("llava", tmp_path / "bare")
    with pytest.raises(InputError, match="bare has no processor of images with text"):
        check_run(tiny_config(tmp_path / "bare", tmp_path, images=images))


TOWERS = {
    "llava": ("fisher-gptq", "vision_tower.*", "multi_modal_projector.*"),
    "idefics3": ("hqq", "vision_model.*", "connector.*"),
}
"""A quantizer for each family, and patterns that name what lies beside its language model."""


@pytest.fixture(scope="module", params=TOWERS)
def with_tower(request, server, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run in which what lies beside the language model is quantized too."""
    place = tmp_path_factory.mktemp("tower")
    quantizer, *patterns = TOWERS[request.param]
    config = pairs_config(
        request.param,
        tiny_llama,
        place,
        modules=["*", *patterns],
        strategies=["uniform", "sensi-boost", "kurt-boost", "mxq", "loss-aware"],
        measure={
            "quantizer": quantizer,
            "menu": ["b2g64", "b3g64", "b4g64", "b8g64"],
            "label_draws": 64,
        },
    )
    check_run(config)
    return config, place / "model", run_and_look(config)


def test_the_tower_is_quantized_with_the_rest(with_tower) -> None:
    config, model, done = with_tower
    assert done.state.is_completed(), done.state.message
    structure = discover(model, beside=config.modules)
    for result in read_results(config.run_dir / "results.json")[1:]:
        assert result.error is None
        checkpoint = config.run_dir / result.checkpoint
        tensors = load_file(checkpoint / "model.safetensors")
        assert sum(tensor.nbytes for tensor in tensors.values()) == result.size_bytes + structure.other_bytes
        assert result.size_bytes <= result.budget_bytes
        assert set(QuantizedCheckpoint(checkpoint).specs) == {structure.path(info.id) for info in structure.modules}
    assert all(item.cached for item in plan_run(config).nodes if item.node.stage.name != "report")


@torch.no_grad()
def test_a_checkpoint_with_its_tower_says_and_generates_what_its_weights_make(with_tower) -> None:
    config, model, _ = with_tower
    path = config.run_dir / read_results(config.run_dir / "results.json")[-1].checkpoint
    expected = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    source = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    reader = QuantizedCheckpoint(path)
    for name in reader.specs:
        expected.get_submodule(name).weight.copy_(reader.weight(name))
    family = "llava" if "Llava" in type(source).__name__ else "idefics3"
    inputs = image_and_text(family)
    for opened in (
        lmq.load(path, dtype=torch.float32),
        lmq.load(path, dtype=torch.float32, dense=True),
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval(),
    ):
        torch.testing.assert_close(opened(**inputs).logits, expected(**inputs).logits, rtol=1e-4, atol=1e-4)
    image = {name: tensor for name, tensor in inputs.items() if name.startswith("pixel")}
    features = [each.get_image_features(**image).pooler_output for each in (opened, expected, source)]
    found, right, before = (torch.stack(list(each)) for each in features)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before, rtol=1e-2, atol=1e-2)
    words = opened.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert words.tolist() == expected.generate(**inputs, max_new_tokens=5, do_sample=False).tolist()


@torch.no_grad()
@pytest.mark.parametrize("with_tower", ["idefics3"], indirect=True)
def test_costs_of_the_tower_are_the_divergence_of_what_is_said_of_images(with_tower) -> None:
    """One matrix at 8 bits at a time, put into transformers' own model: KL per predicted token of text."""
    config, path, _ = with_tower
    structure = discover(path, beside=config.modules)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    draw = PairDraw(source=config.images.source, text_column="caption", sequences=3, sequence_length=32)
    packed = pack_pairs(draw, path)
    store = open_store(config.store)
    spec = QuantSpec.parse("b8g64")

    def predictions() -> torch.Tensor:
        rows = []
        for token_ids, is_text, pairs in zip(packed.token_ids, packed.is_text, packed.pairs, strict=True):
            joined = {
                name: torch.cat(
                    [pair[name] for pair in pairs], dim=int(name == "input_ids" or pairs[0][name].ndim == 5)
                )
                for name in pairs[0]
            }
            logits = model(**joined).logits[0, : len(token_ids) - 1]
            rows.append(logits[is_text[1:]].double().log_softmax(-1))
        return torch.cat(rows)

    before = predictions()
    found: dict[str, dict[ModuleId, Any]] = {"sequence-fisher": {}, "grids": {}}
    for item in plan_run(config).nodes:
        if (stage := item.node.stage.name) in found and item.node.layer in structure.layers_beside:
            ref = store.find(*item.uri.split("/"))
            if stage == "grids":
                found[stage] |= load_grids(store.path(ref, "grids.safetensors"))
            else:
                rows = read_rows(store.path(ref, "sequence-fisher.parquet"), SEQUENCE_FISHER_SCHEMA)
                found[stage] |= {
                    ModuleId(row["layer"], row["kind"]): row["fisher"]
                    for row in rows
                    if (row["bits"], row["group_size"]) == (8, 64)
                }
    ratios = []
    for info in structure.modules:
        if info.id.layer in structure.layers_beside:
            linear = model.get_submodule(structure.path(info.id))
            weight = linear.weight.clone()
            linear.weight.copy_(found["grids"][info.id][spec].round_trip(weight))
            divergence = (before.exp() * (before - predictions())).sum(-1).mean()
            linear.weight.copy_(weight)
            ratios.append(found["sequence-fisher"][info.id] / float(divergence))
    assert len(ratios) == 12 + 1
    assert 0.7 < sum(ratios) / len(ratios) < 1.4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {}}, r"modules names model\.vision_tower.*layers\.0 of .*, which images go through; measure it on"),
        ({"modules": ["*", "vision_tower.*.c_fc"]}, "matches no matrix in the blocks of"),
        ({"strategies": ["bi-weighted"]}, "where layer_activity is about the layers of a language model"),
        ({"images": {}, "strategies": ["uniform", "mxq"], "measure": {"quantizer": "hqq"}}, None),
    ],
)
def test_what_cannot_be_measured_of_a_tower_is_said_before_work(
    changes: dict[str, Any], message: str | None, tiny_llama: Path, tmp_path: Path
) -> None:
    options = {"modules": ["*", "vision_tower.*"]} | changes
    config = pairs_config("llava", tiny_llama, tmp_path, **options)
    if message is None:
        check_run(config)
        return
    with pytest.raises(InputError, match=message):
        check_run(config)
