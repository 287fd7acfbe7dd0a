"""Encoders of images through the whole flow: measured and judged on images, quantized, and opened by transformers."""

from __future__ import annotations

import csv
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModel, AutoModelForImageClassification

import lmq
from lmq.checkpoint.write import quantized_bytes, read_quantization_config
from lmq.errors import InputError
from lmq.evaluation.linear_probe import probe_predictions
from lmq.images.prepared import ImageDraw, prepare_images
from lmq.images.prompts import prompt_tokens
from lmq.report.results import read_results
from lmq_flows.cli.inspect import summary
from lmq_flows.config.run import parse_run_config
from lmq_flows.run.one_model import Goal, prepare_goal
from lmq_flows.run.plan import check_run, inspect_model, plan_run
from lmq_flows.studies.study import SensitivityStudy, StudyOptions
from tests.flows.conftest import run_and_look, tiny_config
from tests.towers import PAIRS, make_encoder

EVALUATED = 40
IMAGES = {"source": "digits", "calibration": 6, "evaluation": EVALUATED}


@pytest.mark.slow
def test_a_classifier_runs_to_the_end_and_its_accuracy_is_that_of_the_checkpoint(server, tmp_path):
    model = make_encoder(tmp_path / "vit", "vit")
    measure = {"quantizer": "fisher-gptq", "also": ["module_errors", "fisher", "divergence", "delta_loss"]}
    baselines = [{"name": "rtn b4g64"}]
    strategies = ["uniform", "sensi-boost", "kurt-boost", "mxq", "loss-aware", "auto"]
    changes: dict[str, Any] = {"images": IMAGES, "measure": measure, "baselines": baselines, "strategies": strategies}
    config = tiny_config(model, tmp_path, budgets=["uniform b3g64"], **changes)
    assert check_run(config) == []
    done = run_and_look(config)
    assert done.state.is_completed(), done.state.message
    results = {result.label: result for result in read_results(config.run_dir / "results.json")}
    assert len(results) == 8
    draw = ImageDraw(source="digits", part="second", count=EVALUATED)
    images = prepare_images(draw, model)
    for result in results.values():
        assert result.error is None
        assert result.protocol == f"{EVALUATED} images of 10 classes"
        assert result.tasks is not None
        assert [score.task for score in result.tasks] == ["top-1", "top-5", "mean per-class recall"]
        if result.checkpoint is None:
            continue
        path = config.run_dir / result.checkpoint
        assert quantized_bytes(path) == result.size_bytes <= result.budget_bytes
        opened = AutoModelForImageClassification.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = opened(images.pixels).logits
        assert result.tasks[0].value == pytest.approx((logits.argmax(1) == images.labels).float().mean().item())
        loss = torch.nn.functional.cross_entropy(logits, images.labels)
        assert result.perplexity == pytest.approx(loss.exp().item(), rel=1e-3)
        card = (path / "README.md").read_text()
        assert "AutoModelForImageClassification" in card
        assert "AutoImageProcessor" in card
    assert results["loss-aware @ uniform b3g64"].kl_divergence > 0
    page = (config.run_dir / "report.html").read_text()
    assert "mean per-class recall" in page
    assert all(item.cached for item in plan_run(config).nodes if item.node.stage.name != "report")


def zero_shot(model, pixels, token_ids, classes):
    """Logits by transformers' own features: what CLIP's authors do with several templates."""
    with torch.no_grad():
        images = model.get_image_features(pixel_values=pixels).pooler_output
        texts = model.get_text_features(input_ids=token_ids).pooler_output
    texts = torch.nn.functional.normalize(texts, dim=1).view(classes, -1, texts.shape[1]).mean(1)
    cosines = torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(texts, dim=1).t()
    return cosines * model.logit_scale.exp().detach()


