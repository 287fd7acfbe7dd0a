"""Codes of GGUF types: grids against other quantizers and a search, error feedback against a loop in float64."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from lmq.errors import InputError
from lmq.formats.gguf_types import GGUF_TYPES, LLAMA_CPP_TYPES, GgufMatrix, GgufType, decode_blocks, unpack_blocks
from lmq.formats.spec import QuantSpec
from lmq.quantizers import quantizer
from lmq.quantizers.coordinate_descent import descend_gguf
from lmq.quantizers.error_feedback import Lattice, codes_with_feedback, damped_moments, feedback_of
from lmq.quantizers.gguf_fit import fit_type, nearest_matrix, steps_of
from tests.lmq.random_matrices import correlated_moments

ROWS, COLUMNS = 24, 512


@pytest.fixture(scope="module")
def weight() -> Tensor:
    """Heavy-tailed, of other spread in every row."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(ROWS, 1, generator=generator) + 0.2
    return torch.randn(ROWS, COLUMNS, generator=generator) * spread * torch.rand(ROWS, COLUMNS, generator=generator)


@pytest.fixture(scope="module")
def moments() -> Tensor:
    return correlated_moments(COLUMNS)


def spec_of(name: str) -> QuantSpec:
    return QuantSpec.parse(name)


def covering_unit(kind: GgufType, values: np.ndarray) -> np.ndarray:
    """The least value above or at one that d can have."""
    if kind.unit is None:
        return values.astype(np.float16).astype(np.float32)
    fraction, exponent = np.frexp(values)
    steps = 2.0 ** (kind.unit.mantissa + 1)
    return np.ldexp(np.ceil(fraction * steps) / steps, exponent).astype(np.float32)


def weighted_error(matrix: GgufMatrix, weight: Tensor, importance: Tensor) -> float:
    return float(((matrix.dequantize() - weight).double().square() * importance.double()).sum())


def cost(matrix: GgufMatrix, weight: Tensor, moments: Tensor) -> float:
    error = (matrix.dequantize() - weight).double()
    return float((error @ moments.double() * error).sum())


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"])
def test_grids_lose_no_more_than_those_of_the_gguf_package(name: str, weight: Tensor) -> None:
    """Its grids are those that llama.cpp takes without an importance matrix."""
    number = GGMLQuantizationType[name.upper()]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), number), number)
    ours = nearest_matrix(weight, torch.ones(COLUMNS), GGUF_TYPES[name]).dequantize()
    assert (ours - weight).square().sum() <= (torch.from_numpy(theirs) - weight).square().sum()


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_grids_lose_no_more_than_a_search_over_units(name: str, weight: Tensor, moments: Tensor) -> None:
    """Every group's min-max grid, its block's unit the largest scale by the largest integer, nearest integers."""
    kind, importance = GGUF_TYPES[name].of_rows(COLUMNS), moments.diagonal()
    ours = weighted_error(nearest_matrix(weight, importance, kind), weight, importance)
    groups = weight.view(-1, kind.groups_per_block, kind.group_size).numpy()
    levels = np.array(kind.levels, np.float32)
    if kind.has_minimum:
        low = groups.min(2) if kind.minima is None else np.minimum(groups.min(2), 0)
        scale, minimum = (groups.max(2) - low) / levels[-1], -low
    else:
        scale, minimum = np.abs(groups).max(2) / np.abs(levels).max(), np.zeros_like(groups[..., 0])
    for integers, values in ((kind.scales, scale), (kind.minima, minimum)):
        if integers is not None:
            unit = (values.max(1, keepdims=True) / integers[1]).astype(np.float16).astype(np.float32)
            values[:] = unit * np.clip(np.rint(values / unit), 1 if values is scale else 0, integers[1])
        else:
            values[:] = covering_unit(kind, values)
    steps = (groups + minimum[..., None]) / scale[..., None]
    nearest = levels[np.abs(steps[..., None] - levels).argmin(-1)]
    error = (nearest * scale[..., None] - minimum[..., None] - groups).reshape(ROWS, COLUMNS)
    assert ours <= float((np.square(error) * importance.numpy()).sum())


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_error_feedback_is_that_of_a_loop(name: str, weight: Tensor, moments: Tensor) -> None:
    kind = GGUF_TYPES[name].of_rows(COLUMNS)
    grid = fit_type(weight, moments.diagonal(), kind)
    feedback = feedback_of(moments, damping=0.01)
    lattice = Lattice(*grid.decode(), grid.shape, kind.group_size)
    (codes,) = codes_with_feedback(weight[None], [lattice], steps_of(kind, weight.device), [feedback])
    levels = np.array(kind.levels, np.float64)
    scale = grid.scale().view(ROWS, -1).repeat_interleave(kind.group_size, 1).double().numpy()
    minimum = grid.minimum()
    below = np.zeros_like(scale)
    if minimum is not None:
        below = minimum.view(ROWS, -1).repeat_interleave(kind.group_size, 1).double().numpy()
    remaining, factor = weight.double().numpy().copy(), feedback.factor.double().numpy()
    order = feedback.order.tolist()
    expected = np.zeros((ROWS, COLUMNS), np.int64)
    for place, column in enumerate(order):
        values = remaining[:, column, None] - (scale[:, column, None] * levels - below[:, column, None])
        expected[:, column] = np.abs(values).argmin(1)
        error = values[np.arange(ROWS), expected[:, column]] / factor[place, place]
        remaining[:, order[place + 1 :]] -= error[:, None] * factor[place, place + 1 :]
    # float32 rounds a few near-ties the other way, and what follows them in the row is another rounding
    same_rows = (codes.numpy() == expected).all(1).mean()
    assert same_rows > 0.7
    loop = GgufMatrix.of(grid, torch.from_numpy(expected.astype(np.uint8)))
    assert cost(GgufMatrix.of(grid, codes), weight, moments) == pytest.approx(cost(loop, weight, moments), rel=0.02)


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_feedback_and_descent_lower_the_cost_and_stay_storable(name: str, weight: Tensor, moments: Tensor) -> None:
    kind = GGUF_TYPES[name].of_rows(COLUMNS)
    grid, steps = fit_type(weight, moments.diagonal(), kind), steps_of(kind, weight.device)
    lattice = Lattice(*grid.decode(), grid.shape, kind.group_size)
    codes = codes_with_feedback(weight[None], [lattice], steps, [feedback_of(moments, damping=0.01)])
    first = GgufMatrix.of(grid, codes[0])
    damped = damped_moments(moments, 0.01)
    (tuned,), (better,) = descend_gguf(weight[None], [grid], codes, damped[None], steps, sweeps=2)
    last = GgufMatrix.of(tuned, better)
    assert cost(first, weight, damped) < cost(nearest_matrix(weight, moments.diagonal(), kind), weight, damped)
    assert cost(last, weight, damped) < cost(first, weight, damped)
    # what is stored is what was weighed: nothing is lost on the way to bytes
    torch.testing.assert_close(last.dequantize(), tuned.weights(better), rtol=0, atol=0)
    found, found_codes = unpack_blocks(last.blocks, kind, (ROWS, COLUMNS))
    assert torch.equal(found_codes, better)
    for integers, allowed in ((found.scales, kind.scales), (found.minima, kind.minima)):
        if allowed is not None:
            assert integers is not None
            assert allowed[0] <= int(integers.min()) <= int(integers.max()) <= allowed[1]


