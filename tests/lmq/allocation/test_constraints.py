import itertools
from fnmatch import fnmatchcase

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmq.allocation.budget import module_sizes
from lmq.allocation.constraints import Constraints, DeviceLimit, parse_constraints, violations
from lmq.allocation.error_table import ErrorTable
from lmq.allocation.solver import Allocation, Assignment
from lmq.allocation.strategies import STRATEGIES, Measurements, strategy
from lmq.errors import InfeasibleBudget, InputError
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model.structure import ModuleId, ModuleInfo

B2, B3, B4, B8 = (QuantSpec(bits, 64) for bits in (2, 3, 4, 8))
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PATTERNS = ("*", "0.*", "1.*", "*.self_attn.*", "*.self_attn.q_proj", "*.mlp.down_proj", "1.self_attn.k_proj")


def _modules(layers: int = 2, kinds=KINDS) -> tuple[ModuleInfo, ...]:
    return tuple(
        ModuleInfo(ModuleId(layer, kind), 64, 64 * (1 + kinds.index(kind)), "")
        for layer in range(layers)
        for kind in kinds
    )


MODULES = _modules()


def _allocation(specs, modules=MODULES) -> Allocation:
    return Allocation(
        assignments=tuple(
            Assignment(module.id, spec, module.parameters, spec.size_bytes(module.parameters))
            for module, spec in zip(modules, specs, strict=True)
        )
    )


def _measurements(modules, menu, costs, constraints) -> Measurements:
    table = ErrorTable(tuple(m.id for m in modules), tuple(menu), np.array(costs), module_sizes(modules, menu))
    return Measurements(modules=modules, menu=tuple(menu), costs={"frobenius": table}, constraints=constraints)


