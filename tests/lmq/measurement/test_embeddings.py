"""Grids and costs of input embedding and output head against dense computations in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmq.errors import InputError, NotFiniteError
from lmq.formats.groups import encode
from lmq.formats.packed_layer import quantize_weight
from lmq.formats.spec import QuantSpec
from lmq.measurement.embeddings import (
    HeadCost,
    HeadSample,
    LookupChanges,
    column_weights,
    fisher_rows,
    fit_rows,
    frobenius_row,
    quantize_rows,
    row_errors,
)
from lmq.measurement.frobenius import frobenius_errors
from lmq.measurement.replay import backward_block
from lmq.model import stored_matrices
from lmq.model.discovery import discover
from lmq.model.stored_matrices import stored_matrix
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure, ModuleInfo
from lmq.quantizers import quantizer

MENU = [QuantSpec(3, 64), QuantSpec(4, 128), QuantSpec(6, 32), QuantSpec(8, 256)]
TOKENS = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(3))


def _structure(model: Path) -> ModelStructure:
    return discover(model, weights_sha256="not needed", embeddings=True)


def _weight(model: Path, structure: ModelStructure, module: ModuleInfo) -> Tensor:
    return torch.cat([block for _, block in stored_matrix(model, structure, module).blocks()])


def _open(model: Path) -> PreTrainedModel:
    """In float64, its head untied."""
    opened = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    head = opened.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    return opened


def _states(model: StreamedModel) -> list[Tensor]:
    states, inputs = [model.embed(TOKENS)], model.block_inputs(TOKENS.shape[1])
    for layer in range(model.structure.layers):
        with model.block(layer) as block, torch.no_grad():
            states.append(inputs[layer].run(block, states[-1]))
    return states


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 48 rows of 64, or what whole groups need."""
    monkeypatch.setattr(stored_matrices, "_MATRIX_ELEMENTS_AT_ONCE", 48 * 64)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gemma"])  # that of Gemma soft-caps its logits
