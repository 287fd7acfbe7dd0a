"""Polish: gradients against autograd through a plain model, Adam against torch's, and what it does to divergence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lmq.checkpoint.polish import Polish, PolishSchedule, TunedGrid, polish_file
from lmq.errors import DamagedFile, InputError
from lmq.formats.coded_grid import CodedGrid
from lmq.formats.groups import Grid, from_groups
from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import fit_grids
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModuleId
from lmq.quantizers import quantizer

SPEC = QuantSpec(2, 32)
Grids = dict[int, dict[ModuleId, dict[QuantSpec, Grid]]]


@pytest.fixture
def model(tiny_llama: Path) -> StreamedModel:
    return StreamedModel.open(tiny_llama, discover(tiny_llama))


@pytest.fixture
def grids(model: StreamedModel) -> Grids:
    found: Grids = {}
    for layer in range(model.structure.layers):
        with model.block(layer) as block:
            found[layer] = {
                module.id: fit_grids(
                    block.get_submodule(module.id.kind).get_parameter("weight").detach(), [SPEC], quantizer("hqq")
                )
                for module in model.structure.in_layer(layer)
            }
    return found


@pytest.fixture
def tokens(model: StreamedModel) -> Tensor:
    size = (8, 24)
    return torch.randint(0, model.structure.vocabulary_size, size, generator=torch.Generator().manual_seed(3))


def _allocation(model: StreamedModel) -> dict[ModuleId, QuantSpec]:
    return {module.id: SPEC for module in model.structure.modules}


def _divergence(model: StreamedModel, source, tokens: Tensor, reference: Tensor) -> float:  # type: ignore[no-untyped-def]
    return float(QuantizedPoint(model, source).divergences(tokens, reference, _allocation(model)).mean())


def test_one_step_is_that_of_autograd_and_of_adam(
    model: StreamedModel,
    grids: Grids,
    tokens: Tensor,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole model in memory, weights made of scales and zeros by plain operations, all in float32."""
    monkeypatch.setattr("lmq.numerics.fast_matmul_dtype", lambda _: torch.float32)
    schedule = PolishSchedule(steps=10, sequences_per_step=8, rate=0.004)
    reference_model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    full = reference_model(input_ids=tokens).logits[:, :-1].log_softmax(-1).detach()
    scales, zeros = {}, {}
    parametrized = {}
    for by_module in grids.values():
        for module, by_spec in by_module.items():
            grid = by_spec[SPEC]
            scale, zero = (values.clone().requires_grad_(True) for values in grid.decode())
            scales[module], zeros[module] = scale, zero
            codes = grid.codes(reference_model.get_submodule(f"model.layers.{module.layer}.{module.kind}").weight)
            weight = from_groups((codes.float() - zero[:, None]) * scale[:, None], grid.shape, grid.axis)
            parametrized[f"model.layers.{module.layer}.{module.kind}.weight"] = weight
    logits = torch.func.functional_call(reference_model, parametrized, kwargs={"input_ids": tokens}).logits[:, :-1]
    divergence = (full.exp() * (full - logits.log_softmax(-1))).sum(-1)
    divergence.sum().backward()
    first_rate = schedule.rate_at(0)
    groups = [{"params": [scale], "lr": first_rate * float(scale.detach().median())} for scale in scales.values()]
    groups += [{"params": [zero], "lr": first_rate * 8} for zero in zeros.values()]
    torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12).step()

    reference = QuantizedPoint(model, lambda _: {}).last_states(tokens)
    polish = Polish(model, _allocation(model), tmp_path, schedule)
    polish.start(grids.__getitem__)
    (found,) = polish.run(0, 1, tokens, reference)
    assert found == pytest.approx(float(divergence.detach().mean()), rel=1e-4)
    for layer in grids:
        for module, by_spec in polish._tuned(layer).items():
            state = by_spec[SPEC].state
            start_scale, start_zero = grids[layer][module][SPEC].decode()
            for moved, expected, start in (
                (state["scale"], scales[module], start_scale),
                (state["zero"], zeros[module], start_zero),
            ):
                # the first step of Adam is the sign of the gradient: where that is next to 0 rounding decides it
                same = ((moved - start) - (expected.detach() - start)).abs() < 1e-3 * (moved - start).abs().max()
                assert float(same.double().mean()) > 0.99


