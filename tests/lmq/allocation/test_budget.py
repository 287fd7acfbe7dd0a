from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hypothesis import given
from hypothesis import strategies as st

from lmq.allocation.budget import (
    Budget,
    LayoutRange,
    check_feasible,
    feasible_range,
    hqq_size_bytes,
    layout_sizes,
    module_sizes,
)
from lmq.allocation.targets import TARGETS
from lmq.errors import InfeasibleBudget, InputError
from lmq.formats.spec import ALLOWED_BITS, STOPS, QuantSpec
from lmq.model.structure import ModelStructure, ModuleId, ModuleInfo

MENU = (QuantSpec(4, 64), QuantSpec(2, 128), QuantSpec(3, 64))


@pytest.fixture
def structure() -> ModelStructure:
    """Two matrices of 8,192 and 24,576 weights."""
    modules = (
        ModuleInfo(ModuleId(0, "self_attn.q_proj"), 64, 128, "attn_in"),
        ModuleInfo(ModuleId(0, "mlp.down_proj"), 128, 192, "mlp_down"),
    )
    return ModelStructure(
        architecture="Tiny",
        dtype="float32",
        layers_path="model.layers",
        layers=1,
        hidden_size=128,
        vocabulary_size=512,
        tied_embeddings=True,
        modules=modules,
        other_parameters=0,
        other_bytes=0,
        weights_sha256="",
    )


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        (4.25, 17408),
        (4, 16384),
        ("4.25", 17408),
        ("4.25 bpw", 17408),
        ("4.2501bpw", 17408),
        ("20000 B", 20000),
        ("20kB", 20000),
        ("0.02 MB", 20000),
        ("1.5 KiB", 1536),
        ("80 MB", 80_000_000),
        ("1.2 GB", 1_200_000_000),
        ("1.5 GiB", 3 * 2**29),
        (" 2 MiB ", 2**21),
        ("uniform b4g64", 4096 + 256 + 4 + 12 + 12288 + 768 + 12 + 12),
        ("Uniform b4g64 + 2%", 17448 * 102 // 100),
        ("uniform b4g64 +0.5%", 17448 * 1005 // 1000),
    ],
)
def test_every_form_resolves_to_bytes(structure, text, size_bytes):
    assert Budget.parse(text).resolve(structure) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", "small", "4.25 bits", "80", "80000000", "4.25 XB", "-3", "nan", "inf", "1e3", "uniform", "uniform 4.25"],
)
def test_unclear_budgets_are_refused(text):
    with pytest.raises(InputError, match=r"allowed: bits per weight as 4\.25|write the unit"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0", "0 B", "0.5 B", "uniform b7g64", "uniform b4g64 + -2%"])
def test_impossible_budgets_are_refused(text):
    with pytest.raises(InputError):
        Budget.parse(text)


def test_a_budget_is_one_thing():
    with pytest.raises(InputError, match="one of"):
        Budget(size_bytes=5, bits_per_weight=Fraction(4))
    with pytest.raises(InputError, match="percentage"):
        Budget(size_bytes=5, percent_over=Fraction(2))


budgets = st.one_of(
    st.builds(lambda n: Budget(bits_per_weight=Fraction(n, 1000)), st.integers(1, 32_000)),
    st.builds(lambda n: Budget(size_bytes=n), st.integers(1, 10**13)),
    st.builds(
        lambda bits, group, n: Budget(uniform=QuantSpec(bits, group), percent_over=Fraction(n, 100)),
        st.sampled_from([2, 3, 4, 8]),
        st.sampled_from([32, 64, 128]),
        st.integers(0, 10_000),
    ),
)


@given(budgets)
def test_text_form_reads_back(budget):
    assert Budget.parse(str(budget)) == budget


def test_the_feasible_range_is_that_of_the_menu(structure):
    smallest, largest = feasible_range(structure, MENU)
    assert smallest == sum(QuantSpec(2, 128).size_bytes(m.parameters) for m in structure.modules)
    assert largest == sum(QuantSpec(4, 64).size_bytes(m.parameters) for m in structure.modules)
    check_feasible(smallest, structure, MENU)
    check_feasible(largest + 1, structure, MENU)
    with pytest.raises(InfeasibleBudget, match=f"{smallest:,} to {largest:,} bytes"):
        check_feasible(smallest - 1, structure, MENU)


def test_a_configuration_that_does_not_fit_names_the_module(structure):
    odd = replace(structure, modules=(*structure.modules, ModuleInfo(ModuleId(3, "mlp.up_proj"), 3, 32, "mlp_gate")))
    with pytest.raises(InputError, match=r"layer 3 mlp\.up_proj: b4g64 does not fit"):
        feasible_range(odd, MENU)
    with pytest.raises(InputError, match=r"layer 3 mlp\.up_proj: b4g64"):
        Budget.parse("uniform b4g64").resolve(odd)


@pytest.mark.parametrize("target", [None, "gptq", "llama.cpp"])
def test_sizes_are_those_of_every_matrix_by_itself(target):
    shapes = [(512, 256), (256, 512), (512, 256), (64, 512)]
    modules = [ModuleInfo(ModuleId(row, "mlp.up_proj"), *shape, "mlp_gate") for row, shape in enumerate(shapes)]
    menu = [QuantSpec.parse(name) for name in (("q4_k", "q8_0") if target == "llama.cpp" else ("b4g64", "b3g32"))]
    engine = TARGETS[target] if target else None
    expected = [
        [engine.size_bytes(spec, *shape) if engine else spec.size_bytes(shape[0] * shape[1]) for spec in menu]
        for shape in shapes
    ]
    assert module_sizes(modules, menu, engine).tolist() == expected


def test_menus_that_say_nothing_are_refused(structure):
    with pytest.raises(InputError, match="the menu holds nothing"):
        module_sizes(structure.modules, ())
    with pytest.raises(InputError, match="none twice"):
        module_sizes(structure.modules, (QuantSpec(4, 64), QuantSpec(4, 64)))
    with pytest.raises(InputError, match="no modules"):
        module_sizes((), MENU)


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