def probed(path, source, judged):
    """Accuracy of a linear classifier on the embeddings of images that the opened model makes."""
    fitted = prepare_images(ImageDraw(source="digits", part="first", count=30), source)
    opened = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        known, found = (
            torch.nn.functional.normalize(opened.get_image_features(pixel_values=each.pixels).pooler_output, dim=1)
            for each in (fitted, judged)
        )
    return (probe_predictions(known, fitted.labels, found) == judged.labels).double().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_both_towers_share_a_budget_and_classify_by_the_texts_of_classes(name, server, tmp_path):
    model = make_encoder(tmp_path / name, name)
    templates = ["a photo of a {}.", "the digit {}"]
    strategies = ["uniform", "sensi-boost", "kurt-boost", "mxq", "loss-aware"]
    images = IMAGES | {"templates": templates, "probe": 30}
    measure = {"quantizer": "fisher-gptq", "menu": ["b2g32", "b3g32", "b4g32", "b8g32"]}
    changes = {"images": images, "measure": measure, "strategies": strategies, "budgets": ["uniform b3g32"]}
    config = tiny_config(model, tmp_path, **changes, baselines=[{"name": "rtn b4g32"}])
    assert check_run(config) == []
    done = run_and_look(config)
    assert done.state.is_completed(), done.state.message
    results = read_results(config.run_dir / "results.json")
    images = prepare_images(ImageDraw(source="digits", part="second", count=EVALUATED), model)
    token_ids = prompt_tokens([str(number) for number in range(10)], templates, model)
    full = zero_shot(AutoModel.from_pretrained(model, dtype=torch.float32).eval(), images.pixels, token_ids, 10)
    for result in results:
        assert result.error is None
        assert result.protocol == f"{EVALUATED} images of 10 classes"
        if result.checkpoint is None:
            continue
        path = config.run_dir / result.checkpoint
        assert quantized_bytes(path) == result.size_bytes <= result.budget_bytes
        logits = zero_shot(AutoModel.from_pretrained(path, dtype=torch.float32).eval(), images.pixels, token_ids, 10)
        top_1 = (logits.argmax(1) == images.labels).float().mean().item()
        assert result.tasks[0].value == pytest.approx(top_1)
        assert result.tasks[-1].task == "cosine to full precision"
        assert result.tasks[-2].task == "linear probe"
        assert result.tasks[-2].value == pytest.approx(probed(path, model, images), abs=1e-6)
        divergence = torch.nn.functional.kl_div(
            logits.double().log_softmax(1), full.double().softmax(1), reduction="batchmean"
        )
        assert result.kl_divergence == pytest.approx(divergence.item(), rel=0.02)
    with (config.run_dir / "allocation-tiny-loss-aware-uniform-b3g32.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["layer"]) for row in rows] == sorted(int(row["layer"]) for row in rows)
    assert {int(row["layer"]) for row in rows} == {0, 1, 2, 3, 4}


def test_what_one_of_two_towers_cannot_be_asked_is_said_before_work(tmp_path):
    model = make_encoder(tmp_path / "clip", "clip")
    config = tiny_config(model, tmp_path, images=IMAGES, strategies=["auto"])
    with pytest.raises(InputError, match="tiny has 2 towers, of which trials is not measured"):
        check_run(config)
    pq.write_table(pa.table({"image": [b""] * 20, "label": [0] * 20}), tmp_path / "unnamed.parquet")
    images = {"source": str(tmp_path / "unnamed.parquet"), "calibration": 4}
    with pytest.raises(InputError, match=r"the labels of .*unnamed\.parquet have no names"):
        check_run(tiny_config(model, tmp_path, images=images, strategies=["uniform"]))
    with pytest.raises(InputError, match=r"images\.templates.*'a photo' has not one \{\}"):
        tiny_config(model, tmp_path, images={"templates": ["a photo"]})


@pytest.mark.slow
def test_an_encoder_without_a_head_is_measured_on_images_without_labels(server, tmp_path):
    model = make_encoder(tmp_path / "dinov2", "dinov2-base")
    rows = []
    for number in range(20):
        stream = BytesIO()
        values = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(values).save(stream, "PNG")
        rows.append(stream.getvalue())
    pq.write_table(pa.table({"image": rows}), tmp_path / "images.parquet")
    images = {"source": str(tmp_path / "images.parquet"), "calibration": 4}
    config = tiny_config(model, tmp_path, strategies=["uniform", "loss-aware"], images=images)
    done = run_and_look(config)
    assert done.state.is_completed(), done.state.message
    full, uniform, loss_aware = read_results(config.run_dir / "results.json")
    assert full.protocol == "10 images without labels or classes"
    for result in (uniform, loss_aware):
        assert result.perplexity is None
        (cosine,) = result.tasks
        assert cosine.value == pytest.approx(1 - result.kl_divergence, abs=1e-6)
        assert 0 < result.kl_divergence < 1
    opened = lmq.load(config.run_dir / loss_aware.checkpoint)
    assert opened(torch.zeros(1, 3, 8, 8)).pooler_output.isfinite().all()
    text = {"measure": {"also": ["fisher"]}, "strategies": ["uniform"], "images": images}
    state = run_and_look(tiny_config(model, tmp_path, **text)).state
    assert not state.is_completed()


@pytest.mark.slow
def test_only_the_modules_that_are_asked_for_are_quantized(server, tmp_path):
    """As the authors of MXQ quantized CLIP: `c_fc` and `c_proj`, which transformers calls fc1 and fc2."""
    model = make_encoder(tmp_path / "clip", "clip")
    changes = {"images": IMAGES, "strategies": ["mxq"], "modules": ["*.mlp.fc1", "*.mlp.fc2"]}
    config = tiny_config(model, tmp_path, **changes)
    assert any("self_attn.q_proj.weight" in note for note in check_run(config))
    done = run_and_look(config)
    assert done.state.is_completed(), done.state.message
    full, mxq = read_results(config.run_dir / "results.json")
    path = config.run_dir / mxq.checkpoint
    assert set(read_quantization_config(path).specs) == {
        f"{tower}_model.encoder.layers.{layer}.mlp.{name}"
        for tower, layers in (("vision", 2), ("text", 3))
        for layer in range(layers)
        for name in ("fc1", "fc2")
    }
    before, after = (AutoModel.from_pretrained(place, dtype=torch.float32) for place in (model, path))
    kept = "text_model.encoder.layers.2.self_attn.q_proj.weight"
    assert torch.equal(before.get_parameter(kept), after.get_parameter(kept))
    assert full.size_bytes == 4 * 2 * (2 * 64 * 128 + 3 * 32 * 64)


@pytest.mark.parametrize(
    ("modules", "message"),
    [(["*.c_fc"], r"modules: '\*\.c_fc' matches nothing of CLIPModel"), (["0.*"], "leave layer 1 without a module")],
)
def test_patterns_that_leave_nothing_are_refused(modules, message, tmp_path):
    config = tiny_config(make_encoder(tmp_path / "clip", "clip"), tmp_path, images=IMAGES, modules=modules)
    with pytest.raises(InputError, match=message):
        check_run(config)


def test_inspection_names_towers_and_outputs(tmp_path):
    structures = {
        name: inspect_model(str(make_encoder(tmp_path / name, name)), str(tmp_path / "store")).structure
        for name in ("vit", "clip")
    }
    assert summary(structures["vit"]).startswith(
        "ViTForImageClassification: 3 layers, hidden size 64, classification with 10 outputs, float32; 18 modules"
    )
    assert summary(structures["clip"]).startswith(
        "CLIPModel: 2 layers, hidden size 64 and 3 layers, hidden size 32, contrastive with 48 outputs, float32"
    )


def test_commands_without_images_refuse_encoders(tmp_path):
    model = str(make_encoder(tmp_path / "vit", "vit"))
    with pytest.raises(InputError, match="sees images, of which `lmq quantize` has none"):
        prepare_goal(Goal(model=model, bits=4.5, output=tmp_path / "out", store=str(tmp_path / "store")))
    study = SensitivityStudy(models=(model,), options=StudyOptions(store=str(tmp_path / "store")))
    with pytest.raises(InputError, match="sees images, and studies are made on texts"):
        study.measure(Console())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {"source": "digits", "calibration": 900}}, "has 898 in the first half of the 1,797 images"),
        ({"images": {"source": "digits", "evaluation": 900}}, "has 899 in the second half of the 1,797 images"),
        ({"evaluation__tasks": ["boolq"]}, "tiny sees images: evaluation.performance and evaluation.tasks"),
        ({"images": {"source": "/no/such"}}, "there are no images /no/such"),
        ({"images": {"probe": 10}}, "images.probe is for encoders without classes; tiny has its own"),
        ({"embeddings": True, "strategies": ["uniform"]}, "leave out embeddings"),
    ],
)
def test_what_a_run_on_images_cannot_be_is_said_before_work(changes, message, tmp_path):
    config = tiny_config(make_encoder(tmp_path / "vit", "vit"), tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        check_run(config)


def test_images_are_not_measured_and_judged_on_alike():
    data = {"name": "a", "models": [{"name": "a", "source": "a"}], "strategies": ["uniform"], "budgets": ["4"]}
    with pytest.raises(InputError, match=r"images: source and evaluation_source are both 'x'"):
        parse_run_config(data | {"images": {"source": "x", "evaluation_source": "x"}})
