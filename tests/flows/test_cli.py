"""The command line without Prefect: what each command prints and returns, its help, and its refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lmq_flows.cli import main
from lmq_flows.pipeline import build_graph
from lmq_flows.planning import execute_directly
from lmq_flows.prepare import identify_models, identify_texts, preparation_graph, prepared_model
from lmq_storage import ArtifactStore
from tests.flows.conftest import tiny_config

COMMANDS = [
    ["run"],
    ["plan"],
    ["inspect"],
    ["evaluate"],
    ["report"],
    ["strategies"],
    ["store"],
    ["store", "ls"],
    ["store", "verify"],
    ["store", "gc"],
]
EVALUATION = ["--tokens", "256", "--window", "64", "--stride", "32"]


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration file, and a checkpoint made from it."""
    place = tmp_path_factory.mktemp("made")
    config = tiny_config(tiny_llama, place, strategies=["uniform"], measure__menu=["b4g64"])
    (place / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    preparation, nodes = preparation_graph(config, identify_models(config))
    node = nodes["tiny"]
    model = prepared_model(config, config.models[0], node, execute_directly(preparation)[node], "cpu")
    graph, variants, _ = build_graph(config, [model], identify_texts(config))
    refs = execute_directly(graph)
    checkpoint = variants[1].checkpoint
    assert checkpoint is not None
    return place / "run.yaml", ArtifactStore(config.store).materialize(refs[checkpoint], place / "checkpoint")


@pytest.fixture
def checkpoint(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint, to spoil."""
    path = tmp_path / "checkpoint"
    shutil.copytree(made[1], path)
    (path / "config.json").chmod(0o644)
    return path


def refusal(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """Message of a command that must be refused: exit code 2, one message, on stderr."""
    capsys.readouterr()
    assert main([str(item) for item in argv]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("lmq: ") == 1
    assert "Traceback" not in printed.out + printed.err
    return printed.err.strip().removeprefix("lmq: ")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: lmq {' '.join(command)}" in printed
    assert len(printed.splitlines()) >= 5


def test_help_names_every_command_and_loads_no_library() -> None:
    code = "import sys; from lmq_flows.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("run", "plan", "inspect", "evaluate", "report", "strategies", "store"):
        assert f"\n    {name}" in done.stdout
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["runn", "demo"], "invalid choice: 'runn'"),
        (["run"], "the following arguments are required: CONFIG"),
        (["evaluate", "x", "--tokens", "many"], "--tokens: invalid whole number value: 'many'"),
        (["evaluate", "x", "--tokens", "0"], "--tokens: 0 is not allowed; give 1 or more"),
        (["store", "gc", "--keep-runs", "-1"], "--keep-runs: -1 is not allowed; give 0 or more"),
        (["store", "gc", "--keep-hours", "-0.5"], "--keep-hours: -0.5 is not allowed; give 0 or more"),
    ],
)
def test_arguments_that_make_no_sense_end_with_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# ── plan, inspect, strategies, store ─────────────────────────────────────────────────────────────────────


def test_plan_says_what_is_cached(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(made[0]), "--layers"]) == 0
    printed = capsys.readouterr().out
    assert "frobenius" in printed
    assert "cached" in printed
    assert "never made" not in printed


def test_plan_says_why_a_stage_would_run(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(made[0]), "--set", "evaluation.window=128"]) == 0
    assert "window: 64 → 128" in " ".join(capsys.readouterr().out.split())


def test_inspect_shows_modules_and_sizes(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_llama), "--store", str(tmp_path / "store")]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM: 4 layers, hidden size 64" in printed
    assert "mlp.down_proj" in printed
    assert "b2g128" in printed


def test_strategies_are_listed_with_their_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["strategies"]) == 0
    printed = capsys.readouterr().out
    for name in ("uniform", "sensi-boost", "kurt-boost", "mxq", "loss-aware"):
        assert name in printed


def test_the_store_is_listed_verified_and_cleaned(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(made[0].parent / "store", store)
    assert main(["store", "ls", "--store", str(store)]) == 0
    assert "quantize" in capsys.readouterr().out
    assert main(["store", "verify", "--store", str(store)]) == 0
    assert "every artifact is sound" in capsys.readouterr().out
    assert main(["store", "gc", "--store", str(store), "--keep-hours", "0", "--dry-run"]) == 0
    assert "would remove" in capsys.readouterr().out
    blob = max((path for path in (store / "blobs").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    assert main(["store", "verify", "--store", str(store)]) == 1
    assert "1 damaged" in capsys.readouterr().out


def test_a_store_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no store" in refusal(capsys, "store", "ls", "--store", tmp_path / "nothing")
    assert "Protocol not known: foo" in refusal(capsys, "store", "ls", "--store", "foo://x")


def test_a_run_without_results_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "results.json does not exist" in refusal(capsys, "report", tmp_path)


def test_inspect_refuses_what_is_no_model(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", tmp_path / "store"]
    assert "there is no model directory" in refusal(capsys, "inspect", tmp_path / "model", *store)
    assert "must not be empty" in refusal(capsys, "inspect", "", *store)
    assert "is quantized already (lmq)" in refusal(capsys, "inspect", made[1], *store)
    assert "is a file, not a directory" in refusal(capsys, "inspect", made[1], "--store", made[0])


# ── evaluate ─────────────────────────────────────────────────────────────────────────────────────────────


def test_evaluate_prints_the_perplexity_of_a_checkpoint_and_of_its_model(
    made: tuple[Path, Path], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (made[1], tiny_llama):
        assert main(["evaluate", str(path), *EVALUATION]) == 0
        assert "(strided 64/32, 255 tokens scored)" in capsys.readouterr().out


def test_evaluate_refuses_a_checkpoint_of_a_newer_version(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["format_version"] += 1
    (checkpoint / "config.json").write_text(json.dumps(config))
    message = refusal(capsys, "evaluate", checkpoint, *EVALUATION)
    assert "has lmq format version 2, this lmq reads version 1; install the version of lmq that wrote it" in message


def test_evaluate_refuses_more_tokens_at_once_than_the_model_sees(
    made: tuple[Path, Path], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (made[1], tiny_llama):
        message = refusal(capsys, "evaluate", path, "--window", "512")
        assert message.startswith("--window = 512 is more than the 256 tokens")
        assert message.endswith("set it to 256 or less")


def test_evaluate_refuses_texts_and_models_that_are_not_there(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("three words only")
    assert "there is no model directory" in refusal(capsys, "evaluate", tmp_path / "model")
    missing = ["--text", tmp_path / "shrt.txt", *EVALUATION]
    assert "short.txt?" in refusal(capsys, "evaluate", tiny_llama, *missing)
    short = ["--text", tmp_path / "short.txt", *EVALUATION]
    assert "fewer than one window of 64" in refusal(capsys, "evaluate", tiny_llama, *short)
    wide = ["--window", "64", "--stride", "65"]
    assert "stride = 65 does not fit a window of 64" in refusal(capsys, "evaluate", tiny_llama, *wide)
