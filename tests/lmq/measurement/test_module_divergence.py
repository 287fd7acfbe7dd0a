import numpy as np
import pytest
import torch

from lmq.allocation.budget import module_sizes
from lmq.allocation.error_table import ErrorTable
from lmq.allocation.strategies import Measurements, strategy
from lmq.errors import InputError
from lmq.formats.spec import STOPS, QuantSpec
from lmq.measurement.module_divergence import carried_costs, default_specs, standard_error
from lmq.model.structure import ModuleId, ModuleInfo


def specs(*names: str) -> tuple[QuantSpec, ...]:
    return tuple(QuantSpec.parse(name) for name in names)


def test_one_configuration_per_bit_width_is_measured() -> None:
    assert default_specs(STOPS) == specs("b2g64", "b3g64", "b4g64")
    assert default_specs(specs("b3g128", "b3g32", "b8g64")) in (specs("b3g32"), specs("b3g128"))
    assert default_specs(specs("b8g32", "b8g128")) == specs("b8g128")
    assert default_specs(specs("mxfp4", "fp8")) == specs("mxfp4")
    assert default_specs(specs("fp8", "b8g128")) == specs("fp8")


def test_what_was_not_measured_follows_the_cheap_curve() -> None:
    menu, measured_specs = specs("b2g64", "b3g64", "b3g32", "b8g64"), specs("b2g64", "b3g64")
    measured = np.array([[8.0, 2.0]])
    cheap = np.array([[40.0, 16.0, 12.0, 0.5, 40.0, 16.0]])
    assert carried_costs(measured, measured_specs, cheap, menu).tolist() == [[8.0, 2.0, 1.5, 0.0625]]
    nothing = np.zeros((1, 6))
    assert carried_costs(measured, measured_specs, nothing, menu).tolist() == [[8.0, 2.0, 2.0, 2.0]]


def test_standard_error_is_over_sequences() -> None:
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    assert standard_error(values) == pytest.approx(float(np.std([1, 2, 4], ddof=1) / 3**0.5))
    assert standard_error(values[:1]) is None


def test_the_program_spends_bits_where_the_divergence_was_measured_to_be() -> None:
    menu = specs("b2g64", "b4g64", "b8g64")
    modules = tuple(ModuleInfo(ModuleId(layer, "mlp.down_proj"), 128, 128, "mlp_down") for layer in range(2))
    ids = tuple(module.id for module in modules)

    def table(names: tuple[QuantSpec, ...], cost: list[list[float]]) -> ErrorTable:
        return ErrorTable(ids, names, np.array(cost), module_sizes(modules, names))

    fisher = table(menu, [[9, 3, 1], [9, 3, 1]])
    measurements = Measurements(
        modules=modules,
        menu=menu,
        costs={"sequence_fisher": fisher, "divergence": table(specs("b4g64"), [[0.1], [5.0]])},
    )
    budget_bytes = int(module_sizes(modules, menu)[0, [0, 2]].sum())
    allocation = strategy("kl").allocate(measurements, budget_bytes)
    assert [spec.name for spec in allocation.specs.values()] == ["b2g64", "b8g64"]
    assert allocation.objective == pytest.approx(0.1 * 3 + 5 / 3)
    with pytest.raises(InputError, match="needs divergence"):
        strategy("kl").allocate(
            Measurements(modules=modules, menu=menu, costs={"sequence_fisher": fisher}), budget_bytes
        )
