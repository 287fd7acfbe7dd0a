"""A run that may choose floats of 4 and 8 bits: what is planned, counted, checked and exported for vLLM is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmq.allocation.targets import TARGETS
from lmq.errors import InputError
from lmq.export import gguf, gptq
from lmq.export.check import export_checked
from lmq.export.source import QuantizedCheckpoint
from lmq.model.tensors import read_headers, size_bytes
from lmq_flows.graph.build import build_graph
from lmq_flows.graph.direct import execute_directly
from lmq_flows.run.plan import check_run
from lmq_flows.run.prepare import identify_models, identify_texts, preparation_graph, prepared_model
from lmq_storage import ArtifactStore
from tests.flows.conftest import tiny_config

MENUS = {"5.5": ["mxfp4", "nvfp4", "b8g32"], "6.5": ["mxfp4", "fp8"]}
MENU = MENUS["5.5"]


@pytest.fixture(scope="module", params=MENUS)
def budget(request: pytest.FixtureRequest) -> str:
    """Bits per weight."""
    return request.param


@pytest.fixture(scope="module")
def planned(budget: str, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """The checkpoint of a solved plan."""
    place = tmp_path_factory.mktemp("planned")
    measure = {"menu": MENUS[budget], "quantizer": "fisher-gptq"}
    config = tiny_config(tiny_llama, place, target="vllm", strategies=["loss-aware"], budgets=[budget], measure=measure)
    preparation, nodes = preparation_graph(config, identify_models(config))
    node = nodes["tiny"]
    model = prepared_model(config, config.models[0], node, execute_directly(preparation)[node], "cpu")
    graph, variants, _ = build_graph(config, [model], identify_texts(config))
    refs = execute_directly(graph)
    variant = variants[-1]
    assert variant.checkpoint is not None
    return QuantizedCheckpoint(ArtifactStore(config.store).materialize(refs[variant.checkpoint], place / "checkpoint"))


def test_the_export_is_the_plan(budget: str, planned: QuantizedCheckpoint, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install 'lmq[vllm]'")
    assert {spec.name for spec in planned.specs.values()} == set(MENUS[budget])
    for layer in range(4):
        of_layer = {path.rpartition(".")[2]: spec for path, spec in planned.specs.items() if f"layers.{layer}." in path}
        assert of_layer["q_proj"] == of_layer["k_proj"] == of_layer["v_proj"]
        assert of_layer["gate_proj"] == of_layer["up_proj"]
    report, check = export_checked(planned, tmp_path / "out", "compressed-tensors", {})
    assert check.passed, check.failures
    assert {step.relative_error for path, step in report.steps.items() if planned.specs[path].gguf} == {0.0}
    stored = read_headers(report.path)
    written = sum(size_bytes(tensor) for name, tensor in stored.items() if "_proj.weight" in name)
    counted = sum(TARGETS["vllm"].size_bytes(spec, *planned.shapes[path]) for path, spec in planned.specs.items())
    assert written == counted <= float(budget) * sum(rows * columns for rows, columns in planned.shapes.values()) / 8


def test_what_other_programs_do_not_hold_is_said(budget: str, planned: QuantizedCheckpoint) -> None:
    found, unwritten = gguf.problems(planned), {"5.5": "nvfp4", "6.5": "fp8"}[budget]
    assert any(text.startswith(f"{unwritten}, which is not written to GGUF files: ") for text in found), found
    assert any("a type that is not written for gptq" in text for text in gptq.problems(planned))


def test_rows_that_floats_do_not_fit_are_said_before_work(tiny_llama: Path, tmp_path: Path) -> None:
    measure = {"menu": [*MENU, "q8_0"], "quantizer": "fisher-gptq"}
    config = tiny_config(
        tiny_llama, tmp_path, target="vllm", strategies=["uniform"], budgets=["uniform nvfp4"], measure=measure
    )
    (note,) = check_run(config)
    assert (
        note
        == "tiny: the target vllm leaves q8_0 out of the menu: a type that is not written for vllm, in every module"
    )
    measure = {"menu": ["nvfp4"], "quantizer": "hqq"}
    with pytest.raises(InputError, match="quantizer 'hqq', which finds no codes of nvfp4"):
        tiny_config(tiny_llama, tmp_path, strategies=["uniform"], budgets=["uniform nvfp4"], measure=measure)
