"""Learned rounding: a step against autograd in float64, and what it does to what leaves a block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lmq.checkpoint.learned_rounding import (
    LearnedBlocks,
    LearnedGrid,
    RoundingSchedule,
    channel_importance,
    learn_rounding,
    learned_matrix,
)
from lmq.errors import InputError, NotFiniteError
from lmq.formats.coded_grid import CodedGrid
from lmq.formats.gguf_types import GGUF_TYPES, GgufMatrix
from lmq.formats.groups import from_groups, to_groups
from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import LayerGrids, fit_grids
from lmq.measurement.replay import forward_block
from lmq.model.block_inputs import BlockInputs
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModuleId
from lmq.quantizers import quantizer
from lmq.quantizers.gguf_fit import nearest_matrix

SPEC = QuantSpec(2, 32)
MODULE = ModuleId(0, "linear")
PLAIN = BlockInputs((), {}, torch.device("cpu"), torch.float32)


class Block(nn.Module):
    """A linear layer and what comes after it."""

    def __init__(self, weight: Tensor, after: nn.Module):
        super().__init__()
        self.after = after
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight = nn.Parameter(weight.clone())

    def forward(self, hidden: Tensor) -> Tensor:
        return self.after(self.linear(hidden))  # type: ignore[no-any-return]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Rounded(torch.autograd.Function):
    """To the nearest whole number, as if it were not."""

    @staticmethod
    def forward(ctx, values: Tensor, top: int) -> Tensor:  # type: ignore[no-untyped-def]
        return values.round().clamp(0, top)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return gradient, None


@pytest.mark.parametrize(("columns", "axis"), [(64, 1), (48, 1), (64, 0)])
def test_a_step_is_that_of_signs_of_autograd(columns: int, axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where groups straddle rows, and run along the outputs."""
    monkeypatch.setattr("lmq.numerics.fast_matmul_dtype", lambda _: torch.float32)
    weight, hidden = _normal(columns, columns), _normal(3, 8, columns, seed=1)
    leaving = forward_block(Block(weight, nn.Tanh()), PLAIN, hidden, layer=0)
    grid = fit_grids(weight, [SPEC], quantizer("rtn", axis=axis))[SPEC]
    importance = _normal(columns, seed=2).square()
    schedule = RoundingSchedule(steps=1, sequences_per_step=2)

    scale, zero = (values.double().requires_grad_() for values in grid.decode())
    exact = to_groups(weight, 32, axis).double() / scale.detach()[:, None] + zero.detach()[:, None]
    codes = grid.codes(weight).double()
    position = torch.minimum(torch.maximum(exact, codes - 0.499), codes + 0.499).requires_grad_()
    rounded = (Rounded.apply(position, 3) - zero[:, None]) * scale[:, None]  # type: ignore[no-untyped-call]
    outputs = torch.tanh(hidden[:2].double() @ from_groups(rounded, grid.shape, axis).T)
    off = outputs - leaving[:2].double()
    sum((off[each].square() * importance.double()).mean() for each in range(2)).backward()  # type: ignore[union-attr]

    learned = learned_matrix(grid, weight)
    assert isinstance(learned, LearnedGrid)
    block = Block(weight, nn.Tanh())
    monkeypatch.setattr("lmq.checkpoint.learned_rounding.learned_matrix", lambda *_, integer_zeros: learned)
    learn_rounding(block, PLAIN, hidden, leaving, importance, {MODULE: {SPEC: grid}}, {MODULE: SPEC}, schedule)
    for moved, start, rate in (
        (learned.position, position, 0.005),
        (learned.zero, zero, 0.008),
        (learned.scale, scale, 0.001 * scale.detach()),
    ):
        assert start.grad is not None
        expected = start.detach() - rate * start.grad.sign()
        same = (moved - expected).abs() < 1e-5
        assert float(same.double().mean()) > 0.999  # the sign of what is next to 0 may be another


def test_channels_count_by_the_loss_gradient() -> None:
    gradient = _normal(6, 8, 4) * torch.tensor([1.0, 2, 4, 0])
    expected = gradient.double().square().mean((0, 1))
    torch.testing.assert_close(channel_importance(gradient), (expected / expected.mean()).float())
    assert channel_importance(torch.zeros(2, 3, 4)).tolist() == [1] * 4


