import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from lmq.allocation.budget import module_sizes
from lmq.allocation.error_table import ErrorTable
from lmq.allocation.strategies import Measurements, strategy
from lmq.errors import InputError
from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModuleId, ModuleInfo

MENU = tuple(QuantSpec.parse(name) for name in ("b2g64", "b3g64", "b4g64"))
MODULES = tuple(
    ModuleInfo(ModuleId(layer, kind), *shape)
    for layer in range(3)
    for kind, shape in {"self_attn.q_proj": (64, 64, "attn_in"), "mlp.down_proj": (64, 128, "mlp_down")}.items()
)
SCORES = {"avss_relative": [0.1, 0.1, 0.8], "block_influence": [0.9, 0.02, 0.1]}
METRIC = {"avss-weighted": "avss_relative", "bi-weighted": "block_influence"}


def _measurements(scores=SCORES) -> Measurements:
    norms = np.sort(np.random.default_rng(0).random((len(MODULES), len(MENU))), axis=1)[:, ::-1].copy()
    table = ErrorTable(tuple(m.id for m in MODULES), MENU, norms, module_sizes(MODULES, MENU))
    return Measurements(modules=MODULES, menu=MENU, costs={"frobenius": table}, layer_scores=scores)


@pytest.mark.parametrize("name", METRIC)
def test_norms_are_weighted_by_the_layers_importance_over_its_mean(name):
    measurements = _measurements()
    sizes = module_sizes(MODULES, MENU)
    budget = int(sizes[:, 1].sum())
    scores = SCORES[METRIC[name]]
    weights = [scores[module.id.layer] / (sum(scores) / 3) for module in MODULES]

    def cost(choice):
        return math.fsum(
            weight * measurements.costs["frobenius"].cost[row, column]
            for row, (weight, column) in enumerate(zip(weights, choice, strict=True))
        )

    def fits(choice):
        return sum(sizes[row, column] for row, column in enumerate(choice)) <= budget

    expected = min(filter(fits, product(range(3), repeat=len(MODULES))), key=cost)
    allocation = strategy(name).allocate(measurements, budget)
    assert [MENU.index(spec) for spec in allocation.specs.values()] == list(expected)
    assert allocation.objective == pytest.approx(cost(expected))
    costs = {assignment.module: assignment.cost for assignment in allocation.assignments}
    for row, module in enumerate(MODULES):
        assert costs[module.id] == pytest.approx(
            weights[row] * measurements.costs["frobenius"].cost[row, expected[row]]
        )


@pytest.mark.parametrize("name", METRIC)
def test_equal_importance_is_mxq(name):
    measurements = _measurements({metric: [0.3] * 3 for metric in SCORES})
    budget = int(module_sizes(MODULES, MENU)[:, 1].sum())
    assert strategy(name).allocate(measurements, budget).specs == strategy("mxq").allocate(measurements, budget).specs


def test_an_influence_just_below_0_weighs_nothing():
    measurements = _measurements({"block_influence": [0.5, -1e-16, 0.1]})
    allocation = strategy("bi-weighted").allocate(measurements, int(module_sizes(MODULES, MENU)[:, 1].sum()))
    assert {assignment.cost for assignment in allocation.assignments if assignment.module.layer == 1} == {0.0}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "needs layer_activity, which was not measured"),
        ({"block_influence": [0.0] * 3}, "weighs nothing: give finite numbers, not all 0"),
        ({"block_influence": [0.1, math.nan, 0.2]}, "weighs nothing"),
        ({"block_influence": [0.1, 0.2]}, "hold 2 layers, but there are modules of layer 2"),
    ],
)
def test_importance_that_weighs_nothing_is_refused(scores, message):
    measurements = replace(_measurements(), layer_scores=scores)
    with pytest.raises(InputError, match=message):
        strategy("bi-weighted").allocate(measurements, int(module_sizes(MODULES, MENU)[:, 2].sum()))
