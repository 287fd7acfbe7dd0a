"""Each example is one new file and one entry of a registry, used as a user would use it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import lmq
from lmq.allocation.budget import feasible_range
from lmq.allocation.strategies import STRATEGIES, Measurements, strategy
from lmq.checkpoint.write import quantized_bytes, read_quantization_config, write_checkpoint
from lmq.errors import InputError
from lmq.evaluation.baselines import RoundedBaseline
from lmq.export import FORMATS as EXPORTS
from lmq.export import ExportFormat
from lmq.export.check import export_checked
from lmq.export.source import QuantizedCheckpoint
from lmq.formats import FORMATS
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model.discovery import discover
from lmq.model.tensors import read_headers, read_tensors
from lmq.quantizers import QUANTIZERS, quantizer
from lmq_flows.cli import COMMANDS, main
from lmq_flows.config.run import parse_run_config
from tests.architecture.examples import command
from tests.architecture.examples.format import Binary
from tests.architecture.examples.quantizer import Deviations
from tests.architecture.examples.strategy import Alternating


def run_config(**values: object) -> object:
    return parse_run_config(
        {"name": "example", "models": [{"name": "tiny", "source": "tiny"}], "budgets": ["3 bpw"]} | values
    )


def test_a_strategy_allocates(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "alternating", Alternating)  # type: ignore[misc]
    structure = discover(tiny_qwen, weights_sha256="0")
    measurements = Measurements(modules=structure.modules, menu=STOPS)
    budget_bytes = sum(feasible_range(structure, STOPS)) // 2
    allocation = strategy("alternating", first=1).allocate(measurements, budget_bytes)
    assert 0.8 * budget_bytes < allocation.size_bytes <= budget_bytes
    large = {assignment.module.layer for assignment in allocation.assignments if assignment.spec == STOPS[-1]}
    assert large == {1, 3}
    run_config(strategies=["alternating", {"name": "alternating", "options": {"first": 1}}])
    with pytest.raises(InputError, match="unknown option of strategy 'alternating'"):
        strategy("alternating", frist=1)


def test_a_quantizer_quantizes_and_its_checkpoint_opens(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUANTIZERS, "deviations", Deviations)  # type: ignore[misc]
    structure = discover(tiny_qwen, weights_sha256="0")
    allocation = {module.id: QuantSpec(4, 64) for module in structure.modules}
    write_checkpoint(tmp_path / "q", tiny_qwen, structure, allocation, quantizer("deviations", reach=3.0))
    opened = lmq.load(tmp_path / "q", dense=True, verify=True)
    weights = read_tensors(read_headers(tiny_qwen).values())
    for module in structure.modules:
        path = f"{structure.path(module.id)}.weight"
        weight, stored = weights[path].float(), opened.get_parameter(path)
        assert 0 < (stored - weight).norm() / weight.norm() < 0.2
    assert read_quantization_config(tmp_path / "q").quantizer["name"] == "deviations"
    run_config(strategies=["uniform"], measure={"quantizer": "deviations", "quantizer_options": {"reach": 2.0}})
    with pytest.raises(InputError, match=r"measure\.quantizer: unknown quantizer 'deviation'; .*'deviations'"):
        run_config(strategies=["uniform"], measure={"quantizer": "deviation"})


def test_a_format_is_a_baseline(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "binary", Binary)  # type: ignore[misc]
    structure = discover(tiny_qwen, weights_sha256="0")
    baseline = RoundedBaseline.parse("binary g32")
    assert baseline.label == "binary g32"
    assert baseline.size_bytes(structure) * 8 == 2 * sum(module.parameters for module in structure.modules)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    groups = weight.reshape(-1, 32)
    assert torch.equal(baseline.round_trip(weight).sign(), weight.sign())
    torch.testing.assert_close(baseline.round_trip(weight).abs().reshape(-1, 32)[:, 0], groups.abs().mean(1))
    run_config(strategies=["uniform"], baselines=["binary"])
    with pytest.raises(InputError, match="'binary' or 'binary g128'"):
        RoundedBaseline.parse("ternary")


def test_an_export_is_written_and_checked(tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ExportFormat(summary="one file", module="tests.architecture.examples.export")
    monkeypatch.setitem(EXPORTS, "one-file", line)  # type: ignore[misc]
    structure = discover(tiny_qwen, weights_sha256="0")
    allocation = {module.id: QuantSpec(3, 64) for module in structure.modules}
    write_checkpoint(tmp_path / "q", tiny_qwen, structure, allocation, quantizer("rtn"))
    report, check = export_checked(QuantizedCheckpoint(tmp_path / "q"), tmp_path / "out", "one-file", {})
    assert check.passed
    assert report.size_bytes > quantized_bytes(tmp_path / "q")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_command_runs(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(COMMANDS, "count", "count the tensors of a model")
    monkeypatch.setitem(sys.modules, "lmq_flows.cli.count", command)  # the file count.py beside the other commands
    assert main(["count", str(tiny_qwen)]) == 0
    assert capsys.readouterr().out == f"{len(read_headers(tiny_qwen))} tensors\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "count the tensors of a model" in capsys.readouterr().out
