import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmq.allocation.budget import module_sizes
from lmq.allocation.error_table import ErrorTable
from lmq.allocation.refine import LocalCosts
from lmq.allocation.strategies import STRATEGIES, TRIALS, Measurements, strategy
from lmq.allocation.strategies.base import profile_outliers
from lmq.allocation.strategies.boost import boosted_column
from lmq.allocation.strategies.loss_aware import non_increasing
from lmq.errors import InfeasibleBudget, InputError
from lmq.formats.spec import STOPS, QuantSpec
from lmq.measurement.registry import MEASUREMENTS
from lmq.model.structure import ModuleId, ModuleInfo

SHAPES = {"self_attn.q_proj": (128, 128, "attn_in"), "mlp.down_proj": (128, 512, "mlp_down")}
LAYERS = 24
METRICS = ("avss_relative", "block_influence")
SPIKES = {"self_attn.q_proj": (8,), "mlp.down_proj": (8, 16)}


def _modules(layers: int = LAYERS) -> tuple[ModuleInfo, ...]:
    return tuple(ModuleInfo(ModuleId(layer, kind), *shape) for layer in range(layers) for kind, shape in SHAPES.items())


def _signal(modules, spikes=SPIKES) -> dict[ModuleId, float]:
    """A gentle wave over the layers, with spikes."""
    return {
        module.id: 1 + 0.01 * (module.id.layer % 3) + 5 * (module.id.layer in spikes[module.id.kind])
        for module in modules
    }


def _table(modules, menu, seed: int) -> ErrorTable:
    generator = np.random.default_rng(seed)
    fall = np.array([2.0**-spec.bits for spec in menu])
    cost = generator.lognormal(0, 1, len(modules))[:, None] * fall * generator.lognormal(0, 0.05, (len(modules), 1))
    return ErrorTable(tuple(m.id for m in modules), tuple(menu), cost, module_sizes(modules, menu))


class _AdditiveTrials:
    """A model whose divergence is a sum over modules, with no slope to follow."""

    def __init__(self, table: ErrorTable):
        self._table = table

    def divergences(self, allocation):
        columns = {spec: column for column, spec in enumerate(self._table.specs)}
        modules = enumerate(self._table.modules)
        total = sum(self._table.cost[row, columns[allocation[module]]] for row, module in modules)
        return np.array([total])

    def local_costs(self, allocation, menu):
        nothing = np.zeros((len(allocation), len(menu)))
        return LocalCosts(nothing, nothing)


def _measurements(layers: int = LAYERS, menu=STOPS) -> Measurements:
    modules = _modules(layers)
    return Measurements(
        modules=modules,
        menu=tuple(menu),
        profiles={"kurtosis": _signal(modules), "sensitivity": _signal(modules)},
        costs={
            "frobenius": _table(modules, menu, 0),
            "fisher": _table(modules, menu, 1),
            "sequence_fisher": _table(modules, menu, 2),
            "divergence": _table(modules, menu[:2], 3),
        },
        layer_scores={name: [1.0 + layer % 3 for layer in range(layers)] for name in METRICS},
        trials=_AdditiveTrials(_table(modules, menu, 4)),
    )


def _uniform_bytes(modules, name: str) -> int:
    return int(module_sizes(modules, [QuantSpec.parse(name)]).sum())


def _boosted(allocation) -> dict[str, set[int]]:
    chosen: dict[str, set[int]] = {kind: set() for kind in SHAPES}
    for assignment in allocation.assignments:
        if assignment.boosted:
            chosen[assignment.module.kind].add(assignment.module.layer)
    return chosen


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_says_what_it_is(name):
    item = strategy(name)
    assert item.name == name
    assert item.summary
    assert item.source
    assert item.needs <= {*MEASUREMENTS, TRIALS}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("layers", [1, 3, LAYERS])
