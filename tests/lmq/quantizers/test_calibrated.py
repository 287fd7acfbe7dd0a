from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmq.errors import InputError, NotFiniteError
from lmq.formats.coded_grid import CodedGrid
from lmq.formats.groups import Grid, to_groups
from lmq.formats.spec import QuantSpec
from lmq.measurement.frobenius import frobenius_errors
from lmq.measurement.grids import fit_grids, load_grids, quantize_modules, save_grids
from lmq.measurement.upper_triangle import UpperTriangle
from lmq.model.structure import ModuleId
from lmq.quantizers import CalibratedQuantizer, quantizer
from lmq.quantizers.weighted_grid import fit_weighted

CALIBRATED = ("weighted", "gptq", "fisher-gptq")
MENU = [QuantSpec(3, 32), QuantSpec(4, 64)]


def _weight(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def _moments(in_features: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(300, in_features, generator=generator) * torch.logspace(-1, 1, in_features)
    inputs += inputs[:, :1]
    return inputs.t() @ inputs / 300


def _cost(weight: Tensor, grid: Grid, moments: Tensor) -> float:
    error = (grid.round_trip(weight) - weight).double()
    return float(((error @ moments.double()) * error).sum())


def _weighted_error(weight: Tensor, importance: Tensor, fitted: tuple[Tensor, Tensor], spec: QuantSpec) -> Tensor:
    """Σ_i d_i (w_i − ŵ_i)² of every group by a loop over groups, float64 [groups]."""
    in_features, errors = weight.shape[1], []
    for group, (scale, zero) in enumerate(zip(*(values.double() for values in fitted), strict=True)):
        places = range(group * spec.group_size, (group + 1) * spec.group_size)
        total = 0.0
        for place in places:
            value = float(weight.flatten()[place])
            code = min(max(round(value / float(scale) + float(zero)), 0), 2**spec.bits - 1)
            total += float(importance[place % in_features]) * ((code - float(zero)) * float(scale) - value) ** 2
        errors.append(total)
    return torch.tensor(errors, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(8, 64), (8, 40)], ids=str)
def test_weighted_grids_beat_every_grid_of_a_fine_search(shape: tuple[int, int]) -> None:
    """Scales and zeros around the range of each group, 40 × 40 of them: none is better by more than a little."""
    spec, weight = QuantSpec(3, 64), _weight(*shape)
    importance = _moments(shape[1]).diagonal()
    found = _weighted_error(weight, importance, fit_weighted(weight, importance, spec, 1), spec)
    groups = to_groups(weight, 64, 1)
    low, high = groups.amin(1), groups.amax(1)
    best = torch.full_like(found, torch.inf)
    for width in torch.linspace(0.5, 1.05, 40):
        for shift in torch.linspace(-0.25, 0.25, 40):
            scale = (high - low) * width / 7
            zero = 3.5 - ((high + low) / 2 + shift * (high - low)) / scale
            codes = (groups / scale[:, None] + zero[:, None]).round().clamp(0, 7)
            error = ((codes - zero[:, None]) * scale[:, None] - groups).double().square()
            columns = torch.arange(weight.numel()).view(groups.shape) % shape[1]
            best = torch.minimum(best, (error * importance.double()[columns]).sum(1))
    assert float((found / best).mean()) < 1.1
    assert float((found / best).max()) < 1.6


@pytest.mark.parametrize("axis", [0, 1])
def test_with_equal_importance_the_squared_error_is_below_that_of_hqq(axis: int) -> None:
    weight = _weight(96, 128)
    for spec in (QuantSpec(2, 64), QuantSpec(3, 64), QuantSpec(4, 64)):
        of_hqq = fit_grids(weight, [spec], quantizer("hqq", axis=axis))[spec]
        weighted = quantizer("weighted", axis=axis)
        assert isinstance(weighted, CalibratedQuantizer)
        (found,) = weighted.quantize(weight[None], torch.eye(128)[None], [spec])
        assert frobenius_errors(weight, [found[spec]])[0] < frobenius_errors(weight, [of_hqq])[0]


@pytest.mark.parametrize("shape", [(64, 128), (128, 48)], ids=str)
def test_every_step_of_the_recipe_lowers_the_cost(shape: tuple[int, int]) -> None:
    weight, moments, module = _weight(*shape), _moments(shape[1]), ModuleId(0, "q")
    for spec in MENU:
        costs = {}
        for name in ("rtn", "hqq", *CALIBRATED):
            equally_damped = {"damping": 0.01} if name.endswith("gptq") else {}
            chosen = quantizer(name, **equally_damped)
            grids = quantize_modules({module: weight}, [spec], chosen, {module: UpperTriangle.of(moments)})
            costs[name] = _cost(weight, grids[module][spec], moments)
        assert costs["fisher-gptq"] < costs["gptq"] < costs["hqq"]
        assert costs["fisher-gptq"] < costs["weighted"] < costs["rtn"]


def test_within_groups_of_one_column_there_is_nothing_to_weight() -> None:
    """With axis 0 the weights of a group share their input where groups divide the columns."""
    weight, moments, module = _weight(64, 48), _moments(48), ModuleId(0, "q")
    costs = {}
    plain_feedback = {"damping": 0.01, "sweeps": 0}
    for name, options in (("hqq", {}), ("gptq", plain_feedback), ("fisher-gptq", plain_feedback)):
        chosen = quantizer(name, axis=0, **options)
        grids = quantize_modules({module: weight}, MENU, chosen, {module: UpperTriangle.of(moments)})
        costs[name] = _cost(weight, grids[module][QuantSpec(4, 64)], moments)
    assert costs["fisher-gptq"] == pytest.approx(costs["gptq"], rel=1e-3)
    assert costs["gptq"] < costs["hqq"]


@pytest.mark.parametrize("name", CALIBRATED)
def test_modules_of_a_layer_come_out_as_each_alone(name: str) -> None:
    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "down": (64, 96)}
    weights = {ModuleId(1, kind): _weight(*shape, seed=len(kind)) for kind, shape in shapes.items()}
    moments = {module: UpperTriangle.of(_moments(weight.shape[1], seed=7)) for module, weight in weights.items()}
    together = quantize_modules(weights, MENU, quantizer(name), moments)
    assert list(together) == list(weights)
    for module, weight in weights.items():
        alone = quantize_modules({module: weight}, MENU, quantizer(name), moments)[module]
        for spec in MENU:
            assert torch.equal(alone[spec].round_trip(weight), together[module][spec].round_trip(weight))


