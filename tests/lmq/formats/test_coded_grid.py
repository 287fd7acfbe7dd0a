import pytest
import torch

from lmq.errors import InputError
from lmq.formats.coded_grid import CodedGrid
from lmq.formats.groups import Grid, encode, from_groups
from lmq.formats.packed_layer import QuantizedLinear, quantize_weight
from lmq.formats.spec import ALLOWED_BITS, QuantSpec
from lmq.quantizers import quantizer

WEIGHT = torch.randn(48, 96, generator=torch.Generator().manual_seed(3)) * 0.05


def _coded(spec: QuantSpec, axis: int) -> tuple[CodedGrid, torch.Tensor]:
    """A grid with codes that have nothing to do with the weight."""
    grid = encode(WEIGHT, *quantizer("rtn", axis=axis).fit(WEIGHT, spec), spec, axis)
    codes = torch.randint(0, 2**spec.bits, WEIGHT.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    return CodedGrid.of(grid, codes), codes


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", ALLOWED_BITS)
def test_it_stands_for_its_codes_wherever_a_grid_does(bits: int, axis: int) -> None:
    coded, codes = _coded(QuantSpec(bits, 64), axis)
    assert torch.equal(from_groups(coded.codes(WEIGHT), coded.shape, axis), codes)
    assert torch.equal(coded.round_trip(WEIGHT), coded.dequantize(coded.codes(WEIGHT)))
    assert torch.equal(coded.to("cpu").round_trip(WEIGHT), coded.round_trip(WEIGHT))
    assert torch.equal(quantize_weight(WEIGHT, coded)["codes"], coded.packed_codes)
    linear = torch.nn.Linear(96, 48, bias=False)
    assert torch.equal(QuantizedLinear.from_linear(linear, coded).dequantize(), coded.round_trip(WEIGHT))
    assert sum(tensor.nbytes for tensor in coded.coded_tensors().values()) == coded.size_bytes
    assert not torch.equal(Grid.round_trip(coded, WEIGHT), coded.round_trip(WEIGHT))


def test_codes_that_do_not_fit_are_refused() -> None:
    coded, _ = _coded(QuantSpec(4, 64), 1)
    with pytest.raises(InputError, match=r"packed codes of a b4g64 matrix \[48, 96\] must be torch.uint8 \[2304\]"):
        CodedGrid.from_grid(coded, coded.packed_codes[1:])
    with pytest.raises(InputError, match="code 16 does not fit 4 bits"):
        CodedGrid.of(coded, torch.full((48, 96), 16, dtype=torch.uint8))