def test_every_strategy_gives_every_module_a_configuration_of_the_menu(name, layers):
    measurements = _measurements(layers)
    budget_bytes = _uniform_bytes(measurements.modules, "b4g64")
    allocation = strategy(name).allocate(measurements, budget_bytes)
    assert list(allocation.specs) == [module.id for module in measurements.modules]
    assert set(allocation.specs.values()) <= set(STOPS)
    for assignment, module in zip(allocation.assignments, measurements.modules, strict=True):
        assert assignment.size_bytes == assignment.spec.size_bytes(module.parameters)
    if "boost" not in name:
        assert allocation.size_bytes <= budget_bytes


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_strategy_accepts_a_budget_below_the_smallest(name):
    measurements = _measurements()
    smallest = _uniform_bytes(measurements.modules, "b2g128")
    with pytest.raises(InfeasibleBudget, match=f"{smallest:,} to"):
        strategy(name).allocate(measurements, smallest - 1)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if strategy(name).needs])
def test_what_was_not_measured_is_named(name):
    modules = _modules()
    with pytest.raises(InputError, match=r"needs \w+, which was not measured|with trials"):
        strategy(name).allocate(Measurements(modules=modules, menu=STOPS), _uniform_bytes(modules, "b4g64"))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_uses_only_what_it_needs(name):
    full = _measurements()
    needs = strategy(name).needs
    needed = Measurements(
        modules=full.modules,
        menu=STOPS,
        profiles={need: profile for need, profile in full.profiles.items() if need in needs},
        costs={need: table for need, table in full.costs.items() if need in needs},
        layer_scores=full.layer_scores if "layer_activity" in needs else None,
        trials=full.trials if "trials" in needs else None,
    )
    budget_bytes = _uniform_bytes(full.modules, "b4g64")
    bare = strategy(name).allocate(needed, budget_bytes)
    assert bare == strategy(name).allocate(full, budget_bytes)


def test_uniform_is_the_largest_that_fits_whatever_the_order_of_the_menu():
    measurements = _measurements(menu=(QuantSpec(4, 64), QuantSpec(2, 64), QuantSpec(3, 64)))
    budget_bytes = _uniform_bytes(measurements.modules, "b4g64") - 1
    allocation = strategy("uniform").allocate(measurements, budget_bytes)
    assert set(allocation.specs.values()) == {QuantSpec(3, 64)}
    assert allocation.gap is None


@pytest.mark.parametrize("boost_stop", [1, 2, 3])
def test_a_boost_moves_outliers_up_the_stops(boost_stop):
    measurements = _measurements()
    budget_bytes = _uniform_bytes(measurements.modules, "b3g64")
    allocation = strategy("kurt-boost", boost_stop=boost_stop).allocate(measurements, budget_bytes)
    up = STOPS[STOPS.index(QuantSpec(3, 64)) + boost_stop]
    spikes = {kind: {*layers, *(layer + 1 for layer in layers)} for kind, layers in SPIKES.items()}
    assert _boosted(allocation) == spikes
    for module, spec in allocation.specs.items():
        assert spec == (up if module.layer in spikes[module.kind] else QuantSpec(3, 64))
    assert allocation.size_bytes > budget_bytes


@pytest.mark.parametrize(
    ("base", "boost_stop", "menu", "expected"),
    [
        ("b8g64", 3, STOPS, "b8g32"),
        ("b8g32", 1, STOPS, "b8g32"),
        ("b3g64", 2, (QuantSpec(2, 64), QuantSpec(3, 64), QuantSpec(4, 64), QuantSpec(8, 64)), "b4g64"),
        ("b4g64", 1, (QuantSpec(3, 64), QuantSpec(4, 64)), "b4g64"),
        ("b4g128", 2, (QuantSpec(3, 64), QuantSpec(4, 128), QuantSpec(4, 64)), "b4g64"),
        ("b4g16", 1, (QuantSpec(4, 16), QuantSpec(8, 128)), "b8g128"),
        ("b2g256", 1, (QuantSpec(2, 256), QuantSpec(2, 128)), "b2g128"),
    ],
)
def test_a_missing_stop_becomes_the_next_larger_or_the_largest(base, boost_stop, menu, expected):
    assert menu[boosted_column(menu, menu.index(QuantSpec.parse(base)), boost_stop)].name == expected