@pytest.mark.parametrize("name", CALIBRATED)
def test_whole_zeros_stay_whole(name: str) -> None:
    weight, moments, module = _weight(64, 128), _moments(128), ModuleId(0, "q")
    menu = [QuantSpec(4, 64), QuantSpec(8, 64)]
    grids = quantize_modules(
        {module: weight}, menu, quantizer(name, integer_zeros=True), {module: UpperTriangle.of(moments)}
    )[module]
    assert set(grids[menu[0]].decode()[1].tolist()) <= set(range(16))
    assert set(grids[menu[1]].decode()[1].tolist()) == {128}
    symmetric = quantize_modules(
        {module: weight}, menu, quantizer(name, integer_zeros="middle"), {module: UpperTriangle.of(moments)}
    )[module]
    assert [set(symmetric[spec].decode()[1].tolist()) for spec in menu] == [{8}, {128}]


def test_grids_with_codes_are_read_back_as_they_were(tmp_path: Path) -> None:
    weight, module = _weight(64, 96), ModuleId(3, "q")
    grids = quantize_modules({module: weight}, MENU, quantizer("gptq"), {module: UpperTriangle.of(_moments(96))})
    path = tmp_path / "grids.safetensors"
    save_grids(path, grids)
    read = load_grids(path)
    for spec in MENU:
        found, expected = read[module][spec], grids[module][spec]
        assert isinstance(found, CodedGrid)
        assert torch.equal(found.round_trip(weight), expected.round_trip(weight))
        assert not torch.equal(expected.codes(weight), Grid.codes(expected, weight))
    save_grids(path.with_name("again"), read)
    assert path.with_name("again").read_bytes() == path.read_bytes()


def test_the_weights_are_left_alone() -> None:
    weight, moments, module = _weight(64, 96), _moments(96), ModuleId(0, "q")
    kept, kept_moments = weight.clone(), moments.clone()
    quantize_modules({module: weight}, MENU, quantizer("fisher-gptq"), {module: UpperTriangle.of(moments)})
    assert torch.equal(weight, kept)
    assert torch.equal(moments, kept_moments)


def test_bad_input_is_named() -> None:
    weight, module = _weight(64, 96), ModuleId(2, "mlp.up_proj")
    with pytest.raises(InputError, match="quantizer 'gptq' needs second moments of every module's inputs"):
        quantize_modules({module: weight}, MENU, quantizer("gptq"))
    with pytest.raises(InputError, match="quantizer 'fisher-gptq' needs second moments"):
        fit_grids(weight, MENU, quantizer("fisher-gptq"))
    damaged = _moments(96)
    damaged[3, 3] = torch.nan
    with pytest.raises(NotFiniteError, match=r"second moments of the inputs of layer 2 mlp\.up_proj"):
        quantize_modules({module: weight}, MENU, quantizer("gptq"), {module: UpperTriangle.of(damaged)})
    with pytest.raises(InputError, match="b4g64 does not fit a matrix of 96 weights"):
        quantize_modules(
            {module: weight[:1]}, [QuantSpec(4, 64)], quantizer("gptq"), {module: UpperTriangle.of(_moments(96))}
        )
    with pytest.raises(InputError, match=r"damping = 3 is not allowed; give a share of the mean diagonal from 0 to 1"):
        quantizer("gptq", damping=3)
    with pytest.raises(InputError, match="order = 'random' is not allowed; allowed: descending, stored"):
        quantizer("fisher-gptq", order="random")
    with pytest.raises(InputError, match="quantizer 'weighted' does not take these options"):
        quantizer("weighted", damping=0.1)