def test_cost_of_a_head_is_the_divergence_of_a_small_change(model: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(model)
    streamed = StreamedModel.open(path, _structure(path))
    last = _states(streamed)[-1]
    error = torch.randn(512, 64, generator=torch.Generator().manual_seed(5))
    cost = HeadCost(HeadSample.of(streamed, last))
    for rows in torch.arange(512).split(100):
        piece = slice(int(rows[0]), int(rows[-1]) + 1)
        cost.add(piece, error[piece])
    whole, step = _open(path), 1e-4
    with torch.no_grad():
        expected = whole(TOKENS).logits[:, :-1].log_softmax(-1)
        whole.get_output_embeddings().weight.add_(step * error.double())
        changed = whole(TOKENS).logits[:, :-1].log_softmax(-1)
    divergence = (expected.exp() * (expected - changed)).sum(-1).mean() / step**2
    assert cost.value == pytest.approx(divergence.item(), rel=0.01)  # probabilities are kept in bfloat16


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen", "tiny_gemma"])  # that of Gemma scales its rows
def test_changes_by_lookups_are_those_of_the_gradient_of_the_table(model: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(model)
    streamed = StreamedModel.open(path, _structure(path))
    states, inputs = _states(streamed), streamed.block_inputs(TOKENS.shape[1])
    gradient = streamed.loss_gradient(states[-1], TOKENS).gradient
    for layer in reversed(range(streamed.structure.layers)):
        with streamed.block(layer) as block:
            gradient = backward_block(block, inputs[layer], states[layer], gradient, layer=layer)
    error = torch.randn(512, 64, generator=torch.Generator().manual_seed(6))
    changes = LookupChanges(TOKENS, streamed.embedding_gradient(TOKENS, gradient))
    for rows in torch.arange(512).split(100):
        piece = slice(int(rows[0]), int(rows[-1]) + 1)
        changes.add(piece, error[piece])
    whole = _open(path)
    table = whole.get_input_embeddings().weight
    assert table is not whole.get_output_embeddings().weight
    for sequence, found in zip(TOKENS, changes.value, strict=True):
        logits = whole(sequence[None]).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, sequence[1:], reduction="sum")
        (of_table,) = torch.autograd.grad(loss, table)
        assert found.item() == pytest.approx((of_table * error).sum().item(), rel=1e-3, abs=1e-4)


def test_a_tied_matrix_pays_for_both(tiny_qwen: Path) -> None:
    structure = _structure(tiny_qwen)
    streamed = StreamedModel.open(tiny_qwen, structure)
    (tied,) = structure.embeddings
    sample = HeadSample.of(streamed, _states(streamed)[-1])
    gradient = torch.randn(2 * 3, 20, 64, generator=torch.Generator().manual_seed(8))
    matrix = stored_matrix(tiny_qwen, structure, tied)
    grids = fit_rows(matrix, MENU, quantizer("rtn"), None)
    costs = {
        part: [
            row["fisher"]
            for row in fisher_rows(
                ModuleInfo(tied.id, 512, 64, part), matrix, grids, sample=sample, token_ids=TOKENS, gradient=gradient
            )
        ]
        for part in ("embedding", "head", "tied")
    }
    sums = [sum(pair) for pair in zip(costs["embedding"], costs["head"], strict=True)]
    assert costs["tied"] == pytest.approx(sums)
    weights = {
        part: column_weights(ModuleInfo(tied.id, 512, 64, part), sample, gradient, fisher_weighted=True)
        for part in ("embedding", "head", "tied")
    }
    assert torch.allclose(weights["tied"], weights["embedding"] + weights["head"])
    assert torch.allclose(weights["embedding"], (gradient.square().sum((0, 1)) / (6 * 19)))


def test_column_weights_of_a_head_are_the_diagonal_of_its_fisher_matrix(tiny_llama: Path) -> None:
    structure = _structure(tiny_llama)
    streamed = StreamedModel.open(tiny_llama, structure)
    last = _states(streamed)[-1]
    sample = HeadSample.of(streamed, last)
    whole = _open(tiny_llama)
    inputs: list[Tensor] = []
    whole.get_output_embeddings().register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        probabilities = whole(TOKENS).logits[:, :-1].softmax(-1)
    seen = inputs[0][:, :-1]
    of_rows = torch.einsum("stv,sti->vi", probabilities * (1 - probabilities), seen.square()) / (3 * 19)
    found = column_weights(structure.embeddings[1], sample, None, fisher_weighted=True)
    assert torch.allclose(found.double(), of_rows.sum(0), rtol=0.01)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("name", ["rtn", "fisher-gptq"])
def test_rows_are_fitted_and_stored_as_the_whole_matrix_is(name: str, tiny_llama: Path) -> None:
    structure = _structure(tiny_llama)
    module = structure.embeddings[0]
    matrix, weight = stored_matrix(tiny_llama, structure, module), _weight(tiny_llama, structure, module)
    chosen = quantizer(name)
    columns = torch.rand(64, generator=torch.Generator().manual_seed(2))
    grids = fit_rows(matrix, MENU, chosen, columns if name == "fisher-gptq" else None)
    assert len(list(matrix.blocks())) > 8
    for spec, grid in grids.items():
        if name == "rtn":
            expected = encode(weight, *chosen.fit(weight, spec), spec, 1)
        else:
            (by_spec,) = quantizer("weighted").quantize(weight[None], torch.diag(columns)[None], [spec])
            expected = by_spec[spec]
        stored, whole = quantize_rows(matrix, grid), quantize_weight(weight, expected)
        assert all(torch.equal(stored[key], whole[key]) for key in whole)
        errors = torch.cat([error for _, _, error in row_errors(matrix, grid)])
        assert torch.equal(errors, expected.round_trip(weight) - weight)
        row = frobenius_row(module, matrix, spec, grid)
        assert row["frobenius_error"] == pytest.approx(frobenius_errors(weight, [expected])[0])
        assert row["size_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def test_quantizers_that_do_not_suit_are_refused(tiny_llama: Path) -> None:
    structure = _structure(tiny_llama)
    matrix = stored_matrix(tiny_llama, structure, structure.embeddings[0])
    with pytest.raises(InputError, match=r"set measure\.axis to 1"):
        fit_rows(matrix, MENU, quantizer("hqq", axis=0), None)
    with pytest.raises(InputError, match="'fisher-gptq' needs column weights"):
        fit_rows(matrix, MENU, quantizer("fisher-gptq"), None)


def test_a_table_with_nan_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.get_input_embeddings().weight.data[17, 3] = torch.nan
    model.save_pretrained(tmp_path)
    structure = _structure(tmp_path)
    with pytest.raises(NotFiniteError, match=r"the weight of model\.embed_tokens"):
        fit_rows(stored_matrix(tmp_path, structure, structure.embeddings[0]), MENU, quantizer("rtn"), None)
