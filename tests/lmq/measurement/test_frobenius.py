from pathlib import Path

import numpy as np
import pytest
import torch

from lmq.errors import DamagedFile, InputError, NotFiniteError
from lmq.formats.nf4 import NormalFloat4
from lmq.formats.spec import STOPS, QuantSpec
from lmq.measurement.frobenius import FROBENIUS_SCHEMA, frobenius_errors, frobenius_norm
from lmq.measurement.grids import fit_grids, load_grids, save_grids
from lmq.model.structure import ModuleId
from lmq.quantizers import quantizer
from lmq.tables import read_rows, write_rows

WEIGHT = torch.randn(96, 192, generator=torch.Generator().manual_seed(8)) * 0.03


@pytest.mark.parametrize("axis", [0, 1])
def test_errors_are_the_float64_norms_of_what_is_stored(axis: int) -> None:
    grids = list(fit_grids(WEIGHT, STOPS, quantizer("hqq", axis=axis)).values())
    for grid, error in zip(grids, frobenius_errors(WEIGHT, grids), strict=True):
        difference = WEIGHT.double().numpy() - grid.round_trip(WEIGHT).double().numpy()
        assert error == pytest.approx(np.linalg.norm(difference), rel=1e-6)
    assert frobenius_norm(WEIGHT) == pytest.approx(np.linalg.norm(WEIGHT.double().numpy()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_and_errors_leave_the_weight_as_it_was(dtype: torch.dtype) -> None:
    weight = WEIGHT.to(dtype)
    before = weight.clone()
    norm = frobenius_norm(weight)
    frobenius_errors(weight, [*fit_grids(weight, [QuantSpec(4, 64)], quantizer("rtn")).values(), NormalFloat4()])
    assert torch.equal(weight, before)
    assert norm == pytest.approx(np.linalg.norm(before.double().numpy()), rel=1e-12)


@pytest.mark.parametrize("group_size", [32, 64])
def test_the_error_of_nf4_is_the_norm_of_what_it_changes(group_size: int) -> None:
    nf4 = NormalFloat4(group_size=group_size)
    difference = nf4.round_trip(WEIGHT).double().numpy() - WEIGHT.double().numpy()
    assert frobenius_errors(WEIGHT, [nf4]) == [pytest.approx(np.linalg.norm(difference), rel=1e-6)]


def test_errors_fall_with_bits_and_rise_with_group_size() -> None:
    grids = fit_grids(WEIGHT, STOPS, quantizer("hqq"))
    errors = dict(zip(grids, frobenius_errors(WEIGHT, list(grids.values())), strict=True))
    for group_size in (32, 64, 128):
        by_bits = [errors[QuantSpec(bits, group_size)] for bits in (2, 3, 4, 8)]
        assert by_bits == sorted(by_bits, reverse=True)
    for bits in (2, 3, 4, 8):
        by_group = [errors[QuantSpec(bits, group_size)] for group_size in (32, 64, 128)]
        assert by_group == sorted(by_group)


def test_weights_and_menus_that_cannot_be_fitted_are_refused() -> None:
    damaged = WEIGHT.clone()
    damaged[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="layer 2 q holds 1 elements"):
        fit_grids(damaged, STOPS, quantizer("hqq"), "layer 2 q")
    with pytest.raises(InputError, match="b2g128 does not fit a matrix of 192 weights"):
        fit_grids(WEIGHT[:1], STOPS, quantizer("hqq"))


def test_saved_grids_come_back_and_have_the_same_bytes(tmp_path: Path) -> None:
    menu = [*STOPS, QuantSpec(4, 64, meta_group_size=32)]
    modules = [ModuleId(3, "self_attn.q_proj"), ModuleId(3, "mlp.up_proj")]
    grids = {module: fit_grids(WEIGHT + i, menu, quantizer("rtn", axis=0)) for i, module in enumerate(modules)}
    save_grids(tmp_path / "a.safetensors", grids)
    save_grids(tmp_path / "b.safetensors", {m: dict(reversed(grids[m].items())) for m in reversed(modules)})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = load_grids(tmp_path / "a.safetensors")
    assert loaded.keys() == grids.keys()
    for i, module in enumerate(modules):
        assert loaded[module].keys() == grids[module].keys()
        for spec, grid in loaded[module].items():
            assert (grid.axis, grid.shape) == (0, (96, 192))
            assert torch.equal(grid.round_trip(WEIGHT + i), grids[module][spec].round_trip(WEIGHT + i))


def test_damaged_grids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "grids.safetensors"
    save_grids(path, {ModuleId(0, "q"): fit_grids(WEIGHT, STOPS[:2], quantizer("rtn"))})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DamagedFile, match=r"grids.safetensors is not a readable file of grids"):
        load_grids(path)
    with pytest.raises(DamagedFile, match="other"):
        load_grids(tmp_path / "other.safetensors")


def test_schema_holds_an_error_table(tmp_path: Path) -> None:
    spec = QuantSpec(3, 64)
    row = {
        "layer": 1,
        "kind": "mlp.up_proj",
        "bits": spec.bits,
        "group_size": spec.group_size,
        "meta_bits": spec.meta_bits,
        "meta_group_size": spec.meta_group_size,
        "parameters": WEIGHT.numel(),
        "size_bytes": spec.size_bytes(WEIGHT.numel()),
        "frobenius_error": 0.5,
        "frobenius_norm": frobenius_norm(WEIGHT),
    }
    write_rows(tmp_path / "f.parquet", FROBENIUS_SCHEMA, [row])
    assert read_rows(tmp_path / "f.parquet", FROBENIUS_SCHEMA) == [row]
