import numpy as np
import pytest
import scipy.stats
import torch

from lmq.errors import InputError
from lmq.formats.nf4 import NF4_LEVELS, NormalFloat4
from lmq.measurement.activation import part_sensitivities
from lmq.model.block_inputs import BlockInputs
from lmq.model.structure import ModuleId, ModuleInfo

WEIGHT = torch.randn(96, 160, generator=torch.Generator().manual_seed(4)) * 0.03


def round_trip_by_loop(weight: torch.Tensor, group_size: int) -> np.ndarray:
    """Nearest level of every weight in float64, one at a time; the lower of two equals."""
    flat = weight.double().numpy().ravel()
    quantized = np.empty_like(flat)
    for start in range(0, len(flat), group_size):
        group = flat[start : start + group_size]
        divisor = max(abs(value) for value in group)
        for offset, value in enumerate(group):
            target = value / divisor if divisor else 0.0
            nearest = min(NF4_LEVELS, key=lambda level: (abs(level - target), level))
            quantized[start + offset] = nearest * divisor
    return quantized.reshape(weight.shape)


def test_levels_are_the_quantiles_of_the_normal_distribution_that_qlora_defines() -> None:
    """Quantiles at 8 evenly spaced probabilities above zero and 7 below, scaled to -1 … 1 (bitsandbytes, 0.9677083)."""
    above = scipy.stats.norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    below = -scipy.stats.norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([above, [0.0], below])) / above.max()
    np.testing.assert_allclose(NF4_LEVELS, expected, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_equals_a_float64_loop(group_size: int, dtype: torch.dtype) -> None:
    weight = WEIGHT.to(dtype)
    kept = weight.clone()
    quantized = NormalFloat4(group_size=group_size).round_trip(weight)
    assert (quantized.dtype, quantized.shape) == (torch.float32, weight.shape)
    np.testing.assert_allclose(quantized.numpy(), round_trip_by_loop(weight, group_size), rtol=1e-6)
    assert torch.equal(weight, kept)


def test_levels_and_what_lies_midway_between_them() -> None:
    levels = torch.tensor(NF4_LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    row = torch.cat([levels, midpoints, torch.zeros(1)])
    quantized = NormalFloat4(group_size=32).round_trip(row[None])[0]
    assert torch.equal(quantized[:16], levels)
    assert torch.equal(quantized[16:31], levels[:-1])


def test_groups_of_zeros_stay_zeros() -> None:
    weight = WEIGHT.clone()
    weight[0] = 0
    assert not NormalFloat4(group_size=32).round_trip(weight)[0].any()


def test_the_error_of_normal_weights_is_below_that_of_an_even_grid() -> None:
    """16 even levels from -absmax to absmax, 64 to a group, cost normal weights more."""
    groups = torch.randn(4096, 64, generator=torch.Generator().manual_seed(6))
    step = groups.abs().amax(1, keepdim=True) / 7.5
    even = ((groups / step - 0.5).round().clamp(-8, 7) + 0.5) * step
    error = (NormalFloat4().round_trip(groups) - groups).square().mean()
    assert error < 0.95 * (even - groups).square().mean()


def test_bits_and_what_does_not_fit() -> None:
    assert [NormalFloat4(group_size=size).bits_per_weight for size in (32, 64, 128)] == [5.0, 4.5, 4.25]
    assert NormalFloat4().describe() == {"name": "nf4", "group_size": 64}
    with pytest.raises(InputError, match="group_size = 48 is not allowed for nf4"):
        NormalFloat4(group_size=48)
    with pytest.raises(InputError, match="nf4 in groups of 64 does not fit a matrix of 96 weights"):
        NormalFloat4().round_trip(torch.ones(1, 96))


@torch.no_grad()
def test_part_sensitivities_take_it() -> None:
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(64, 32))
    hidden = torch.randn(2, 5, 64)
    quantized = {"0": NormalFloat4().round_trip(block[0].weight)}
    modules = [ModuleInfo(ModuleId(0, "0"), 32, 64, "mlp_down")]
    scores = part_sensitivities(block, BlockInputs((), {}, hidden.device, hidden.dtype), hidden, modules, quantized)
    expected = (hidden @ (quantized["0"] - block[0].weight).t()).square().mean().item()
    assert scores == {"mlp_down": pytest.approx(expected, rel=1e-5)}
