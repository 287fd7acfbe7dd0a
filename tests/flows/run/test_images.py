"""Encoders of images through the whole flow: measured and judged on images, quantized, and opened by transformers."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

import lmq
from lmq.checkpoint.write import quantized_bytes
from lmq.errors import InputError
from lmq.images.prepared import ImageDraw, prepare_images
from lmq.report.results import read_results
from lmq_flows.config.run import parse_run_config
from lmq_flows.run.plan import check_run, inspect_model, plan_run
from tests.flows.conftest import run_and_look, tiny_config
from tests.towers import make_encoder

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
    assert full.protocol == "10 images without labels"
    for result in (uniform, loss_aware):
        assert result.perplexity is None
        assert result.tasks is None
        assert 0 < result.kl_divergence < 1
    opened = lmq.load(config.run_dir / loss_aware.checkpoint)
    assert opened(torch.zeros(1, 3, 8, 8)).pooler_output.isfinite().all()
    text = {"measure": {"also": ["fisher"]}, "strategies": ["uniform"], "images": images}
    state = run_and_look(tiny_config(model, tmp_path, **text)).state
    assert not state.is_completed()


def test_inspection_names_the_classes_outputs(tmp_path):
    structure = inspect_model(str(make_encoder(tmp_path / "vit", "vit")), str(tmp_path / "store")).structure
    assert structure.sees_images
    assert json.loads(json.dumps(structure.to_json()))["loss"] == "classification"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {"source": "digits", "calibration": 900}}, "has 898 in the first half of the 1,797 images"),
        ({"images": {"source": "digits", "evaluation": 900}}, "has 899 in the second half of the 1,797 images"),
        ({"evaluation__tasks": ["boolq"]}, "tiny sees images: evaluation.performance and evaluation.tasks"),
        ({"images": {"source": "/no/such"}}, "there are no images /no/such"),
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