@pytest.mark.parametrize("name", ["sensi-boost", "kurt-boost"])
@pytest.mark.parametrize("base", ["b2g128", "b2g64", "b4g64"])
def test_a_paid_boost_keeps_the_budget(name, base):
    measurements = _measurements()
    budget_bytes = _uniform_bytes(measurements.modules, base)
    free = strategy(name).allocate(measurements, budget_bytes)
    paid = strategy(name, paid=True).allocate(measurements, budget_bytes)
    assert paid.size_bytes <= budget_bytes < free.size_bytes


def test_the_least_sensitive_modules_pay_for_a_boost():
    measurements = _measurements()
    budget_bytes = _uniform_bytes(measurements.modules, "b4g64")
    options = {"boost_stop": 1, "top_m": 1}
    free = strategy("sensi-boost", **options).allocate(measurements, budget_bytes)
    paid = strategy("sensi-boost", paid=True, **options).allocate(measurements, budget_bytes)
    assert _boosted(paid) == _boosted(free)
    payers = [module for module, spec in paid.specs.items() if spec == QuantSpec(4, 128)]
    others = [module for module, spec in paid.specs.items() if spec == QuantSpec(4, 64)]
    assert payers
    assert max(measurements.profiles["sensitivity"][m] for m in payers) <= min(
        measurements.profiles["sensitivity"][m] for m in others
    )


