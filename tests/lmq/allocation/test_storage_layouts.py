from __future__ import annotations

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hypothesis import given
from hypothesis import strategies as st

from lmq.allocation.storage_layouts import LayoutRange, hqq_size_bytes, layout_sizes
from lmq.errors import InputError
from lmq.formats.spec import ALLOWED_BITS, STOPS, QuantSpec
from lmq.model.structure import ModuleId, ModuleInfo

SHAPES = [(64, 64), (128, 192), (192, 128), (96, 256), (320, 64)]
"""Their groups are multiples of 10 for some configurations only; groups of 128 straddle some of their rows."""


def hqq_layer(shape: tuple[int, int], spec: QuantSpec, axis: int) -> HQQLinear:
    """hqq's own layer of random weights [out_features, in_features]."""
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    config = BaseQuantizeConfig(nbits=spec.bits, group_size=spec.group_size, axis=axis)
    config["weight_quant_params"]["optimize"] = False  # the sizes are those of the result, which iterations refine
    return HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")


def stored_by_hqq(shape: tuple[int, int], spec: QuantSpec, axis: int) -> int:
    """Bytes of the tensors in the layer's state."""
    state = hqq_layer(shape, spec, axis).state_dict()
    return sum(state[name].nbytes for name in ("W_q", "scale", "zero"))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_are_those_of_the_hqq_library(shape: tuple[int, int], axis: int) -> None:
    specs = [*STOPS, QuantSpec(5, 64), QuantSpec(6, 64)]
    sizes = {spec.name: hqq_size_bytes(shape[0] * shape[1], spec, axis=axis) for spec in specs}
    assert sizes == {spec.name: stored_by_hqq(shape, spec, axis) for spec in specs}


@pytest.mark.parametrize(("groups", "bits"), [(3, 4), (7, 4), (5, 2), (6, 2), (9, 2)])
def test_groups_that_hqq_cannot_pack_are_refused(groups: int, bits: int) -> None:
    spec = QuantSpec(bits, 64)
    with pytest.raises(RuntimeError):  # hqq packs some of these, but cannot read them back
        hqq_layer((groups, 64), spec, axis=1).dequantize()
    with pytest.raises(InputError, match=rf"hqq cannot pack {spec} .* its {groups} groups .* take {spec} out"):
        hqq_size_bytes(groups * 64, spec)


def test_a_large_matrix_takes_the_published_bits() -> None:
    parameters = 4096 * 4096
    bits = {
        (spec.name, axis): 8 * hqq_size_bytes(parameters, spec, axis=axis) / parameters
        for spec in STOPS
        for axis in (0, 1)
    }
    assert bits["b3g128", 1] == pytest.approx(3.2 + 32 / 128, abs=1e-3)
    assert bits["b3g32", 0] == 4.0 + 32 / 32
    assert bits["b3g64", 0] == 3.5 + 32 / 64
    assert bits["b3g128", 0] == 3.25 + 32 / 128
    assert bits["b4g64", 1] == bits["b4g64", 0] == 4.5


@given(st.sampled_from(ALLOWED_BITS), st.sampled_from([16, 32, 64, 128, 256]), st.integers(1, 400))
def test_hqq_never_stores_less_than_the_codes_and_16_bit_scales(bits: int, group_size: int, groups: int) -> None:
    spec = QuantSpec(bits, group_size)
    parameters = 4 * groups * group_size
    least = parameters * (bits / 8 + 4 / group_size)
    for axis in (0, 1):
        assert hqq_size_bytes(parameters, spec, axis=axis) >= least


def test_layouts_of_modules() -> None:
    modules = [ModuleInfo(ModuleId(0, "q"), 64, 64, "attn_in"), ModuleInfo(ModuleId(1, "q"), 128, 64, "attn_in")]
    specs = [QuantSpec(3, 64), QuantSpec(4, 32)]
    assert layout_sizes(modules, specs, "hqq", axis=0).tolist() == [
        [hqq_size_bytes(module.parameters, spec, axis=0) for spec in specs] for module in modules
    ]
    assert layout_sizes(modules, specs, "paper").tolist() == [
        [spec.size_bytes(module.parameters) for spec in specs] for module in modules
    ]


def test_bad_input_is_named() -> None:
    small = [ModuleInfo(ModuleId(3, "q"), 3, 64, "attn_in")]
    with pytest.raises(InputError, match="layer 3 q: hqq cannot pack b4g64"):
        layout_sizes(small, [QuantSpec(4, 64)], "hqq")
    with pytest.raises(InputError, match=r"layer 3 q: b4g128 does not fit a matrix of 192 weights"):
        layout_sizes(small, [QuantSpec(4, 128)], "hqq")
    with pytest.raises(InputError, match=r"unknown storage layout 'hqqq'; did you mean 'hqq'"):
        layout_sizes(small, [QuantSpec(8, 64)], "hqqq")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="axis = 2"):
        hqq_size_bytes(4096, QuantSpec(4, 64), axis=2)


def test_a_range_leaves_out_what_fits_no_module_and_knows_its_neighbours() -> None:
    modules = [ModuleInfo(ModuleId(0, "q"), 6, 64, "attn_in"), ModuleInfo(ModuleId(0, "o"), 64, 64, "attn_out")]
    menu = [QuantSpec(8, 64), QuantSpec(2, 64), QuantSpec(4, 64), QuantSpec(4, 256)]
    paper = LayoutRange.of(modules, menu, "paper")
    assert [spec.name for spec in paper.uniform_bytes] == ["b2g64", "b4g64", "b8g64"]
    assert paper.uniform_bytes[QuantSpec(4, 64)] == sum(QuantSpec(4, 64).size_bytes(m.parameters) for m in modules)
    assert (paper.smallest_bytes, paper.largest_bytes) == tuple(
        paper.uniform_bytes[QuantSpec(bits, 64)] for bits in (2, 8)
    )
    hqq = LayoutRange.of(modules, menu, "hqq")
    assert [spec.name for spec in hqq.uniform_bytes] == ["b4g64", "b8g64"]  # 6 groups do not go 4 to a byte
    middle = paper.uniform_bytes[QuantSpec(4, 64)]
    assert paper.uniform_around(middle) == (QuantSpec(4, 64), QuantSpec(8, 64))
    assert paper.uniform_around(middle - 1) == (QuantSpec(2, 64), QuantSpec(4, 64))
    assert paper.uniform_around(1) == (None, QuantSpec(2, 64))
    assert paper.uniform_around(10**9) == (QuantSpec(8, 64), None)
    with pytest.raises(InputError, match="of the menu b4g256 no configuration fits every module in the paper layout"):
        LayoutRange.of(modules, menu[3:], "paper")
