"""A run with a target: plans within what the engine holds, and checkpoints that it takes without loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lmq.allocation.targets import target_named
from lmq.errors import InputError
from lmq.export import export_format
from lmq.export.integer_codes import is_symmetric
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.spec import STOPS
from lmq.report.results import read_results
from lmq_flows.cli import main
from lmq_flows.config.run import parse_run_config
from lmq_flows.run.plan import check_run
from tests.flows.config.test_run import valid
from tests.flows.conftest import run_and_look, tiny_config

STRATEGIES = ["uniform", "mxq", "loss-aware"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "configurations"), [("vllm", 2), ("gptq", 2), ("gptq-symmetric", 2), ("auto-round", 2), ("awq", 1)]
)
def test_checkpoints_of_a_run_with_a_target_are_exported_without_loss(
    target: str, configurations: int, server: None, tiny_qwen: Path, tmp_path: Path
) -> None:
    exporter = export_format(target_named(target).export).exporter()
    config = tiny_config(tiny_qwen, tmp_path, target=target, strategies=STRATEGIES, budgets=["5.5"])
    done = run_and_look(config)
    assert done.state.is_completed(), done.state.message
    for result in read_results(config.run_dir / "results.json")[1:]:
        checkpoint = QuantizedCheckpoint(config.run_dir / result.checkpoint)
        assert checkpoint.config.quantizer["integer_zeros"]
        assert exporter.problems(checkpoint) == []
        report = exporter.export(checkpoint, tmp_path / "exports" / result.strategy)
        assert max(step.relative_error for step in report.steps.values()) < 2**-11
        assert not any("moved" in note or "vLLM and SGLang, which" in note for note in report.notes)
    assert is_symmetric(checkpoint) == (target == "gptq-symmetric")
    found = len(set(checkpoint.specs.values()))
    assert found == 1 if configurations == 1 else found >= configurations


def test_the_target_adds_its_constraints_and_whole_zeros() -> None:
    config = parse_run_config(valid(strategies=STRATEGIES, target="vllm", constraints={"alike": ["qkv"]}))
    assert config.kept_constraints.plain == {"alike": ["qkv", "gate-up"]}
    assert config.quantizer == {"name": "fisher-gptq", "axis": 1, "integer_zeros": True}
    plain = parse_run_config(valid())
    assert plain.kept_constraints == plain.constraints
    assert plain.quantizer == {"name": "fisher-gptq", "axis": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "vlm"}, "target: unknown target 'vlm'; did you mean 'vllm'?"),
        (
            {"strategies": ["structural"]},
            "'structural' keeps no constraints, such as those of target 'vllm'; those that do: mxq",
        ),
        ({"measure": {"axis": 0}}, "target 'vllm' takes groups along in_features; set measure.axis to 1"),
        (
            {"measure": {"quantizer": "hqq-package"}},
            "takes whole zeros, which quantizer 'hqq-package' does not fit; "
            "those that do: hqq, hqq-default, rtn, weighted, gptq, fisher-gptq",
        ),
    ],
)
def test_what_does_not_suit_the_target_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_run_config(valid(**{"target": "vllm", "strategies": STRATEGIES, **changes}))
    assert message in str(caught.value)


def test_the_menu_is_what_the_target_holds_for_the_model(tiny_qwen: Path, tmp_path: Path) -> None:
    menu = [spec.name for spec in STOPS if spec.bits < 4]
    config = tiny_config(tiny_qwen, tmp_path, target="vllm", strategies=["uniform"], measure={"menu": menu})
    with pytest.raises(
        InputError, match=r"target vllm holds none of the menu \(b2g128, .*: b4g64, b4g32, b8g64, b8g32"
    ):
        check_run(config)
    measure = {"menu": ["b3g64", "b4g64"], "kl_specs": ["b3g64"]}
    config = tiny_config(tiny_qwen, tmp_path, target="vllm", strategies=["uniform", "kl"], measure=measure)
    with pytest.raises(InputError, match=r"kl_specs has b3g64, which target 'vllm' .*; left of its menu: b4g64"):
        check_run(config)


def test_what_the_target_leaves_out_is_said_before_work_starts(tiny_qwen: Path, tmp_path: Path) -> None:
    measure = {"menu": ["b3g64", "b4g64", "b4g128"]}
    config = tiny_config(tiny_qwen, tmp_path, target="vllm", strategies=["uniform"], measure=measure)
    notes = check_run(config)
    assert len(notes) == 2
    assert "the target vllm leaves b3g64 out of the menu: 3-bit codes" in notes[0]
    assert notes[0].endswith("in every module")
    assert "leaves b4g128 out of the menu: groups of 128 that straddle rows of 64 weights, in " in notes[1]
    assert "self_attn.q_proj" in notes[1]
    assert check_run(config.model_copy(update={"target": None})) == []


def test_the_target_is_an_option_of_the_command_line(
    tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    config = tiny_config(tiny_qwen, tmp_path, strategies=["uniform", "mxq"])
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main(["plan", str(path), "--target", "vllm"]) == 0
    assert "note: " in (printed := capsys.readouterr().out)
    assert "out of the menu: 2-bit codes" in printed
    assert main(["plan", str(path), "--target", "vlm"]) == 2
    assert "did you mean 'vllm'" in capsys.readouterr().err
