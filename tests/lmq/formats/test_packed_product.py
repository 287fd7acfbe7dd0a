import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lmq.formats.packed_product
from lmq.formats.packed_layer import QuantizedLinear
from lmq.formats.packed_product import FEW_TOKENS
from lmq.formats.spec import ALLOWED_BITS, QuantSpec
from lmq.measurement.grids import fit_grids
from lmq.quantizers import quantizer


def _layer(
    out_features: int, in_features: int, spec: QuantSpec, axis: int = 1, *, bias: bool = True
) -> QuantizedLinear:
    torch.manual_seed(out_features + spec.bits)
    linear = nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)
    grid = fit_grids(linear.weight, [spec], quantizer("rtn", axis=axis))[spec]
    return QuantizedLinear.from_linear(linear, grid).requires_grad_(False)


def _exact(layer: QuantizedLinear, inputs: torch.Tensor) -> torch.Tensor:
    """The product in float64, from weights unpacked code by code."""
    grid = layer.grid
    scale, zero = grid.decode()
    elements, planes = layer.out_features * layer.in_features, layer.get_buffer("codes").tolist()
    codes = torch.tensor([_code(planes, index, layer.spec.bits, elements) for index in range(elements)])
    group = torch.arange(elements) // layer.spec.group_size
    values = ((codes - zero[group]) * scale[group]).double()
    shape = (layer.out_features, layer.in_features)
    weight = values.view(shape) if layer.axis == 1 else values.view(-1, layer.spec.group_size).t().reshape(shape)
    return nn.functional.linear(inputs.double(), weight, None if layer.bias is None else layer.bias.double())


def _code(planes: list[int], index: int, bits: int, elements: int) -> int:
    """Code `index` by the documented layout, one bit field after the other."""
    code = first_byte = shift = 0
    for width in {3: (2, 1), 5: (4, 1), 6: (4, 2)}.get(bits, (bits,)):
        run, byte = divmod(index, elements * width // 8)
        code |= (planes[first_byte + byte] >> (width * run) & (2**width - 1)) << shift
        first_byte += elements * width // 8
        shift += width
    return code


SHAPES = [(96, 64), (24, 96), (40, 72), (8, 20), (64, 192)]
"""Groups of 64 fit rows of the first and last; others straddle rows, in pieces of 32, 8 and 4 columns."""


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", ALLOWED_BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_few_and_of_many_tokens_are_exact_to_rounding(shape: tuple[int, int], bits: int, axis: int) -> None:
    spec = QuantSpec(bits, 32 if shape == (8, 20) else 64)
    layer = _layer(*shape, spec, axis)
    for tokens in (1, 2, FEW_TOKENS, FEW_TOKENS + 1, 40):
        inputs = torch.randn(tokens, shape[1])
        expected = _exact(layer, inputs)
        tolerance = 2e-6 * float(expected.abs().max())
        assert torch.allclose(layer(inputs).double(), expected, rtol=0, atol=tolerance)
        assert torch.allclose(layer(inputs.view(1, tokens, 1, -1))[0, :, 0].double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_meet_without_a_seam(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(96, 96, QuantSpec(3, 64), axis)
    inputs = torch.randn(20, 96)
    whole, few, weight = layer(inputs), layer(inputs[:3]), layer.dequantize()
    for block in (1, 96 * 10, 96 * 95):
        monkeypatch.setattr(lmq.formats.packed_product, "_CPU_BLOCK", block)
        monkeypatch.setattr(lmq.formats.packed_product, "_FEW_TOKENS_BLOCK", block)
        assert torch.equal(layer.dequantize(), weight)
        assert torch.allclose(layer(inputs), whole, atol=1e-5)
        assert torch.allclose(layer(inputs[:3]), few, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_other_types(dtype: torch.dtype) -> None:
    layer = _layer(96, 64, QuantSpec(4, 64)).to(dtype)
    dense = layer.to_linear(dtype)
    for tokens in (1, 16):
        inputs = torch.randn(tokens, 64, dtype=dtype)
        expected, found = _exact(layer, inputs), layer(inputs)
        assert found.dtype == dtype
        assert float((found - expected).norm()) <= 1.05 * float((dense(inputs) - expected).norm())


def test_odd_inputs() -> None:
    layer = _layer(96, 64, QuantSpec(4, 64))
    assert layer(torch.zeros(0, 64)).shape == (0, 96)
    inputs = torch.randn(64, 4).t()
    assert torch.allclose(layer(inputs), layer(inputs.contiguous()), atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(layer(inputs), layer(inputs))
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 63))


@pytest.mark.parametrize("tokens", [1, 20])
def test_autocast_computes_as_a_dense_layer_under_autocast(tokens: int) -> None:
    layer = _layer(96, 64, QuantSpec(4, 64))
    dense, inputs = layer.to_linear(torch.float32), torch.randn(tokens, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(inputs), dense(inputs)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(found, expected, atol=0.02)
    assert layer(inputs).dtype == torch.float32


@pytest.mark.parametrize("axis", [0, 1])
def test_one_graph_under_a_compiler(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    layer, inputs = _layer(96, 64, QuantSpec(3, 32), axis), torch.randn(2, 64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(inputs), layer(inputs), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("tokens", [1, 20])
def test_gradients_are_those_of_the_dense_layer(tokens: int, axis: int, dtype: torch.dtype) -> None:
    layer = _layer(96, 64, QuantSpec(4, 64), axis).to(dtype)
    assert layer.bias is not None
    dense = layer.to_linear(dtype)
    found, expected = (
        torch.randn(2, tokens, 64, dtype=dtype, generator=torch.Generator().manual_seed(1)) for _ in "ab"
    )
    for module, inputs in ((layer, found), (dense, expected)):
        inputs.requires_grad_(True)
        module.bias.requires_grad_(True)
        module(inputs).square().sum().backward()
    tolerance = {"rtol": 0.05, "atol": 0.5} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    assert torch.allclose(found.grad, expected.grad, **tolerance)
    assert torch.allclose(layer.bias.grad, dense.bias.grad, **tolerance)


class _LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("tokens", [1, 16])
def test_a_call_never_holds_the_whole_weight(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmq.formats.packed_product, "_CPU_BLOCK", 1 << 14)
    monkeypatch.setattr(lmq.formats.packed_product, "_FEW_TOKENS_BLOCK", 1 << 14)
    layer = _layer(512, 256, QuantSpec(4, 64), bias=False)
    stored_bytes = sum(buffer.nbytes for buffer in layer.buffers())
    assert stored_bytes == layer.spec.size_bytes(512 * 256)
    inputs = torch.randn(tokens, 256, requires_grad=True)
    with _LargestTensor() as largest:
        layer(inputs).sum().backward()
    assert largest.bytes <= max(4 << 14, stored_bytes)
    with _LargestTensor() as of_dense:
        layer.dequantize()
    assert of_dense.bytes == 4 * 512 * 256


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("axis", [0, 1])
def test_products_on_a_gpu(axis: int) -> None:
    layer = _layer(96, 64, QuantSpec(3, 64), axis)
    inputs = torch.randn(20, 64)
    expected = layer(inputs)
    assert torch.allclose(layer.to("cuda")(inputs.to("cuda")).cpu(), expected, atol=1e-4)