def test_divergence_falls_and_stays_down_when_stored(
    model: StreamedModel, grids: Grids, tokens: Tensor, tmp_path: Path
) -> None:
    reference = QuantizedPoint(model, lambda _: {}).last_states(tokens)
    polish = Polish(model, _allocation(model), tmp_path, PolishSchedule(steps=30, sequences_per_step=4, rate=0.01))
    polish.start(grids.__getitem__)
    before = _divergence(model, grids.__getitem__, tokens, reference)
    assert _divergence(model, polish._tuned, tokens, reference) == pytest.approx(before, rel=1e-6)
    list(polish.run(0, 30, tokens, reference))
    tuned = _divergence(model, polish._tuned, tokens, reference)
    stored = _divergence(model, polish.stored, tokens, reference)
    assert tuned < 0.8 * before
    assert stored < tuned + 0.1 * (before - tuned)
    for layer, by_module in grids.items():
        for module, by_spec in polish.stored(layer).items():
            coded = by_spec[SPEC]
            assert isinstance(coded, CodedGrid)
            with model.block(layer) as block:
                weight = block.get_submodule(module.kind).get_parameter("weight").detach()
                assert torch.equal(coded.codes(weight), by_module[module][SPEC].codes(weight))


def test_steps_in_two_parts_are_the_steps_in_one(
    model: StreamedModel, grids: Grids, tokens: Tensor, tmp_path: Path
) -> None:
    reference = QuantizedPoint(model, lambda _: {}).last_states(tokens)
    schedule = PolishSchedule(steps=4, sequences_per_step=2)
    states = []
    for parts in ([(0, 4)], [(0, 1), (1, 4)]):
        folder = tmp_path / str(len(parts))
        folder.mkdir()
        Polish(model, _allocation(model), folder, schedule).start(grids.__getitem__)
        divergences = [
            divergence
            for first, last in parts
            for divergence in Polish(model, _allocation(model), folder, schedule).run(first, last, tokens, reference)
        ]
        states.append((divergences, [(folder / polish_file(layer)).read_bytes() for layer in grids]))
    assert states[0] == states[1]


def test_groups_of_zeros_stay_and_scales_keep_their_sign() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    grid = fit_grids(weight, [SPEC], quantizer("rtn"))[SPEC]
    tuned = TunedGrid.of(grid, weight)
    for number in range(50):
        tuned.step(torch.full((4, 64), 1e3), number, 0.9, tune_zeros=True)
    assert not tuned.round_trip(weight)[1].any()
    assert bool((tuned.state["scale"] >= 0).all())
    stored = tuned.stored(integer_zeros=False)
    assert torch.equal(stored.codes(weight), grid.codes(weight))
    assert bool(stored.round_trip(weight).isfinite().all())


def test_whole_zeros_stay_whole() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    chosen = quantizer("rtn", integer_zeros=True)
    grid = fit_grids(weight, [SPEC], chosen)[SPEC]
    tuned = TunedGrid.of(grid, weight)
    tuned.step(torch.randn(4, 64), 0, 0.01, tune_zeros=False)
    assert torch.equal(tuned.stored(integer_zeros=True).decode()[1], grid.decode()[1])


def test_sequences_take_turns_and_rates_end_at_zero() -> None:
    schedule = PolishSchedule(steps=10, sequences_per_step=2)
    assert schedule.sequences_of(0, 5).tolist() == [0, 1]
    assert schedule.sequences_of(2, 5).tolist() == [4, 0]
    rates = [schedule.rate_at(step) for step in range(11)]
    assert rates[0] == pytest.approx(schedule.rate / 5)
    assert max(rates) < schedule.rate
    assert rates[10] == pytest.approx(0, abs=1e-12)


def test_bad_values_and_damaged_states_are_refused(model: StreamedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="steps = 0"):
        PolishSchedule(steps=0)
    with pytest.raises(InputError, match="rate = 2"):
        PolishSchedule(rate=2)
    (tmp_path / polish_file(0)).write_bytes(b"none")
    with pytest.raises(DamagedFile, match="polish-000"):
        Polish(model, _allocation(model), tmp_path, PolishSchedule()).stored(0)