@st.composite
def _programs(draw):
    """Two or three kinds in two layers, three or four configurations, and any mixture of constraints."""
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")[: draw(st.integers(2, 3))]
    modules = tuple(
        ModuleInfo(ModuleId(layer, kind), 64, 64 * draw(st.integers(1, 9)), "") for layer in range(2) for kind in kinds
    )
    menu = (B2, B3, B4, B8)[: draw(st.integers(3, 4))]
    costs = draw(
        st.lists(st.floats(0, 1, width=32), min_size=len(modules) * len(menu), max_size=len(modules) * len(menu))
    )
    patterns = [
        pattern for pattern in PATTERNS if any(fnmatchcase(f"{m.id.layer}.{m.id.kind}", pattern) for m in modules)
    ]
    rules = st.dictionaries(st.sampled_from(patterns), st.sampled_from(menu), max_size=2)
    sizes = module_sizes(modules, menu)
    half = int(sizes[: len(kinds)].max(axis=1).sum())
    layers = st.sampled_from([(0, 0), (1, 1), (0, 1)])
    limits = draw(st.lists(st.tuples(layers, st.integers(half // 4, 2 * half)), max_size=2))
    constraints = Constraints(
        alike=draw(st.sampled_from([(), (), ("qkv",), (kinds[:2], kinds[1::-1]), (kinds,)])),
        fixed=draw(rules) if draw(st.booleans()) else {},
        floor=draw(rules) if draw(st.booleans()) else {},
        most_configurations=draw(st.sampled_from([None, None, 1, 2, 3])),
        device_limits=tuple(DeviceLimit(first_layer=a, last_layer=b, size_bytes=size) for (a, b), size in limits),
    )
    budget = draw(st.integers(int(sizes.min(axis=1).sum()), int(sizes.max(axis=1).sum())))
    return modules, menu, np.array(costs).reshape(len(modules), len(menu)), constraints, budget


def _kept(modules, menu, constraints) -> tuple[np.ndarray, np.ndarray]:
    """All choices [choices, modules] that keep the constraints, by their definition, and their sizes [choices]."""
    choices = np.array(list(itertools.product(range(len(menu)), repeat=len(modules))))
    bits = np.array([spec.bits for spec in menu])[choices]
    sizes = module_sizes(modules, menu)[np.arange(len(modules)), choices]
    kept = np.ones(len(choices), bool)
    for column, module in enumerate(modules):
        name = f"{module.id.layer}.{module.id.kind}"
        for pattern, spec in constraints.fixed.items():
            if fnmatchcase(name, pattern):
                kept &= bits[:, column] == spec.bits
        for pattern, spec in constraints.floor.items():
            if fnmatchcase(name, pattern):
                kept &= bits[:, column] >= spec.bits
        for kinds in constraints.alike:
            kinds = ("self_attn.q_proj", "self_attn.k_proj") if kinds == "qkv" else kinds
            for other, neighbour in enumerate(modules):
                if module.id.layer == neighbour.id.layer and {module.id.kind, neighbour.id.kind} <= set(kinds):
                    kept &= bits[:, column] == bits[:, other]
    if constraints.most_configurations is not None:
        kept &= np.array([len(set(choice)) for choice in choices.tolist()]) <= constraints.most_configurations
    for limit in constraints.device_limits:
        inside = [limit.first_layer <= module.id.layer <= limit.last_layer for module in modules]
        kept &= sizes[:, inside].sum(axis=1) <= limit.size_bytes
    return choices[kept], sizes[kept].sum(axis=1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_programs())
def test_every_mixture_of_constraints_agrees_with_brute_force(program):
    modules, menu, costs, constraints, budget = program
    choices, sizes = _kept(modules, menu, constraints)
    measurements = _measurements(modules, menu, costs, constraints)
    if not (sizes <= budget).any():
        with pytest.raises(InputError) as caught:
            strategy("mxq").allocate(measurements, budget)
        if len(sizes):
            assert isinstance(caught.value, InfeasibleBudget)
            assert "under the constraints the budget" in str(caught.value)
            assert (caught.value.smallest_bytes, caught.value.largest_bytes) == (sizes.min(), sizes.max())
        return
    allocation = strategy("mxq").allocate(measurements, budget)
    objectives = costs[np.arange(len(modules)), choices[sizes <= budget]].sum(axis=1)
    assert allocation.objective == pytest.approx(objectives.min(), rel=1e-8, abs=1e-9)
    assert allocation.lower_bound <= allocation.objective
    assert allocation.size_bytes <= budget
    assert violations(allocation, constraints) == []


def test_nothing_is_constrained_unless_asked():
    assert Constraints().is_empty
    assert parse_constraints({}).is_empty
    assert parse_constraints({"alike": None, "fixed": None, "most_configurations": None}).is_empty
    assert not Constraints(most_configurations=3).is_empty
    compiled = Constraints().compile(MODULES, STOPS)
    assert compiled.allowed.all()
    assert (compiled.groups, compiled.most_configurations, compiled.limits) == ((), None, ())


def test_presets_tie_what_a_submodule_has_of_them():
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "experts.0.up_proj", "experts.0.gate_proj", "experts.1.up_proj")
    compiled = Constraints(alike=("qkv", "gate-up")).compile(_modules(2, kinds), STOPS)
    assert set(compiled.groups) == {(0, 1), (2, 3), (5, 6), (7, 8)}
    assert Constraints(alike=("qkv",)).compile(_modules(1, ("attn.c_attn",)), STOPS).groups == ()


def test_the_same_matrix_of_all_experts_of_a_layer_can_be_alike():
    kinds = ("o_proj", *(f"mlp.experts.{n}.{name}" for n in (0, 1, 10) for name in ("gate_up_proj", "down_proj")))
    modules = _modules(2, kinds)
    compiled = Constraints(alike=("experts",)).compile(modules, STOPS)
    assert set(compiled.groups) == {(1, 3, 5), (2, 4, 6), (8, 10, 12), (9, 11, 13)}
    assert Constraints(alike=("experts",)).compile(MODULES, STOPS).groups == ()
    specs = [B4, *(B2, B3) * 3, B4, *(B4, B3) * 2, B4, B8]
    (broken,) = violations(_allocation(specs, modules), parse_constraints({"alike": ["experts"]}))
    assert "layer 1 mlp.experts.10.down_proj has b8g64" in broken


def test_the_highest_of_several_floors_holds():
    constraints = Constraints(floor={"*": B3, "*.mlp.down_proj": B4, "0.*": B2})
    allowed = constraints.compile(MODULES, (B2, B3, B4, B8)).allowed
    assert allowed[0].tolist() == [False, True, True, True]
    assert allowed[5].tolist() == allowed[11].tolist() == [False, False, True, True]


def test_patterns_see_the_whole_layer_number():
    modules = _modules(12, ("mlp.up_proj",))
    allowed = Constraints(fixed={"1.*": B8, "[02]*": B2, "1?.mlp.up_proj": B3}).compile(modules, (B2, B3, B8)).allowed
    assert [int(row.argmax()) if row.sum() == 1 else None for row in allowed] == [
        0, 2, 0, None, None, None, None, None, None, None, 1, 1,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (Constraints(fixed={"0.self_atn.*": B4}), r"'0\.self_atn\.\*' matches none of the 12 modules.*'\*\.self_att"),
        (Constraints(floor={"self_attn.q_proj": B4}), r"LAYER\.KIND as in '0\.self_attn\.q_proj'.*'\*\.self_att"),
        (Constraints(fixed={"0.*": QuantSpec(4, 32)}), r"fixed '0\.\*': b4g32: the menu lacks b4g32 \(it holds b2g64"),
        (Constraints(floor={"0.*": QuantSpec(8, 32)}), "the menu lacks b8g32 or anything above it"),
        (
            Constraints(fixed={"0.*": B3}, floor={"*.mlp.down_proj": B4}),
            r"fixed '0\.\*': b3g64 and floor '\*\.mlp\.down_proj': b4g64 contradict .* on layer 0 mlp\.down_proj",
        ),
        (
            Constraints(fixed={"0.*": B3, "*.mlp.up_proj": B4}),
            r"fixed '0\.\*': b3g64 and fixed '\*\.mlp\.up_proj': b4g64 contradict each other on layer 0 mlp\.up_proj",
        ),
        (
            Constraints(fixed={"1.self_attn.q_proj": B3, "1.self_attn.k_proj": B4}, alike=("qkv",)),
            "contradict each other on layer 1 self_attn.q_proj and layer 1 self_attn.k_proj, which must be alike",
        ),
        (
            Constraints(fixed={"*.q_proj": B3}, floor={"0.mlp.up_proj": B4}, alike=(KINDS[:3], KINDS[2:5])),
            "layer 0 self_attn.q_proj and layer 0 mlp.up_proj, which must be alike",
        ),
        (
            Constraints(fixed={"0.*": B3, "1.*": B4}, most_configurations=1),
            r"most_configurations = 1 contradicts 2 different fixed configurations \(fixed '0\.\*': b3g64; fixed '1",
        ),
        (Constraints(alike=(("self_attn.q_proj", "self_attn.w_proj"),)), "'self_attn.w_proj'; did you mean 'self_attn"),
        (
            Constraints(device_limits=(DeviceLimit(first_layer=1, last_layer=2, size_bytes=9),)),
            "layers 1 to 2 of a device limit are not all in the model, which has layers 0 to 1",
        ),
    ],
)  # fmt: skip
def test_constraints_that_cannot_be_kept_are_named(constraints, message):
    with pytest.raises(InputError, match=message):
        constraints.compile(MODULES, (B2, B3, B4, B8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constraints(most_configurations=0), "most_configurations = 0 is not positive"),
        (lambda: Constraints(alike=("qvk",)), "did you mean 'qkv'"),
        (lambda: Constraints(alike=(("mlp.up_proj",),)), "fewer than two kinds"),
        (lambda: DeviceLimit(first_layer=3, last_layer=2, size_bytes=9), "3 to 2 of a device limit are not a ran"),
        (lambda: DeviceLimit(first_layer=0, last_layer=2, size_bytes=0), "0 bytes for layers 0 to 2 is not positive"),
        (lambda: parse_constraints({"alik": []}), "did you mean 'alike'"),
        (lambda: parse_constraints({"alike": "qkv"}), "alike = 'qkv' must be a list"),
        (lambda: parse_constraints({"alike": [3]}), "must be a list"),
        (lambda: parse_constraints({"fixed": ["0.*"]}), "fixed = .* must be a mapping"),
        (lambda: parse_constraints({"floor": {"0.*": "4 bits"}}), "write bits and group size"),
        (lambda: parse_constraints({"most_configurations": "3"}), "must be a whole number"),
        (lambda: parse_constraints({"most_configurations": True}), "must be a whole number"),
        (lambda: parse_constraints({"device_limits": {"0 to 3": "1 GB"}}), "write the first and the last"),
        (lambda: parse_constraints({"device_limits": {"0-3": 4.25}}), "not a number of bytes"),
    ],
)  # fmt: skip
def test_values_of_another_form_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_constraints_are_read_from_plain_values():
    values = {
        "alike": ["qkv", ["mlp.gate_proj", "mlp.up_proj"]],
        "fixed": {"0.*": "b8g64"},
        "floor": {"*.mlp.down_proj": "b4g64"},
        "most_configurations": 3,
        "device_limits": {"0-15": "1.5 GB", 16: "80 MB"},
    }
    assert parse_constraints(values) == Constraints(
        alike=("qkv", ("mlp.gate_proj", "mlp.up_proj")),
        fixed={"0.*": B8},
        floor={"*.mlp.down_proj": B4},
        most_configurations=3,
        device_limits=(
            DeviceLimit(first_layer=0, last_layer=15, size_bytes=1_500_000_000),
            DeviceLimit(first_layer=16, last_layer=16, size_bytes=80_000_000),
        ),
    )


def test_violations_name_each_constraint_that_is_broken():
    allocation = _allocation([B2, B3, B4, B4, B4, B3] + [B4] * 6)
    constraints = Constraints(
        alike=("qkv", "gate-up"),
        fixed={"0.self_attn.q_proj": B8},
        floor={"*.mlp.down_proj": B4},
        most_configurations=2,
        device_limits=(
            DeviceLimit(first_layer=1, last_layer=1, size_bytes=100),
            DeviceLimit(first_layer=0, last_layer=1, size_bytes=10**9),
        ),
    )
    layer_1_bytes = sum(B4.size_bytes(module.parameters) for module in MODULES[6:])
    assert violations(allocation, constraints) == [
        "layer 0 self_attn.q_proj has b2g64, fixed to b8g64",
        "layer 0 mlp.down_proj has b3g64, below the floor b4g64",
        "layer 0 self_attn.q_proj has b2g64, layer 0 self_attn.k_proj has b3g64, but must be alike",
        "3 different configurations are in use, at most 2 may be",
        f"layers 1 to 1 take {layer_1_bytes:,} bytes, at most 100 may be",
    ]
    assert violations(allocation, Constraints()) == []


def test_an_infeasible_device_limit_is_named_with_its_range():
    limit = DeviceLimit(first_layer=1, last_layer=1, size_bytes=100)
    menu = (B2, B3)
    sizes = module_sizes(MODULES, menu)
    measurements = _measurements(MODULES, menu, np.ones(sizes.shape), Constraints(device_limits=(limit,)))
    with pytest.raises(InfeasibleBudget, match="the limit of layers 1 to 1 of 100 bytes is below") as caught:
        strategy("mxq").allocate(measurements, 10**9)
    layer_1 = sizes[6:].sum(axis=0).tolist()
    assert [caught.value.smallest_bytes, caught.value.largest_bytes] == layer_1


def test_few_configurations_and_a_limit_that_exclude_each_other_are_named():
    constraints = Constraints(
        most_configurations=1,
        floor={"0.*": B4},
        device_limits=(DeviceLimit(first_layer=1, last_layer=1, size_bytes=module_sizes(MODULES[6:], (B3,)).sum()),),
    )
    measurements = _measurements(MODULES, (B2, B3, B4), np.ones((12, 3)), constraints)
    with pytest.raises(InputError, match="at most 1 different configurations and the limit of layers 1 to 1 together"):
        strategy("mxq").allocate(measurements, 10**9)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "auto"])  # which test_auto.py tries
