"""`lmq importance` and `lmq prune` on the tiny models, from the command line to the files."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lmq.evaluation.whole_model import evaluate_checkpoint
from lmq.layers.prune import choose_random_layers
from lmq.measurement.layer_activity import block_influence
from lmq.text.calibration import TextSource, documents, read_tokens
from lmq_flows.cli import main
from lmq_flows.cli.terminal import console
from lmq_flows.graph.build import build_graph
from lmq_flows.graph.direct import execute_directly
from lmq_flows.run.plan import ready_models
from lmq_flows.studies.importance import ImportanceOptions, measure_importance
from lmq_flows.studies.pruning import WHOLE, PruningOptions, prune
from lmq_tasks.stage import open_store
from tests.conftest import TINY_SHAPE
from tests.flows.cli.conftest import refusal
from tests.flows.conftest import tiny_config

SMALL = ["--sequences", "2", "--sequence-length", "16", "--threads", "1"]
JUDGED = ["--tokens", "64", "--window", "32"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("importance") / "store"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_importance_prints_and_writes_every_metric(
    tiny_llama: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["importance", str(tiny_llama), *SMALL, "--level", "2", "--angular-layers", "2", "--store", str(store)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "removal-importance 1/1" in printed
    assert "least angular distance over 2 neighbouring layers: layers " in printed
    assert "16 models without sub-layers evaluated, for 30 that the estimators asked for" in printed
    assert printed.count("leave-one-out") == 3  # both tables, and a row of the second
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name.startswith("importance-llama")
    layers = read_csv(out / "importance.csv")
    assert [row["layer"] for row in layers] == ["0", "1", "2", "3"]
    assert all(row["shapley"] and row["avss_relative"] for row in layers)
    assert [bool(row["angular_distance_2_layers"]) for row in layers] == [True, True, True, False]
    assert len(read_csv(out / "sublayers.csv")) == 8
    assert "Block Influence" in (out / "importance.svg").read_text()
    assert main(command) == 0
    assert "removal-importance 1/1 in 0.0 s (1 cached)" in capsys.readouterr().out


def test_importance_without_removal_shows_what_activations_say(
    tiny_llama: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["importance", str(tiny_llama), *SMALL, "--without", "removal", "--store", str(store), "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "removal-importance" not in printed
    assert "Shapley" not in printed
    assert {path.name for path in out.iterdir()} == {"importance.csv", "importance.svg"}
    assert {row["shapley"] for row in read_csv(out / "importance.csv")} == {""}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bloom", {}),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2}),
        ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),  # as OPT-350m is
    ],
)
def test_where_sublayers_cannot_be_removed_the_option_that_helps_is_named(
    kind: str, options: dict, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They add to the residual stream inside attention, or a norm lies on it: refused before anything is measured."""
    config = AutoConfig.for_model(kind, **{**TINY_SHAPE, "num_hidden_layers": 2, **options})
    model = shutil.copytree(tiny_llama, tmp_path / kind)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    store = tmp_path / "store"
    command = ["importance", str(model), *SMALL, "--store", str(store), "--out", str(tmp_path / "out")]
    assert "lmq importance --without removal" in refusal(capsys, *command)
    prune = ["prune", str(model), *SMALL, *JUDGED, "--metric", "shapley", "--store", str(store)]
    assert "lmq prune --metric block-influence" in refusal(capsys, *prune, "--out", tmp_path / "pruned")
    assert [path.name for path in (store / "manifests").iterdir()] == ["discover"]
    assert main([*command, "--without", "removal"]) == 0
    rows = read_csv(tmp_path / "out" / "importance.csv")
    assert all(math.isfinite(float(row["block_influence"])) for row in rows)


def test_importance_is_that_of_the_models_own_states(tiny_llama: Path, store: Path) -> None:
    options = ImportanceOptions(sequences=2, sequence_length=16, removal=None, store=str(store), threads=1)
    found = measure_importance(str(tiny_llama), options, 1, console)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    around: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, output: around.append((args[0], output)))
    with torch.no_grad():
        model(_calibration_tokens(store))
    expected = [block_influence(*states, layer=layer) for layer, states in enumerate(around)]
    assert found.metrics["block_influence"] == pytest.approx(expected, rel=1e-4)


def _calibration_tokens(store: Path) -> torch.Tensor:
    opened = open_store(str(store))
    manifest = next(item for item in opened.manifests() if item.stage == "calibration")
    return read_tokens(opened.path(manifest.ref, "tokens.parquet")).long()


