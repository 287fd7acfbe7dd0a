import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lmq.allocation.budget import module_sizes
from lmq.allocation.constraints import Constraints, violations
from lmq.allocation.error_table import ErrorTable
from lmq.allocation.refine import ModelTrials, Slice
from lmq.allocation.strategies import Auto, Measurements
from lmq.errors import InputError, NotFiniteError
from lmq.formats.spec import QuantSpec
from lmq.measurement.frobenius import frobenius_errors
from lmq.measurement.grids import Allocation, fit_grids
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.model.discovery import discover
from lmq.model.stored_matrices import load_layer_weights
from lmq.model.streaming import StreamedModel
from lmq.quantizers.rtn import RoundToNearest

MENU = tuple(QuantSpec.parse(name) for name in ("b2g64", "b3g64", "b4g64", "b8g64"))


@pytest.fixture(scope="module")
def measured(tiny_llama: Path) -> Measurements:
    """A tiny model with real trials; the other tables are made up but in the right order of size."""
    structure = discover(tiny_llama, weights_sha256="0")
    grids, frobenius = {}, []
    for layer in range(structure.layers):
        weights = load_layer_weights(tiny_llama, structure, layer)
        for module in structure.in_layer(layer):
            grids[module.id] = fit_grids(weights[module.id.kind], MENU, RoundToNearest())
            frobenius.append(frobenius_errors(weights[module.id.kind], list(grids[module.id].values())))
    generator = np.random.default_rng(0)
    changes = {
        (module, spec): generator.normal(0, 0.05 * error, 8)
        for (module, by_spec), errors in zip(grids.items(), frobenius, strict=True)
        for spec, error in zip(by_spec, errors, strict=True)
    }
    model = StreamedModel.open(tiny_llama, structure)
    point = QuantizedPoint(
        model, lambda layer: {m: g for m, g in grids.items() if m.layer == layer}, matmul_dtype=torch.float32
    )
    tokens = torch.randint(2, 500, (4, 16), generator=torch.Generator().manual_seed(3))
    slices = [Slice(token_ids=half, reference_states=point.last_states(half)) for half in tokens.split(2)]
    ids = tuple(module.id for module in structure.modules)
    sizes_bytes = module_sizes(structure.modules, MENU)
    curvature = np.array([[np.square(changes[module, spec]).mean() for spec in MENU] for module in ids])
    return Measurements(
        modules=structure.modules,
        menu=MENU,
        profiles={"kurtosis": {module: 3.0 + index for index, module in enumerate(ids)}},
        costs={
            "frobenius": ErrorTable(ids, MENU, np.array(frobenius), sizes_bytes),
            "sequence_fisher": ErrorTable(ids, MENU, curvature, sizes_bytes),
        },
        trials=ModelTrials(point, calibration=slices[0], validation=slices[1], loss_changes=changes),
    )


def uniform_bytes(measurements: Measurements, name: str) -> int:
    return int(module_sizes(measurements.modules, [QuantSpec.parse(name)]).sum())


def test_result_is_the_best_plan_tried_and_no_worse_than_uniform(measured: Measurements) -> None:
    budget_bytes = uniform_bytes(measured, "b3g64")
    allocation, refinement = Auto(rounds=2).refine(measured, budget_bytes)
    assert allocation.size_bytes <= budget_bytes
    assert measured.trials is not None
    assert refinement.loss == pytest.approx(measured.trials.divergences(allocation.specs).mean(), rel=1e-6)
    assert refinement.loss == min(step.loss for step in refinement.tried)
    uniform = measured.trials.divergences(dict.fromkeys(allocation.specs, QuantSpec.parse("b3g64"))).mean()
    assert refinement.uniform_loss == pytest.approx(uniform, rel=1e-6)
    assert refinement.loss < uniform
    origins = {step.origin for step in refinement.tried}
    assert {"uniform", "structural", "kurt-boost", "mxq", "loss-aware", "round 1, caution 1.5"} <= origins


def test_local_costs_are_nothing_at_the_plan_and_predict_a_small_change(measured: Measurements) -> None:
    assert isinstance(measured.trials, ModelTrials)
    allocation = dict.fromkeys((module.id for module in measured.modules), QuantSpec.parse("b3g64"))
    costs = measured.trials.local_costs(allocation, MENU)
    now = MENU.index(QuantSpec.parse("b3g64"))
    assert not costs.first_order[:, now].any()
    assert not costs.second_order[:, now].any()
    assert (np.delete(costs.second_order, now, axis=1) > 0).all()


def test_a_plan_that_breaks_the_model_is_never_chosen(measured: Measurements) -> None:
    class Fragile:
        """Every allocation but uniform breaks the model."""

        def divergences(self, allocation: Allocation) -> np.ndarray:
            if len(set(allocation.values())) > 1:
                raise NotFiniteError("the states that leave layer 0 are not finite")
            return np.ones(2)

    fragile = Measurements(
        modules=measured.modules,
        menu=MENU,
        profiles=measured.profiles,
        costs=measured.costs,
        trials=Fragile(),  # type: ignore[arg-type]
    )
    allocation, refinement = Auto(rounds=0).refine(fragile, uniform_bytes(measured, "b4g64"))
    assert set(allocation.specs.values()) == {QuantSpec.parse("b4g64")}
    assert refinement.gain_over_uniform == 0
    assert any(math.isinf(step.loss) for step in refinement.tried)


def test_constraints_are_kept_whatever_uniform_does(measured: Measurements) -> None:
    constraints = Constraints(alike=("qkv",), fixed={"0.*": QuantSpec.parse("b4g64")})
    allocation, refinement = Auto(rounds=1).refine(
        replace(measured, constraints=constraints), uniform_bytes(measured, "b3g64")
    )
    assert violations(allocation, constraints) == []
    assert {step.origin for step in refinement.tried} >= {"mxq", "loss-aware"}
    assert not {step.origin for step in refinement.tried} & {"uniform", "structural", "kurt-boost"}
    assert measured.trials is not None
    assert refinement.loss == pytest.approx(measured.trials.divergences(allocation.specs).mean(), rel=1e-6)


def test_trials_are_asked_for(measured: Measurements) -> None:
    without = Measurements(modules=measured.modules, menu=MENU)
    with pytest.raises(InputError, match="auto tries allocations on the model"):
        Auto().allocate(without, uniform_bytes(measured, "b4g64"))
    with pytest.raises(InputError, match="rounds = -1 is negative"):
        Auto(rounds=-1)