def test_a_strategy_keeps_constraints_or_says_that_it_does_not(name):
    costs = np.sort(np.random.default_rng(0).random((12, 4)), axis=1)[:, ::-1]
    constraints = Constraints(alike=("qkv",), fixed={"1.*": B3}, most_configurations=2)
    base = _measurements(MODULES, (B2, B3, B4, B8), costs, constraints)
    signal = {module.id: float(row) for row, module in enumerate(MODULES)}
    measurements = Measurements(
        modules=base.modules, menu=base.menu, constraints=constraints,
        profiles=dict.fromkeys(("kurtosis", "sensitivity"), signal),
        costs=dict.fromkeys(("frobenius", "fisher", "sequence_fisher", "divergence"), base.costs["frobenius"]),
        layer_scores=dict.fromkeys(("avss_relative", "block_influence"), [1.0] * len(MODULES)),
    )  # fmt: skip
    budget = int(module_sizes(MODULES, (B4,)).sum())
    if STRATEGIES[name].keeps_constraints:
        assert violations(strategy(name).allocate(measurements, budget), constraints) == []
    elif name == "uniform":
        assert set(strategy(name).allocate(measurements, budget).specs.values()) == {B4}
    else:
        with pytest.raises(InputError, match=r"keeps no constraints.*loss-aware or mxq"):
            strategy(name).allocate(measurements, budget)
