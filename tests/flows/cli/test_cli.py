"""The command line without Prefect: what each command prints and returns, its help, and its refusals."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lmq.allocation.budget import Budget, feasible_range, hqq_size_bytes
from lmq.checkpoint.config import FORMAT_VERSION
from lmq.formats.spec import STOPS
from lmq.model.discovery import discover
from lmq.report.results import VariantResult, write_results
from lmq_flows.cli import main
from lmq_flows.graph.build import build_graph
from lmq_flows.run.plan import execute_directly
from lmq_flows.run.prepare import identify_models, identify_texts, preparation_graph, prepared_model
from lmq_storage import ArtifactStore
from tests.flows.conftest import tiny_config

COMMANDS = [
    ["run"],
    ["plan"],
    ["inspect"],
    ["budget"],
    ["evaluate"],
    ["report"],
    ["export"],
    ["frontier"],
    ["strategies"],
    ["store"],
    ["store", "ls"],
    ["store", "verify"],
    ["store", "gc"],
    ["importance"],
    ["prune"],
    ["study"],
    ["study", "sensitivity"],
    ["study", "costs"],
    ["serve"],
    ["deploy"],
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
    for name in ("run", "plan", "inspect", "budget", "evaluate", "report", "frontier", "strategies", "store"):
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
        (["frontier", "x", "--points", "1"], "--points: 1 is not allowed; give 2 or more"),
        (["budget", "x", "4.25", "--menus"], "unrecognized arguments: --menus"),
        (["inspect", "x", "4.25"], "unrecognized arguments: 4.25"),
        (["budget", "x", "--axis", "2"], "--axis: invalid choice: 2"),
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
    assert "grids" in printed
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


def test_what_is_no_run_has_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "night").mkdir(parents=True)
    results = tmp_path / "runs" / "night" / "results.json"
    write_results(results, [VariantResult(model="m", strategy="full-precision", perplexity=9.0)])
    whole = results.read_text()
    monkeypatch.chdir(tmp_path)
    assert "not the directory of a finished run" in refusal(capsys, "report", tmp_path)
    assert "there is no run 'day'" in (said := refusal(capsys, "report", "day"))
    assert "runs here: night" in said
    assert "is a file, not the directory of a run" in refusal(capsys, "report", results)
    results.write_text(whole[: len(whole) // 2])
    assert "is damaged" in refusal(capsys, "report", "night")
    results.write_text(whole.replace('"perplexity"', '"confusion"'))
    assert "another version of lmq may have written it" in refusal(capsys, "report", "night")
    results.write_text(whole.replace("9.0", "NaN"))
    assert "perplexity of m full-precision is nan" in refusal(capsys, "report", "night")
    results.write_text("{}")
    assert "holds a dict where a list of variants was expected" in refusal(capsys, "report", "night")


def test_inspect_refuses_what_is_no_model(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", tmp_path / "store"]
    assert "there is no model directory" in refusal(capsys, "inspect", tmp_path / "model", *store)
    assert "must not be empty" in refusal(capsys, "inspect", "", *store)
    assert "is quantized already (lmq)" in refusal(capsys, "inspect", made[1], *store)
    assert "is a file, not a directory" in refusal(capsys, "inspect", made[1], "--store", made[0])


# ── budget ───────────────────────────────────────────────────────────────────────────────────────────────


def budget_rows(printed: str, title: str) -> dict[str, list[str]]:
    """Cells of the table below a title, by the first cell of each row."""
    lines = printed[printed.index(title) :].split("└")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


def test_budget_prints_every_size_without_measuring(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["budget", str(tiny_llama), "--store", str(tmp_path / "store")]) == 0
    printed = capsys.readouterr().out
    structure = discover(tiny_llama)
    smallest, largest = feasible_range(structure, STOPS)
    feasible = budget_rows(printed, "Feasible sizes")
    assert feasible["paper"][0].startswith(f"{smallest:,} B = ")
    assert feasible["paper"][1].startswith(f"{largest:,} B = ")
    uniform = budget_rows(printed, "The same configuration everywhere")
    assert list(uniform) == [spec.name for spec in STOPS]
    for spec in STOPS:
        paper = sum(spec.size_bytes(module.parameters) for module in structure.modules)
        hqq = sum(hqq_size_bytes(module.parameters, spec) for module in structure.modules)
        assert uniform[spec.name][0].startswith(f"{paper:,} B = ")
        assert uniform[spec.name][1].startswith(f"{hqq:,} B = ")
    parts = budget_rows(printed, "Not quantized")
    assert parts["embeddings"] == parts["lm_head"] == ["1", "32,768", "131,072 B"]
    assert parts["all"][2] == f"{structure.other_bytes:,} B"
    assert not list((tmp_path / "store").rglob("grids*"))


def test_budgets_become_bytes(tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["4.25", "uniform b4g64 + 2%", "1 kB", "1 GB"]
    options = ["--menu", "b2g64,b4g64", "--store", str(tmp_path / "store")]
    assert main(["budget", str(tiny_qwen), asked[0], *options, *asked[1:]]) == 0
    printed = capsys.readouterr().out
    assert budget_rows(printed, "Not quantized")["lm_head"] == ["tied", "–", "–"]
    rows = budget_rows(printed, "Budgets")
    structure = discover(tiny_qwen)
    for text in asked:
        assert rows[text][0].startswith(f"{Budget.parse(text).resolve(structure):,} B = ")
    assert rows["uniform b4g64 + 2%"][1:] == ["paper", "yes: 1,575 B to spare", "b4g64 (−1.96%)", "none"]
    assert rows["4.25"][3].startswith("b2g64 (−")
    assert "short" in rows["1 kB"][2]
    assert "to spare" in rows["1 GB"][2]


def test_budget_refuses_what_cannot_be_meant(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["budget", tiny_llama, "--store", tmp_path / "store"]
    assert "'four' is not a budget; allowed: bits per weight" in refusal(capsys, *command, "four")
    assert "'b5' is not a configuration" in refusal(capsys, *command, "--menu", "b4g64,b5")
    assert "needs at least one configuration and none twice" in refusal(capsys, *command, "--menu", "b4g64,b4g64")
    assert "there is no model directory" in refusal(capsys, "budget", tmp_path / "model", *command[2:])


# ── serving ──────────────────────────────────────────────────────────────────────────────────────────────


def test_deploying_needs_a_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert "PREFECT_API_URL names no server" in refusal(capsys, "deploy")


# ── report and frontier ──────────────────────────────────────────────────────────────────────────────────


def measured_run(model: Path, place: Path) -> Path:
    """The directory of a run whose measurements are in the store, with results as a run would write them."""
    config = tiny_config(
        model,
        place,
        strategies=["uniform", "mxq", {"name": "loss-aware", "options": {"fisher": "sequence"}}],
        measure__menu=["b2g64", "b3g64", "b4g64"],
    )
    preparation, nodes = preparation_graph(config, identify_models(config))
    node = nodes["tiny"]
    prepared = prepared_model(config, config.models[0], node, execute_directly(preparation)[node], "cpu")
    graph, variants, _ = build_graph(config, [prepared], identify_texts(config))
    graph.nodes = [node for node in graph if node.variant is None]  # what is measured, once for all variants
    execute_directly(graph)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    size = variants[1].budget_bytes
    assert size is not None
    written = {"model": "tiny", "budget": "uniform b4g64", "budget_bytes": size, "perplexity": 510.0}
    write_results(
        config.run_dir / "results.json",
        [
            VariantResult(model="tiny", strategy="full-precision", perplexity=500.0),
            VariantResult(strategy="uniform", size_bytes=size, kl_divergence=0.02, **written),
            VariantResult(strategy="sensi-boost", size_bytes=size + 2_345_678, kl_divergence=0.01, **written),
            VariantResult(model="tiny", strategy="mxq", budget="uniform b4g64", error="out of memory"),
        ],
    )
    return config.run_dir


@pytest.fixture(scope="module")
def run_dir(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured_run(tiny_llama, tmp_path_factory.mktemp("measured"))


def test_report_shows_what_of_the_budget_is_used(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if line.startswith("│")) <= 140
    assert "−2.346 MB" in printed
    assert " 0 B " in printed
    assert "mxq @ uniform b4g64 failed: out of memory" in printed
    assert "report.html is missing" in printed


def test_several_runs_are_compared_on_one_page(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(run_dir, tmp_path / "other")
    page = tmp_path / "both.html"
    assert main(["report", str(run_dir), str(other), "--latex", "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\\begin{tabular}") == 2
    assert "sensi-boost" in page.read_text()
    assert f"two runs are called {run_dir.name}" in refusal(capsys, "report", run_dir, run_dir)


def test_frontier_solves_all_budgets_from_the_store(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontier", str(run_dir), "--points", "20"]) == 0
    printed = capsys.readouterr().out
    assert "tiny: loss-aware fisher=sequence, 20 budgets" in printed
    assert "(nats per token)" in printed
    assert len([line for line in printed.splitlines() if line.startswith("│")]) == 10
    with (run_dir / "frontier-tiny.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["budget_bytes", "bits_per_weight", "size_bytes", "objective", "lower_bound", "gap"]
    assert len(rows) == 20
    objectives = [float(row["objective"]) for row in rows]
    assert objectives == sorted(objectives, reverse=True)
    assert all(int(row["size_bytes"]) <= int(row["budget_bytes"]) for row in rows)
    picture = (run_dir / "frontier-tiny.svg").read_text()
    assert "measured rise of log-perplexity" in picture
    assert "uniform, measured" in picture


def test_frontier_of_another_strategy_from_the_same_measurements(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["frontier", str(run_dir), "--points", "3", "--strategy", "mxq", "--model", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert "tiny: mxq, 3 budgets" in printed
    assert "nats" not in printed


def test_frontier_refuses_what_the_run_does_not_have(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["frontier", run_dir, "--points", "3"]
    assert "unknown model of run 'tiny': 'tny'; did you mean 'tiny'" in refusal(capsys, *command, "--model", "tny")
    assert "did you mean 'mxq'" in refusal(capsys, *command, "--strategy", "mxqq")
    assert "uniform solves no program" in refusal(capsys, *command, "--strategy", "uniform")
    message = refusal(capsys, *command, "--strategy", "sensi-milp")
    assert "did not measure sensitivity, which sensi-milp needs; draw a strategy of the run ('uniform'," in message
    assert "it has no results.json" in refusal(capsys, "frontier", tmp_path)


def test_frontier_names_what_is_gone_from_the_store(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())

    def point_at(store: Path) -> None:
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**config, "store": str(store)}))

    point_at(tmp_path / "nothing")
    assert "there is no store" in refusal(capsys, "frontier", tmp_path / "run")
    (tmp_path / "empty").mkdir()
    point_at(tmp_path / "empty")
    message = refusal(capsys, "frontier", tmp_path / "run")
    assert "does not hold discover of tiny: it was removed, or this lmq measures differently" in message
    assert message.endswith("make it again with `lmq run` of that file")
    (tmp_path / "run" / "config.yaml").unlink()
    assert "the run has not ended" in refusal(capsys, "frontier", tmp_path / "run")


# ── evaluate ─────────────────────────────────────────────────────────────────────────────────────────────


def test_evaluate_prints_the_perplexity_of_a_checkpoint_and_of_its_model(
    made: tuple[Path, Path], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (made[1], tiny_llama):
        assert main(["evaluate", str(path), *EVALUATION]) == 0
        assert "(strided 64/32, 255 tokens scored)" in capsys.readouterr().out


def test_evaluate_compares_with_the_unquantized_model_and_names_tasks_without_data(
    made: tuple[Path, Path], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    arguments = [str(made[1]), *EVALUATION, "--reference", str(tiny_llama), "--tasks", "winogrande"]
    assert main(["evaluate", *arguments]) == 1
    out = capsys.readouterr().out
    assert "KL to the reference 0." in out
    assert "top-1 agreement" in out
    assert "winogrande was not measured: the data of task 'winogrande' is not at hand" in out


def test_evaluate_refuses_a_checkpoint_of_a_newer_version(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["format_version"] += 1
    (checkpoint / "config.json").write_text(json.dumps(config))
    message = refusal(capsys, "evaluate", checkpoint, *EVALUATION)
    assert (
        f"has lmq format version {FORMAT_VERSION + 1}, this lmq reads version {FORMAT_VERSION}; install the version"
        in message
    )


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