@pytest.mark.parametrize("metric", ["block-influence", "shapley", "angular"])
def test_prune_writes_a_checkpoint_worth_what_is_printed(
    metric: str, tiny_llama: Path, store: Path, tmp_path: Path
) -> None:
    options = PruningOptions(metric=metric, fraction=0.5, out=tmp_path / "pruned", tokens=64, window=32, random_draws=2)
    importance = ImportanceOptions(sequences=2, sequence_length=16, store=str(store), threads=1)
    measured, judged = prune(str(tiny_llama), importance, options, console)
    others = [] if metric == "angular" else ["angular"]
    assert [item.chosen_by for item in judged] == [WHOLE, metric, "random, seed 42", "random, seed 43", *others]
    if metric != "angular":
        scores = measured.metrics[metric.replace("-", "_")]
        assert judged[1].layers == tuple(sorted(sorted(range(4), key=scores.__getitem__)[:2]))
    assert judged[3].layers == tuple(choose_random_layers(4, 0.5, seed=43))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").config.num_hidden_layers == 2
    text = tmp_path / "second.txt"
    text.write_text(_second_half())
    for path, item in ((tiny_llama, judged[0]), (tmp_path / "pruned", judged[1])):
        found = evaluate_checkpoint(path, text=str(text), column="text", tokens=64, window=32, stride=16)
        assert found == item.evaluation


def _second_half() -> str:
    return "\n\n".join(documents(TextSource(part="second")))


def test_prune_prints_the_metric_beside_what_it_must_beat(
    tiny_gemma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "prune",
        str(tiny_gemma),
        *SMALL,
        *JUDGED,
        "--metric",
        "avss-relative",
        "--out",
        str(tmp_path / "pruned"),
    ]
    assert main([*command, "--seed", "5", "--store", str(tmp_path / "store")]) == 0
    printed = capsys.readouterr().out
    assert "without 1 of its 4 layers" in printed
    for name in ("whole model", "avss-relative", "random, seed 5", "angular (neighbours)"):
        assert f"│ {name} " in printed
    assert "removal-importance" not in printed  # slow, and not what this metric needs
    assert "perplexity strided 32/16: " in printed
    assert (tmp_path / "pruned" / "tokenizer.json").is_file()


def test_what_cannot_work_is_refused_before_anything_is_measured(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--store", tmp_path / "store", "--out", tmp_path / "out"]
    importance = ["importance", tiny_llama, *SMALL, *places]
    assert "level = 9 is not a window length; allowed: 1 to 8" in refusal(capsys, *importance, "--level", "9")
    assert "give --angular-layers 1 to 4" in refusal(capsys, *importance, "--angular-layers", "5")
    assert "than the 256 tokens" in refusal(capsys, "importance", tiny_llama, *places)
    assert "there is no text file" in refusal(capsys, *importance, "--text", tmp_path / "no.txt")
    prune_ = ["prune", tiny_llama, *SMALL, *JUDGED, "--metric", "shapley", *places]
    assert "fraction = 1.5 is not allowed" in refusal(capsys, *prune_, "--fraction", "1.5")
    assert "the smallest that removes one is 0.25" in refusal(capsys, *prune_, "--fraction", "0.1")
    assert "less than one window of 128" in refusal(capsys, *prune_, "--window", "128")
    assert "there is no text file" in refusal(capsys, *prune_, "--evaluation", tmp_path / "no.txt")
    (tmp_path / "out").mkdir()
    assert "exists already; remove it or choose another place" in refusal(capsys, *prune_)
    stages = {path.name for path in (tmp_path / "store" / "manifests").iterdir()}
    assert stages == {"discover"}


def test_a_configuration_that_cannot_be_made_shallower_is_refused_early(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("{", '{"full_layers": [1, 3],', 1))
    command = ["prune", tmp_path / "model", *SMALL, *JUDGED, "--metric", "block-influence"]
    message = refusal(capsys, *command, "--store", tmp_path / "store", "--out", tmp_path / "out")
    assert "lmq cannot renumber them" in message
    assert {path.name for path in (tmp_path / "store" / "manifests").iterdir()} == {"discover"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prune", "x", "--out", "y"], "the following arguments are required: --metric"),
        (["prune", "x", "--metric", "avs", "--out", "y"], "--metric: invalid choice: 'avs'"),
        (["prune", "x", "--metric", "avss"], "the following arguments are required: --out"),
        (["importance", "x", "--level", "2", "--permutations", "3"], "not allowed with argument --level"),
        (["importance", "x", "--without", "shapley"], "--without: invalid choice: 'shapley'"),
    ],
)
def test_arguments_that_make_no_sense_end_with_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_weighted_strategies_get_the_importance_of_the_layers(tiny_qwen: Path, tmp_path: Path) -> None:
    weighted = ["avss-weighted", "bi-weighted"]
    config = tiny_config(
        tiny_qwen, tmp_path, strategies=weighted, budgets=["3.8 bpw"], measure__menu=["b3g64", "b4g64"]
    )
    models, texts = ready_models(config)
    graph, variants, _ = build_graph(config, models, texts)
    wanted = [variant.allocation for variant in variants if variant.allocation is not None]
    refs = execute_directly(graph, wanted)
    assert len({refs[node].sha256 for node in wanted}) == 2
