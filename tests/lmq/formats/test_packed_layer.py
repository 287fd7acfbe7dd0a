import pytest
import torch
from torch import nn

from lmq.errors import InputError
from lmq.formats.groups import Grid
from lmq.formats.packed_layer import QUANTIZED_TENSORS, QuantizedLinear, quantized_tensor_shapes
from lmq.formats.spec import STOPS, QuantSpec
from lmq.measurement.grids import fit_grids
from lmq.quantizers import quantizer

BETWEEN_STOPS = (QuantSpec(5, 64), QuantSpec(6, 128), QuantSpec(5, 16), QuantSpec(6, 256))


def _dense(bias: bool) -> nn.Linear:
    torch.manual_seed(3)
    linear = nn.Linear(64, 96, bias=bias)
    linear.requires_grad_(False)
    return linear


def _grid(linear: nn.Linear, spec: QuantSpec, axis: int = 1) -> Grid:
    return fit_grids(linear.weight, [spec], quantizer("hqq", axis=axis))[spec]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spec", [*STOPS, *BETWEEN_STOPS], ids=str)
def test_outputs_are_those_of_the_round_tripped_weight(spec: QuantSpec, bias: bool, axis: int) -> None:
    linear = _dense(bias)
    grid = _grid(linear, spec, axis)
    quantized = QuantizedLinear.from_linear(linear, grid)
    inputs = torch.randn(2, 5, 64)
    expected = nn.functional.linear(inputs, grid.round_trip(linear.weight), linear.bias)
    assert torch.equal(quantized.dequantize(), grid.round_trip(linear.weight))
    assert torch.allclose(quantized(inputs), expected, atol=1e-6)
    assert torch.allclose(quantized.to_linear(torch.float32)(inputs), expected, atol=1e-6)
    stored_bytes = sum(quantized.get_buffer(name).nbytes for name in QUANTIZED_TENSORS)
    assert stored_bytes == spec.size_bytes(64 * 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casting_changes_the_bias_alone(dtype: torch.dtype) -> None:
    linear = _dense(bias=True)
    quantized = QuantizedLinear.from_linear(linear, _grid(linear, QuantSpec(3, 32)))
    weight = quantized.dequantize()
    quantized.to(dtype)
    assert torch.equal(quantized.dequantize(), weight)
    assert quantized.bias is not None
    assert quantized.bias.dtype == dtype
    shapes = quantized_tensor_shapes(QuantSpec(3, 32), 96, 64)
    for name, (shape, tensor_dtype) in shapes.items():
        assert (tuple(quantized.get_buffer(name).shape), quantized.get_buffer(name).dtype) == (shape, tensor_dtype)
    outputs = quantized(torch.ones(1, 64, dtype=dtype))
    assert outputs.dtype == dtype
    expected = nn.functional.linear(torch.ones(1, 64), weight, linear.bias)
    assert torch.allclose(outputs.float(), expected, atol=0.05)


def test_state_travels_through_the_meta_device() -> None:
    linear = _dense(bias=True)
    spec = QuantSpec(4, 64)
    source = QuantizedLinear.from_linear(linear, _grid(linear, spec))
    copy = QuantizedLinear(64, 96, spec, bias=True, device="meta").to_empty(device="cpu")
    copy.load_state_dict(source.state_dict())
    assert torch.equal(copy(torch.ones(64)), source(torch.ones(64)))


def test_gradients_reach_the_inputs() -> None:
    linear = _dense(bias=False)
    quantized = QuantizedLinear.from_linear(linear, _grid(linear, QuantSpec(4, 64)))
    inputs = torch.ones(3, 64, requires_grad=True)
    quantized(inputs).sum().backward()
    assert inputs.grad is not None
    assert torch.allclose(inputs.grad[0], quantized.dequantize().sum(0), atol=1e-5)


def test_a_configuration_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="b4g128 does not fit a matrix of 192 weights"):
        QuantizedLinear(64, 3, QuantSpec(4, 128))


def test_printing_names_the_configuration() -> None:
    assert "64, 96, b4g64, axis=1, bias=False" in repr(QuantizedLinear(64, 96, QuantSpec(4, 64)))
