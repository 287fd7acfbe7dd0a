"""Runs that quantize input embedding and output head too, without Prefect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lmq
from lmq.checkpoint.verify import find_damage, quantized_bytes
from lmq.errors import InputError
from lmq.evaluation.perplexity import Window
from lmq.evaluation.windows import WINDOWS_SCHEMA, summarize
from lmq.formats.packed_layer import QuantizedEmbedding, QuantizedLinear, TiedHead
from lmq.measurement.grids import load_grids
from lmq.measurement.sequence_fisher import SEQUENCE_FISHER
from lmq.model.stored_matrices import stored_matrix
from lmq.model.structure import EMBEDDINGS
from lmq.tables import read_rows
from lmq.text.calibration import TextSource, documents, load_tokenizer, token_stream
from lmq_flows.config.run import RunConfig
from lmq_flows.graph.build import build_graph
from lmq_flows.graph.node import Node
from lmq_flows.run.plan import execute_directly, ready_models
from lmq_storage import ArtifactRef, ArtifactStore
from lmq_tasks.allocate import ALLOCATION_FILE, SOLUTION_FILE, read_configurations
from tests.flows.conftest import tiny_config


def _config(model: Path, place: Path, **changes: object) -> RunConfig:
    plans = {"strategies": ["uniform", "mxq", "loss-aware"], "measure__menu": ["b3g64", "b4g64", "b6g64"]}
    return tiny_config(model, place, **{"embeddings": True, "budgets": ["uniform b4g64"], **plans, **changes})


def _file(store: ArtifactStore, refs: dict[Node, ArtifactRef], node: Node | None, file: str) -> Path:
    assert node is not None
    return store.path(refs[node], file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "parts"), [("tiny_llama", ["embedding", "head"]), ("tiny_qwen", ["tied"]), ("tiny_gemma", ["tied"])]
)
def test_a_checkpoint_holds_them_packed_and_computes_what_was_judged(
    model: str, parts: list[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    # of 3 sequences the costs of 3 and 4 bits are too uncertain to compare
    text = {"sequences": 16, "sequence_length": 32}
    config = _config(request.getfixturevalue(model), tmp_path, calibration=text)
    (prepared,), texts = ready_models(config)
    structure = prepared.structure
    assert [module.part for module in structure.embeddings] == parts
    graph, variants, measured = build_graph(config, [prepared], texts)
    refs = execute_directly(graph)
    store = ArtifactStore(config.store)
    costs = {
        (row["layer"], row["kind"], row["bits"]): row["fisher"]
        for node in measured["tiny"].tables["sequence_fisher"]
        for row in read_rows(_file(store, refs, node, SEQUENCE_FISHER.file), SEQUENCE_FISHER.schema)
    }
    for module in structure.embeddings:
        by_bits = [costs[EMBEDDINGS, module.id.kind, bits] for bits in (3, 4, 6)]
        assert by_bits == sorted(by_bits, reverse=True)
        assert by_bits[-1] > 0
    found = {}
    for variant in variants[1:]:
        checkpoint = store.materialize(refs[variant.checkpoint], tmp_path / variant.strategy_label)
        assert not list(find_damage(checkpoint))
        allocation = read_configurations(_file(store, refs, variant.allocation, ALLOCATION_FILE))
        assert allocation.keys() == {module.id for module in structure.quantized}
        solution = json.loads(_file(store, refs, variant.allocation, SOLUTION_FILE).read_text())
        assert quantized_bytes(checkpoint) == solution["size_bytes"] <= variant.budget_bytes
        opened = lmq.load(checkpoint, dtype=torch.float32)
        table, head = opened.get_input_embeddings(), opened.get_output_embeddings()
        assert isinstance(table, QuantizedEmbedding)
        assert isinstance(head, TiedHead if parts == ["tied"] else QuantizedLinear)
        matrix = stored_matrix(Path(config.models[0].source), structure, structure.embeddings[0])
        grids = load_grids(_file(store, refs, measured["tiny"].grids[-1], "grids.safetensors"))
        chosen = grids[structure.embeddings[0].id][allocation[structure.embeddings[0].id]]
        weight = torch.cat([block for _, block in matrix.blocks()])
        assert torch.equal(table.dequantize(), chosen.round_trip(weight))
        row = read_rows(_file(store, refs, variant.evaluation, "windows.parquet"), WINDOWS_SCHEMA)[0]
        assert _loss(opened, config, row) == pytest.approx(row["nll_sum"], rel=1e-4)
        dense = lmq.load(checkpoint, dtype=torch.float32, dense=True)
        assert type(dense.get_output_embeddings()) is nn.Linear
        assert _loss(dense, config, row) == pytest.approx(row["nll_sum"], rel=1e-4)
        found[variant.strategy_label] = allocation
        divergence = summarize(read_rows(_file(store, refs, variant.evaluation, "windows.parquet"), WINDOWS_SCHEMA))
        assert divergence.kl_divergence.value > 0
    assert len(set(found["uniform"].values())) == 1
    assert len(set(found["loss-aware"].values())) > 1
    for module in structure.embeddings:  # nothing that mxq looks at says what they matter
        assert found["mxq"][module.id] == found["uniform"][module.id]


def _loss(model: nn.Module, config: RunConfig, row: dict[str, object]) -> float:
    """Summed loss of the last tokens of the first window, by a plain forward."""
    tokenizer = load_tokenizer(Path(config.models[0].source))
    source = TextSource(source="pydoc-topics", part="second", seed=42)
    stream = token_stream(documents(source, tokenizer), tokenizer, config.evaluation.tokens)
    seen = torch.tensor([*row["prefix"], *stream[row["start"] : row["end"]].tolist()])
    with torch.no_grad():
        logits = model(seen[None]).logits[0].double()
    scored = Window(row["start"], row["end"], row["fresh"]).scored
    losses = nn.functional.cross_entropy(logits[:-1], seen[1:], reduction="none")
    return float(losses[-scored:].sum())


def test_runs_that_do_not_ask_keep_their_keys(tiny_qwen: Path, tmp_path: Path) -> None:
    plain, asked = _config(tiny_qwen, tmp_path, embeddings=False), _config(tiny_qwen, tmp_path)
    (without,), texts = ready_models(plain)
    assert without.structure.embeddings == ()
    assert "embeddings" not in without.structure.to_json()
    graph, _, _ = build_graph(plain, [without], texts)
    assert not [node for node in graph if node.stage.name.startswith("embedding")]
    (within,), _ = ready_models(asked)
    assert within.structure.parameters == without.structure.parameters + 512 * 64
    assert within.structure.other_bytes == without.structure.other_bytes - 512 * 64 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure__axis": 0}, "set measure.axis to 1"),
        ({"baselines": ["rtn b4g64"]}, "baseline 'rtn b4g64' rounds no embeddings"),
        ({"target": "vllm", "strategies": ["loss-aware"]}, "target 'vllm' holds no quantized embeddings"),
        (
            {"constraints": {"fixed": {"*.q_proj": "b6g64"}}, "strategies": ["mxq"]},
            "strategy 'mxq' keeps no constraints",
        ),
    ],
)
def test_what_does_not_go_with_them_is_refused(
    changes: dict[str, object], message: str, tiny_qwen: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        _config(tiny_qwen, tmp_path, **changes)