def test_codes_begin_as_they_are_stored() -> None:
    """Also those that error feedback has put beside the nearest, and groups of zeros."""
    weight = _normal(8, 64)
    weight[1] = 0
    grid = fit_grids(weight, [SPEC], quantizer("rtn"))[SPEC]
    codes = torch.randint(0, 4, grid.codes(weight).shape, generator=torch.Generator().manual_seed(2))
    coded = CodedGrid.of(grid, from_groups(codes.to(torch.uint8), grid.shape, 1))
    learned = learned_matrix(coded, weight)
    assert torch.equal(learned.codes, codes.float())
    torch.testing.assert_close(learned.weight(), coded.round_trip(weight))
    stored = learned.stored()
    assert isinstance(stored, CodedGrid)
    assert torch.equal(stored.codes(weight), codes)
    assert not stored.round_trip(weight)[1].any()
    torch.testing.assert_close(stored.round_trip(weight), coded.round_trip(weight), rtol=0.02, atol=0.02)


@pytest.fixture
def layer(tiny_llama: Path) -> Iterator[tuple[nn.Module, BlockInputs, Tensor, Tensor, LayerGrids]]:
    """A block with what enters and leaves it, and its grids."""
    model = StreamedModel.open(tiny_llama, discover(tiny_llama))
    tokens = torch.randint(0, model.structure.vocabulary_size, (12, 32), generator=torch.Generator().manual_seed(3))
    entering, inputs = model.embed(tokens), model.block_inputs(32)[0]
    with model.block(0) as block:
        leaving = forward_block(block, inputs, entering, layer=0)
        modules = [info.id for info in model.structure.in_layer(0)]
        weights = {module: block.get_submodule(module.kind).get_parameter("weight").detach() for module in modules}
        grids = {module: fit_grids(weight, [SPEC], quantizer("hqq")) for module, weight in weights.items()}
        yield block, inputs, entering, leaving, grids


def _off(
    block: nn.Module,
    inputs: BlockInputs,
    entering: Tensor,
    leaving: Tensor,
    grids: LayerGrids,
    channels: slice = slice(None),
) -> float:
    weights = {module: block.get_submodule(module.kind).get_parameter("weight").detach() for module in grids}
    rounded = {f"{module.kind}.weight": by_spec[SPEC].round_trip(weights[module]) for module, by_spec in grids.items()}
    with torch.no_grad():
        found = [
            torch.func.functional_call(block, rounded, (hidden[None], *inputs.args), inputs.kwargs)
            for hidden in entering
        ]
    return float((torch.cat(found) - leaving)[..., channels].square().mean())


def test_what_leaves_a_block_is_nearer_on_other_text_as_stored(
    layer: tuple[nn.Module, BlockInputs, Tensor, Tensor, LayerGrids],
) -> None:
    block, inputs, entering, leaving, grids = layer
    allocation, alike = dict.fromkeys(grids, SPEC), torch.ones(leaving.shape[-1])
    schedule = RoundingSchedule(steps=40, weight_rate=0.02, sequences_per_step=4)
    before = _off(block, inputs, entering[8:], leaving[8:], grids)
    shares: list[float] = []
    found, errors = learn_rounding(
        block, inputs, entering[:8], leaving[:8], alike, grids, allocation, schedule, shares.append
    )
    assert len(errors) == 40
    assert shares[-1] == 1
    assert sorted(shares) == shares
    assert _off(block, inputs, entering[8:], leaving[8:], found) < 0.8 * before
    for module, by_spec in found.items():
        assert by_spec[SPEC].shape == grids[module][SPEC].shape


