"""A run with the target llama.cpp: what is planned, what the checkpoint holds and what the GGUF file holds are one."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lmq
from lmq.checkpoint.write import quantized_bytes
from lmq.errors import InputError
from lmq.export import compressed_tensors, dense, hqq
from lmq.export.gguf import export
from lmq.export.openers import open_export
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.gguf_types import GGUF_TYPES
from lmq.formats.spec import QuantSpec
from lmq_flows.graph.build import build_graph
from lmq_flows.graph.direct import execute_directly
from lmq_flows.run.plan import check_run
from lmq_flows.run.prepare import identify_models, identify_texts, preparation_graph, prepared_model
from lmq_storage import ArtifactStore
from tests.flows.conftest import tiny_config

TOKENS = torch.tensor([[5, 17, 300, 42, 7, 99, 411, 256]])


@pytest.fixture(scope="module")
def two_widths(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 weights, and of 288 that K types do not fit; tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("two-widths")
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def planned(two_widths: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """The checkpoint of a solved plan with learned rounding, embeddings included."""
    place = tmp_path_factory.mktemp("planned")
    config = tiny_config(
        two_widths,
        place,
        target="llama.cpp",
        embeddings=True,
        strategies=["loss-aware"],
        budgets=["4.9"],
        measure={"quantizer": "fisher-gptq"},
        learned_rounding={"steps": 8},
    )
    preparation, nodes = preparation_graph(config, identify_models(config))
    node = nodes["tiny"]
    model = prepared_model(config, config.models[0], node, execute_directly(preparation)[node], "cpu")
    graph, variants, _ = build_graph(config, [model], identify_texts(config))
    refs = execute_directly(graph)
    variant = variants[-1]
    assert variant.checkpoint is not None
    return QuantizedCheckpoint(ArtifactStore(config.store).materialize(refs[variant.checkpoint], place / "checkpoint"))


def test_every_matrix_has_a_type_within_the_budget(planned: QuantizedCheckpoint) -> None:
    names = {spec.name for spec in planned.specs.values()}
    assert len(names) > 1
    assert names <= set(GGUF_TYPES)
    assert planned.embeddings == ["model.embed_tokens"]
    weights = sum(rows * columns for rows, columns in planned.shapes.values())
    counted = sum(
        spec.size_bytes(rows * columns, columns)
        for spec, (rows, columns) in zip(planned.specs.values(), planned.shapes.values(), strict=True)
    )
    assert quantized_bytes(planned.path) == counted <= 4.9 * weights / 8


def test_the_checkpoint_opens_and_computes_with_what_its_blocks_stand_for(planned: QuantizedCheckpoint) -> None:
    packed, dense = lmq.load(planned.path), lmq.load(planned.path, dense=True)
    with torch.no_grad():
        torch.testing.assert_close(packed(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-5)
    for path, spec in planned.specs.items():
        assert spec.gguf is not None
        stored = planned.blocks(path)
        number = gguf.GGMLQuantizationType[stored.kind.name.upper()]
        expected = gguf.quants.dequantize(stored.blocks.numpy(), number)
        assert torch.equal(dense.get_submodule(path).get_parameter("weight"), torch.from_numpy(expected))


def test_the_file_holds_the_planned_bytes(planned: QuantizedCheckpoint, tmp_path: Path) -> None:
    report = export(planned, tmp_path / "m.gguf")
    assert {step.relative_error for step in report.steps.values()} == {0.0}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(report.path).tensors}
    # rows of projections that rotate are stored in another order; of the others the bytes are the planned ones
    down = "model.layers.1.mlp.down_proj"
    assert (tensors["blk.1.ffn_down.weight"].data == planned.blocks(down).blocks.numpy()).all()
    assert (tensors["token_embd.weight"].data == planned.blocks("model.embed_tokens").blocks.numpy()).all()
    assert sum(tensor.n_bytes for tensor in tensors.values() if tensor.name.endswith("weight")) == (
        quantized_bytes(planned.path) + sum(t.n_bytes for t in tensors.values() if "norm" in t.name)
    )
    with torch.no_grad():
        opened, own = open_export(report, "gguf")(TOKENS).logits, lmq.load(planned.path, dense=True)(TOKENS).logits
    torch.testing.assert_close(opened.float(), own.float(), rtol=1e-4, atol=1e-4)


def test_what_becomes_another_type_is_said_before_work(two_widths: Path, tmp_path: Path) -> None:
    measure = {"menu": ["q4_k", "q8_0", "b4g64"], "quantizer": "fisher-gptq"}
    config = tiny_config(
        two_widths, tmp_path, target="llama.cpp", strategies=["loss-aware"], budgets=["uniform q4_k"], measure=measure
    )
    own, fallback = check_run(config)
    assert "the target llama.cpp leaves b4g64 out of the menu: grids of lmq's own" in own
    assert "q4_k is q5_0 where rows of 288 weights are no multiple of 256" in fallback
    assert fallback.endswith("2 modules (layers 0-1: mlp.down_proj)")


def test_a_model_that_llama_cpp_computes_otherwise_is_refused_before_work(tiny_gemma: Path, tmp_path: Path) -> None:
    measure = {"quantizer": "gptq"}
    options = {"target": "llama.cpp", "strategies": ["loss-aware"], "budgets": ["uniform q4_k"], "measure": measure}
    with pytest.raises(InputError, match=r"tiny cannot become a file for llama\.cpp: .*softcapping is 30"):
        check_run(tiny_config(tiny_gemma, tmp_path, **options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"strategies": ["mxq"], "measure": {"quantizer": "hqq"}},
            "'mxq' has quantizer 'hqq', which finds no codes of q2_k; those that do: weighted",
        ),
        (
            {"polish": {"steps": 2}, "measure": {"quantizer": "gptq"}},
            "polish tunes scales and zeros of lmq's own grids, not those of q2_k",
        ),
        ({"measure": {"axis": 0, "quantizer": "gptq"}}, "q2_k groups weights along in_features; set measure.axis to 1"),
        ({"target": None, "measure": {"menu": ["q4_k"]}, "strategies": ["mxq"]}, "finds no codes of q4_k"),
    ],
)
def test_what_does_not_suit_the_types_is_refused(
    two_widths: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        tiny_config(two_widths, tmp_path, **{"target": "llama.cpp", "strategies": ["loss-aware"], **changes})
    assert message in str(caught.value)


def test_a_plan_can_be_uniform_in_a_type() -> None:
    assert QuantSpec.parse("q4_k").name == "q4_k"
    with pytest.raises(InputError, match="or a type: q4_0, q4_1"):
        QuantSpec.parse("q4_x")


def test_llama_cpp_computes_with_the_file_what_lmq_computes(planned: QuantizedCheckpoint, tmp_path: Path) -> None:
    """But for what llama.cpp rounds besides: the inputs of every product, to 8 bits."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install 'lmq[llama]' to have llama.cpp open the file")
    report = export(planned, tmp_path / "m.gguf")
    model = llama_cpp.Llama(str(report.path), n_ctx=32, n_threads=1, logits_all=True, verbose=False)
    try:
        model.eval(TOKENS[0].tolist())
        found = torch.from_numpy(model.scores[: TOKENS.shape[1]].copy())
    finally:
        model.close()
    with torch.no_grad():
        own = lmq.load(planned.path, dense=True)(TOKENS).logits[0].float()
    assert (found - own).norm() / own.norm() < 0.02
    assert torch.equal(found.argmax(1), own.argmax(1))


def test_other_exports_say_that_they_hold_no_such_type(planned: QuantizedCheckpoint, tmp_path: Path) -> None:
    assert any("is a type that hqq does not hold" in text for text in hqq.problems(planned))
    assert any("a type that is not written for vllm" in text for text in compressed_tensors.problems(planned))
    report = dense.export(planned, tmp_path / "dense", dtype="float32")
    opened = open_export(report, "safetensors")
    for path in planned.specs:
        assert torch.equal(opened.get_submodule(path).get_parameter("weight"), planned.weight(path))
