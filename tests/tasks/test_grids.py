"""Grids of quantizers that look at second moments: what the stages write is what the library makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmq.checkpoint.write import quantize_layer
from lmq.formats.groups import Grid
from lmq.formats.spec import QuantSpec
from lmq.measurement.frobenius import FROBENIUS
from lmq.measurement.grids import load_grids, quantize_modules
from lmq.measurement.quantizer_moments import load_moments
from lmq.model.discovery import discover
from lmq.model.stored_matrices import load_layer_weights
from lmq.model.structure import ModuleId
from lmq.quantizers import quantizer
from lmq.tables import read_rows
from lmq_tasks.measure import GRIDS_FILE, make_grids, measure_second_moments
from lmq_tasks.states import MOMENTS_FILE, sampled_backward
from tests.tasks.conftest import MENU, Captured

LAYER = 1


@pytest.mark.parametrize("name", ["gptq", "fisher-gptq"])
def test_codes_of_a_calibrated_quantizer_are_those_of_the_library_and_are_what_is_stored(
    captured: Captured, tiny_qwen: Path, name: str
) -> None:
    """Statistics, grids with codes, their errors and the quantized layer; the stages only carry them."""
    inputs = {"hidden": captured.hidden[LAYER]}
    if name == "fisher-gptq":
        moments = captured.run(sampled_backward, {"layer": LAYER}, gradient=captured.gradient[LAYER], **inputs)
    else:
        moments = captured.run(measure_second_moments, {"layer": LAYER}, **inputs)
    config = {"layer": LAYER, "menu": MENU, "quantizer": {"name": name, "axis": 1}}
    grids = captured.run(make_grids, config, moments=moments)
    found = load_grids(captured.path(grids, GRIDS_FILE))
    structure, weights = (
        discover(tiny_qwen, weights_sha256="0"),
        load_layer_weights(tiny_qwen, discover(tiny_qwen), LAYER),
    )
    by_kind = load_moments(captured.path(moments, MOMENTS_FILE))
    modules = {module.id: weights[module.id.kind] for module in structure.in_layer(LAYER)}
    specs = [QuantSpec.parse(spec) for spec in MENU]
    expected = quantize_modules(modules, specs, quantizer(name), {module: by_kind[module.kind] for module in modules})
    for row in read_rows(captured.path(grids, FROBENIUS.file), FROBENIUS.schema):
        module, spec = ModuleId(LAYER, row["kind"]), QuantSpec(row["bits"], row["group_size"])
        rounded = found[module][spec].round_trip(modules[module])
        assert torch.equal(rounded, expected[module][spec].round_trip(modules[module]))
        assert row["frobenius_error"] == pytest.approx(float((rounded - modules[module]).double().norm()), rel=1e-5)
        assert not torch.equal(found[module][spec].codes(rounded), Grid.codes(found[module][spec], modules[module]))
    tensors = quantize_layer(structure, modules, found, dict.fromkeys(modules, specs[0]))
    for module in modules:
        assert torch.equal(tensors[f"{structure.path(module)}.codes"], expected[module][specs[0]].packed_codes)