@pytest.mark.parametrize("name", ["sensi-boost", "kurt-boost", "mxq"])
def test_towers_of_a_model_are_looked_at_apart(name):
    """A tower behind another changes nothing in the first, whatever jumps between them."""
    modules = _modules(2 * LAYERS)
    signal = _signal(_modules(LAYERS))
    behind = {info.id: 1000.0 + info.id.layer for info in modules[len(modules) // 2 :]}
    table = _table(modules, STOPS, 0)
    measured = Measurements(
        modules=modules,
        menu=STOPS,
        profiles=dict.fromkeys(("kurtosis", "sensitivity"), signal | behind),
        costs={"frobenius": table},
        towers=(range(LAYERS), range(LAYERS, 2 * LAYERS)),
    )
    profile = measured.profiles["kurtosis"]
    of_first = profile_outliers(_measurements(), "kurtosis", signal, 0)
    found = profile_outliers(measured, "kurtosis", profile, 0)
    assert found == of_first
    assert any(found.values())
    together = Measurements(modules=modules, menu=STOPS, profiles=measured.profiles)
    assert profile_outliers(together, "kurtosis", profile, 0) != of_first
    assert strategy(name).allocate(measured, _uniform_bytes(modules, "b4g64")).size_bytes > 0


def test_a_random_boost_draws_as_many_of_the_others():
    measurements = _measurements()
    budget_bytes = _uniform_bytes(measurements.modules, "b4g64")
    allocate = lambda **options: strategy("random-boost", **options).allocate(measurements, budget_bytes)  # noqa: E731
    chosen = {
        kind: layers | _boosted(strategy("kurt-boost").allocate(measurements, budget_bytes))[kind]
        for kind, layers in _boosted(strategy("sensi-boost").allocate(measurements, budget_bytes)).items()
    }
    for like in ("sensi-boost", "kurt-boost"):
        drawn = _boosted(allocate(like=like))
        for kind, layers in _boosted(strategy(like).allocate(measurements, budget_bytes)).items():
            assert len(drawn[kind]) == len(layers)
            assert not drawn[kind] & chosen[kind]
    assert allocate(seed=1) == allocate(seed=1)
    assert allocate(seed=1) != allocate(seed=2)


@pytest.mark.parametrize(("name", "measured"), [("mxq", "frobenius"), ("loss-aware", "sequence_fisher")])
def test_programs_reach_the_brute_force_optimum(name, measured):
    menu = (QuantSpec(2, 64), QuantSpec(3, 64), QuantSpec(4, 64))
    measurements = _measurements(layers=3, menu=menu)
    budget_bytes = _uniform_bytes(measurements.modules, "b3g64")
    table = measurements.costs[measured]
    rows = np.arange(6)
    best = min(
        table.cost[rows, list(choice)].sum()
        for choice in itertools.product(range(3), repeat=6)
        if table.size_bytes[rows, list(choice)].sum() <= budget_bytes
    )
    allocation = strategy(name).allocate(measurements, budget_bytes)
    assert allocation.objective == pytest.approx(best, rel=1e-9)
    assert sum(a.cost for a in allocation.assignments) == pytest.approx(best, rel=1e-9)
    assert allocation.gap <= 1e-9


def test_the_order_of_an_error_table_does_not_matter():
    measurements = _measurements()
    table = measurements.costs["frobenius"]
    rows, columns = np.random.default_rng(0).permutation(len(table.modules)), [5, 3, 11, 0, 1, 2, 4, 6, 7, 8, 9, 10]
    shuffled = ErrorTable(
        tuple(table.modules[row] for row in rows),
        tuple(table.specs[column] for column in columns),
        table.cost[np.ix_(rows, columns)],
        table.size_bytes[np.ix_(rows, columns)],
    )
    other = Measurements(modules=measurements.modules, menu=STOPS[::-1], costs={"frobenius": shuffled})
    budget_bytes = _uniform_bytes(measurements.modules, "b4g64")
    assert strategy("mxq").allocate(other, budget_bytes) == strategy("mxq").allocate(measurements, budget_bytes)


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_monotone_costs_fall_with_size_and_never_exceed_the_measured(seed):
    generator = np.random.default_rng(seed)
    costs, sizes = generator.random((4, 6)), generator.integers(1, 5, (4, 6))
    given_costs = costs.copy()
    monotone = non_increasing(costs, sizes)
    assert np.array_equal(costs, given_costs)
    for row in range(4):
        for column in range(6):
            smaller = sizes[row] < sizes[row, column]
            assert monotone[row, column] == min([costs[row, column], *costs[row][smaller]])


@pytest.mark.parametrize("name", ["loss-aware", "kl"])
def test_of_configurations_that_are_equally_large_the_better_one_is_taken(name):
    """Rows of 576 weights are no multiple of 256: llama.cpp stores them in 4.5 bits for all of these types."""
    menu = [QuantSpec.parse(type_name) for type_name in ("q2_k", "q3_k", "iq4_xs")]
    modules = tuple(ModuleInfo(ModuleId(layer, "mlp.up_proj"), 64, 576, "mlp_in") for layer in range(4))
    sizes = module_sizes(modules, menu)
    assert (sizes == sizes[0, 0]).all()
    for best in range(3):
        cost = np.full(sizes.shape, 2.0)
        cost[:, best] = 1.0
        table = ErrorTable(tuple(module.id for module in modules), tuple(menu), cost, sizes)
        measured = Measurements(
            modules=modules, menu=tuple(menu), costs={"sequence_fisher": table, "divergence": table}
        )
        assert set(strategy(name).allocate(measured, int(sizes.max(1).sum())).specs.values()) == {menu[best]}


def test_kurtosis_scales_the_cost():
    measurements = _measurements()
    allocation = strategy("kurt-scaled").allocate(measurements, _uniform_bytes(measurements.modules, "b4g64"))
    highest = max(measurements.profiles["kurtosis"].values())
    lowest = min(measurements.profiles["kurtosis"].values())
    norms = dict(zip(measurements.modules, measurements.costs["frobenius"].cost, strict=True))
    for assignment, module in zip(allocation.assignments, measurements.modules, strict=True):
        norm = norms[module][STOPS.index(assignment.spec)]
        kind_highest = max(v for m, v in measurements.profiles["kurtosis"].items() if m.kind == module.id.kind)
        assert kind_highest <= highest
        scaled = (measurements.profiles["kurtosis"][module.id] - lowest) / (kind_highest - lowest)
        assert assignment.cost == pytest.approx(norm * (1 + scaled), rel=1e-12)


def test_penalties_double_on_outlier_layers():
    measurements = _measurements()
    allocation = strategy("kurt-milp").allocate(measurements, _uniform_bytes(measurements.modules, "b4g64"))
    penalty = {2: 4, 3: 2, 4: 1, 8: 1}
    spikes = {kind: {*layers, *(layer + 1 for layer in layers)} for kind, layers in SPIKES.items()}
    for assignment in allocation.assignments:
        factor = 2 if assignment.module.layer in spikes[assignment.module.kind] else 1
        share = assignment.parameters / allocation.parameters
        expected = penalty[assignment.spec.bits] * factor / assignment.spec.bits_per_weight * 100 * share
        assert assignment.cost == pytest.approx(expected, rel=1e-12)


def test_the_structural_rule_protects_ends_and_down_projections():
    modules = tuple(
        ModuleInfo(ModuleId(layer, kind), 128, 128, part)
        for layer in range(LAYERS)
        for kind, part in [("q", "attn_in"), ("o", "attn_out"), ("up", "mlp_gate"), ("down", "mlp_down")]
    )
    measurements = Measurements(modules=modules, menu=STOPS)
    budget_bytes = _uniform_bytes(modules, "b4g64")
    allocation = strategy("structural").allocate(measurements, budget_bytes)
    assert allocation.size_bytes <= budget_bytes
    protected = {m.id for m in modules if m.id.layer in (0, LAYERS - 1) or m.part == "mlp_down"}
    assert {a.module for a in allocation.assignments if a.boosted} == protected
    assert {allocation.specs[module] for module in protected} == {QuantSpec(4, 32)}
    down = [m.layer for m, spec in allocation.specs.items() if spec.bits_per_weight < QuantSpec(4, 64).bits_per_weight]
    assert abs(np.mean(down) - (LAYERS - 1) / 2) < 2


def test_missing_modules_and_configurations_are_named():
    measurements = _measurements()
    budget_bytes = _uniform_bytes(measurements.modules, "b4g64")
    table = _table(_modules()[2:], STOPS[1:], 0)
    lacking = Measurements(modules=measurements.modules, menu=STOPS, costs={"frobenius": table})
    with pytest.raises(InputError, match=r"lacks layer 0 self_attn\.q_proj, layer 0 mlp\.down_proj, b2g128"):
        strategy("mxq").allocate(lacking, budget_bytes)
    signal = {module: value for module, value in measurements.profiles["kurtosis"].items() if module.layer != 5}
    lacking = Measurements(modules=measurements.modules, menu=STOPS, profiles={"kurtosis": signal})
    with pytest.raises(InputError, match=r"no kurtosis for layer 5 self_attn\.q_proj, layer 5 mlp\.down_proj"):
        strategy("kurt-boost").allocate(lacking, budget_bytes)


def test_costs_that_are_not_finite_are_named():
    measurements = _measurements()
    measurements.costs["sequence_fisher"].cost[3, 2] = np.nan
    with pytest.raises(InputError, match=r"no finite cost for layer 1 mlp\.down_proj at b2g32"):
        strategy("loss-aware").allocate(measurements, _uniform_bytes(measurements.modules, "b4g64"))


def test_a_configuration_that_does_not_fit_a_module_is_named():
    odd = (*_modules(), ModuleInfo(ModuleId(0, "odd"), 1, 96, "attn_in"))
    with pytest.raises(InputError, match=r"layer 0 odd: b2g128 does not fit"):
        strategy("uniform").allocate(Measurements(modules=odd, menu=STOPS), 10**9)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kurtboost", {}, "unknown strategy 'kurtboost'; did you mean 'kurt-boost'"),
        ("sensi-boost", {"topm": 1}, "did you mean 'top_m'"),
        ("mxq", {"top_m": 1}, "'mxq' has no options"),
        ("sensi-boost", {"boost_stop": 4}, "boost_stop = 4 is not allowed"),
        ("sensi-boost", {"boost_stop": "2"}, "must be of type int"),
        ("sensi-boost", {"paid": 1}, "must be of type bool"),
        ("sensi-milp", {"top_m": -1}, "top_m = -1 is negative"),
        ("random-boost", {"like": "mxq"}, "unknown boost"),
        ("random-boost", {"seed": -1}, "seed = -1"),
    ],
)
def test_unknown_strategies_and_options_name_the_nearest(name, options, message):
    with pytest.raises(InputError, match=message):
        strategy(name, **options)