def test_channels_that_count_more_get_nearer(
    layer: tuple[nn.Module, BlockInputs, Tensor, Tensor, LayerGrids],
) -> None:
    block, inputs, entering, leaving, grids = layer
    channels, width = slice(0, leaving.shape[-1] // 4), leaving.shape[-1]
    uneven = torch.full((width,), 0.01)
    uneven[channels] = 1
    exact = {module: block.get_submodule(module.kind).get_parameter("weight").detach().clone() for module in grids}
    schedule = RoundingSchedule(steps=40, weight_rate=0.02, sequences_per_step=4)
    found = []
    for importance in (torch.ones(width), uneven):
        for module, weight in exact.items():
            block.get_submodule(module.kind).weight = nn.Parameter(weight.clone())
        allocation = dict.fromkeys(grids, SPEC)
        learned, _ = learn_rounding(block, inputs, entering, leaving, importance, grids, allocation, schedule)
        found.append(_off(block, inputs, entering, leaving, learned, channels))
    assert found[1] < 0.9 * found[0]


def test_whole_zeros_stay_whole(layer: tuple[nn.Module, BlockInputs, Tensor, Tensor, LayerGrids]) -> None:
    block, inputs, entering, leaving, _ = layer
    module = ModuleId(0, "self_attn.q_proj")
    weight = block.get_submodule(module.kind).get_parameter("weight").detach()
    grids = {module: fit_grids(weight, [SPEC], quantizer("rtn", integer_zeros=True))}
    schedule = RoundingSchedule(steps=10, weight_rate=0.05, integer_zeros=True)
    found, _ = learn_rounding(
        block, inputs, entering, leaving, torch.ones(leaving.shape[-1]), grids, {module: SPEC}, schedule
    )
    assert torch.equal(found[module][SPEC].decode()[1], grids[module][SPEC].decode()[1])
    assert not torch.equal(found[module][SPEC].codes(weight), grids[module][SPEC].codes(weight))


def test_bad_values_are_refused(layer: tuple[nn.Module, BlockInputs, Tensor, Tensor, LayerGrids]) -> None:
    with pytest.raises(InputError, match="steps = 0"):
        RoundingSchedule(steps=0)
    with pytest.raises(InputError, match="sequences_per_step = -1"):
        RoundingSchedule(sequences_per_step=-1)
    with pytest.raises(InputError, match=r"scale_rate = 0\.5"):
        RoundingSchedule(scale_rate=0.5)
    block, inputs, entering, leaving, grids = layer
    leaving[0, 0, 0] = torch.nan
    allocation, alike = dict.fromkeys(grids, SPEC), torch.ones(leaving.shape[-1])
    with pytest.raises(NotFiniteError, match="learned rounding at layer 0"):
        learn_rounding(block, inputs, entering, leaving, alike, grids, allocation, RoundingSchedule(steps=1))


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_a_step_on_a_type_is_that_of_signs_of_autograd(name: str) -> None:
    """Positions lie between the levels on both sides, which are not even in some types."""
    weight, gradient = _normal(16, 256), _normal(16, 256, seed=1)
    matrix = nearest_matrix(weight, torch.ones(256), GGUF_TYPES[name].of_rows(256))
    learned = learned_matrix(matrix, weight)
    assert isinstance(learned, LearnedBlocks)
    kind, start, position = matrix.kind, learned.grid, learned.position.clone()
    torch.testing.assert_close(learned.weight(), matrix.round_trip(weight))

    levels = torch.tensor(kind.levels, dtype=torch.float64)
    whole = position.double().requires_grad_()
    below = whole.detach().floor().clamp(0, len(levels) - 2).long()
    between = levels[below] + (whole - below) * (levels[below + 1] - levels[below])
    nearest = levels[position.round().clamp(0, len(levels) - 1).long()]
    unit = start.unit.double().requires_grad_()
    minimum_unit = None if start.minimum_unit is None else start.minimum_unit.double().requires_grad_()
    scale = (unit[:, None] * start.scales).view(-1, 1)
    made = (between + (nearest - between).detach()) * scale
    if minimum_unit is not None:
        made = made - (minimum_unit[:, None] * start.minima).view(-1, 1)
    torch.testing.assert_close(made.detach().float().view(16, 256), matrix.round_trip(weight))
    (made.view(16, 256) * gradient).sum().backward()

    learned.step(gradient, RoundingSchedule(), 0.5)
    assert whole.grad is not None
    expected = (position - 0.0025 * whole.grad.sign()).clamp(-0.5, len(levels) - 0.5)
    torch.testing.assert_close(learned.position, expected.float())
    for moved, first in ((learned.grid.unit, unit), (learned.grid.minimum_unit, minimum_unit)):
        if moved is not None and first is not None and first.grad is not None:
            rate = 0.0005 * (kind.unit is None)
            torch.testing.assert_close(
                moved, (first.detach() - rate * first.detach().abs() * first.grad.sign()).float()
            )


@pytest.mark.parametrize("name", ["q4_k", "iq4_nl", "nvfp4", "q3_k", "fp8"])
def test_what_leaves_a_block_is_nearer_in_a_type(name: str) -> None:
    """Inputs hang together, so that what one weight is off another can make up for."""
    weight = _normal(64, 256)
    hidden = _normal(32, 64, 32, seed=1) @ _normal(32, 256, seed=2) + 0.1 * _normal(32, 64, 256, seed=3)
    kind = GGUF_TYPES[name].of_rows(256)
    matrix = nearest_matrix(weight, torch.ones(256), kind)
    spec, block = QuantSpec.parse(name), Block(weight, nn.Identity())
    leaving = hidden @ weight.T
    grids: LayerGrids = {MODULE: {spec: matrix}}
    found, _ = learn_rounding(
        block, PLAIN, hidden[:24], leaving[:24], torch.ones(64), grids, {MODULE: spec}, RoundingSchedule()
    )
    stored = found[MODULE][spec]
    assert isinstance(stored, GgufMatrix)
    assert stored.kind == kind
    learned, nearest = (
        float((hidden[24:] @ each.round_trip(weight).T - leaving[24:]).square().mean()) for each in (stored, matrix)
    )
    assert learned < 0.7 * nearest