@pytest.mark.parametrize("name", GGUF_TYPES)
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-9])
def test_constant_and_tiny_weights_are_kept(name: str, value: float) -> None:
    weight, kind = torch.full((2, 256), value), GGUF_TYPES[name].of_rows(256)
    found = nearest_matrix(weight, torch.ones(256), kind).dequantize()
    assert found.isfinite().all()
    # float16 units end at 6e-8; a block of one value needs one step of its grid, E2M1 steps of a half of units
    mantissa = 8 if kind.unit is None else kind.unit.mantissa
    assert float((found - weight).abs().max()) <= max(2.0 ** -(mantissa + 1) / 2 * abs(value), 2e-7)


@pytest.mark.parametrize("name", ["q4_1", "q4_k", "q2_k"])
def test_weights_of_one_sign_are_held_though_minima_are_not_negative(name: str) -> None:
    weight = torch.rand(2, 256, generator=torch.Generator().manual_seed(3)) + 0.5
    kind = GGUF_TYPES[name].of_rows(COLUMNS)
    found = nearest_matrix(weight, torch.ones(256), kind).dequantize()
    assert float((found - weight).abs().max()) < 1.5 / (len(kind.levels) - 1)


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_quantizers_give_each_row_the_type_it_can_have(name: str) -> None:
    """What several configurations become is made once."""
    weight = torch.randn(1, 4, 96, generator=torch.Generator().manual_seed(4))
    menu = [spec_of(name), spec_of("q5_0"), QuantSpec(4, 32)]
    for each in ("weighted", "gptq", "fisher-gptq"):
        (found,) = quantizer(each).quantize(weight, torch.eye(96)[None], menu)
        assert list(found) == list(dict.fromkeys(menu))
        matrix = found[spec_of(name)]
        assert isinstance(matrix, GgufMatrix)
        assert matrix.kind == GGUF_TYPES[name].of_rows(96)
        assert matrix.size_bytes == spec_of(name).size_bytes(4 * 96, 96)
        if name in LLAMA_CPP_TYPES:
            expected = gguf.quants.dequantize(matrix.blocks.numpy(), GGMLQuantizationType[matrix.kind.name.upper()])
            assert torch.equal(decode_blocks(matrix.blocks, matrix.kind, (4, 96)), torch.from_numpy(expected))


def test_what_no_type_holds_is_refused() -> None:
    weight = torch.randn(1, 4, 100)
    with pytest.raises(InputError, match="q4_k does not fit rows of 100 weights"):
        quantizer("gptq").quantize(weight, torch.eye(100)[None], [spec_of("q4_k")])
    with pytest.raises(InputError, match="q4_k groups weights along in_features"):
        quantizer("gptq", axis=0).quantize(weight, torch.eye(100)[None], [spec_of("q4_k")])
