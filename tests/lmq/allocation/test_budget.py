from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmq.allocation.budget import Budget, check_feasible, feasible_range, module_sizes
from lmq.errors import InfeasibleBudget, InputError
from lmq.formats.spec import QuantSpec
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


@pytest.mark.parametrize("text", ["0", "0 B", "0.5 B", "uniform b5g64", "uniform b4g64 + -2%"])
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


def test_menus_that_say_nothing_are_refused(structure):
    with pytest.raises(InputError, match="the menu holds nothing"):
        module_sizes(structure.modules, ())
    with pytest.raises(InputError, match="none twice"):
        module_sizes(structure.modules, (QuantSpec(4, 64), QuantSpec(4, 64)))
    with pytest.raises(InputError, match="no modules"):
        module_sizes((), MENU)
