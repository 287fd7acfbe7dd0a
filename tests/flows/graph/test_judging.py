"""A run with what stands beside perplexity: baselines, zero-shot tasks, memory and speed."""

from __future__ import annotations

import json
import shutil

import pytest

from lmq.errors import InputError
from lmq.model.discovery import discover
from lmq.report.results import read_results
from tests.flows.conftest import promised, run_and_look, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of lm-eval's own code

TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
"""
JUDGING = {"strategies": ["uniform"], "evaluation__task_limit": 3}


@pytest.fixture(scope="module")
def judged(server, tiny_qwen, tmp_path_factory):
    pytest.importorskip("lm_eval")
    place = tmp_path_factory.mktemp("judged")
    question = {"question": "The value", "choices": ["of", "is"], "answer": 0}
    (place / "words.jsonl").write_text(f"{json.dumps(question)}\n" * 5)
    (place / "words.yaml").write_text(TASK)
    shutil.copytree(tiny_qwen, place / "aqlm")
    config = json.loads((place / "aqlm" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm"}
    (place / "aqlm" / "config.json").write_text(json.dumps(config))
    baselines = [
        "rtn b3g64",
        "nf4",
        {"name": "AQLM 2-bit", "path": str(place / "aqlm")},
        {"name": "same", "path": str(tiny_qwen)},
    ]
    tasks = [str(place / "words.yaml"), "openbookqa"]
    changes = {"baselines": baselines, "evaluation__tasks": tasks, "evaluation__performance": True}
    return tiny_config(tiny_qwen, place, **JUDGING, **changes), tiny_qwen


@pytest.fixture(scope="module")
def results(judged):
    config, _ = judged
    done = run_and_look(config)
    assert done.state.name == "SomeVariantsFailed"
    return {result.strategy: result for result in read_results(config.run_dir / "results.json")}


def test_baselines_stand_in_the_same_table(judged, results):
    config, model = judged
    structure = discover(model, weights_sha256="0")
    assert list(results) == ["full-precision", "uniform", "rtn b3g64", "nf4 g64", "AQLM 2-bit", "same"]
    assert results["nf4 g64"].bits_per_weight == 4.5
    assert results["nf4 g64"].kl_divergence > 0
    assert results["rtn b3g64"].kl_divergence > results["nf4 g64"].kl_divergence
    assert results["rtn b3g64"].tokens == results["uniform"].tokens
    same, full = results["same"], results["full-precision"]
    assert same.perplexity == pytest.approx(full.perplexity, rel=1e-4)
    assert same.kl_divergence == pytest.approx(0, abs=1e-6)
    assert same.size_bytes == 4 * structure.parameters
    for name in ("rtn b3g64", "nf4 g64", "same", "AQLM 2-bit"):
        assert results[name].checkpoint is None
    page = (config.run_dir / "report.html").read_text()
    assert "nf4 g64" in page
    assert "AQLM 2-bit" in page


def test_a_missing_kernel_package_fails_one_row(results):
    failed = results["AQLM 2-bit"]
    assert "is quantized by aqlm, and a package that opens it is missing" in failed.error
    assert failed.perplexity is None


def test_every_variant_answers_the_questions_at_hand(results):
    for name in ("full-precision", "uniform", "rtn b3g64", "nf4 g64", "same"):
        scores = {score.task: score for score in results[name].tasks}
        assert scores["words"].samples == 3
        assert 0 <= scores["words"].value <= 1
        assert scores["openbookqa"].value is None
        assert scores["openbookqa"].error.startswith("the data of task 'openbookqa' is not at hand")
        assert results[name].error is None


def test_memory_and_speed_of_what_can_be_opened(results):
    for name in ("full-precision", "uniform", "same"):
        assert results[name].prompt_tokens_per_second > 0
        assert results[name].memory_resident_bytes is None or results[name].memory_resident_bytes > 0
        assert "torch" in results[name].performance_host
    assert results["uniform"].predicted_bytes == results["uniform"].size_bytes + _other_bytes(results)
    assert results["nf4 g64"].prompt_tokens_per_second is None


def _other_bytes(results):
    full = results["full-precision"]
    return full.checkpoint_bytes - full.size_bytes


def test_what_was_not_at_hand_is_asked_again_and_the_rest_is_cached(judged, results):
    config, _ = judged
    to_run = {label for (stage, label), cached in promised(config).items() if not cached}
    assert to_run
    assert all("openbookqa" in label or "AQLM 2-bit" in label for label in to_run)
    questions = config.run_dir.parent.parent / "words.jsonl"
    questions.write_text(questions.read_text() * 2)
    changed = {label for (_, label), cached in promised(config).items() if not cached} - to_run
    assert changed
    assert all(label.endswith("words") for label in changed)


@pytest.mark.parametrize(
    ("baselines", "message"),
    [
        (["gptq"], "'gptq' is not a baseline; write 'rtn b4g64', 'nf4'"),
        (["nf4", "nf4 g64"], "is listed twice"),
        ([{"name": "nf4", "model": "tiny"}], "is for every model"),
        ([{"name": "gptq", "path": "x", "model": "other"}], "is of model 'other'; the run has tiny"),
    ],
)
def test_bad_baselines_are_refused(tiny_qwen, tmp_path, baselines, message):
    with pytest.raises(InputError, match=message):
        tiny_config(tiny_qwen, tmp_path, baselines=baselines)
