"""Bad input: one clear message, exit code 2, before Prefect starts where it can be known, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lmq_flows.run.quantize
from lmq.errors import InputError, NotFiniteError
from lmq_flows.cli import main
from lmq_flows.config.run import RunConfig
from lmq_flows.graph.build import build_graph
from lmq_flows.graph.direct import execute_directly
from lmq_flows.graph.node import Graph
from lmq_flows.run.plan import check_run
from lmq_flows.run.prepare import identify_models, identify_texts, preparation_graph, prepared_model, resolve_device
from lmq_storage import ArtifactStore
from lmq_storage.verify import verify
from tests.flows.conftest import tiny_config
from tests.flows.prefect_server import SharedServer
from tests.flows.processes import Runner, forking_runner

Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Gives the message that a configuration is refused with, by `lmq plan` and by `lmq run` before Prefect starts.

    Nothing is measured by then: at most the structure of a model was read.
    """

    def must_not_start(config: RunConfig) -> None:
        raise AssertionError("Prefect was started")

    monkeypatch.setattr(lmq_flows.run.quantize, "run", must_not_start)

    def call(model: Path, commands: tuple[str, ...] = ("plan", "run"), **changes: Any) -> str:
        config = tiny_config(model, tmp_path, **changes)
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        messages = set()
        for command in commands:
            assert main([command, str(path)]) == 2
            printed = capsys.readouterr()
            assert printed.out == ""
            assert printed.err.startswith("lmq: ")
            messages.add(printed.err.removeprefix("lmq: ").strip())
        assert not (tmp_path / "runs").exists()
        if (tmp_path / "store").is_dir():
            assert {item.stage for item in ArtifactStore(str(tmp_path / "store")).manifests()} <= {"discover"}
        assert len(messages) == 1
        return messages.pop()

    return call


@pytest.fixture(scope="module")
def narrow(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices of 24 × 24 weights hold no whole groups of 128."""
    path = tmp_path_factory.mktemp("narrow")
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=256, **shape)).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(path)
    return path


@pytest.fixture
def broken(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model with three NaN in a weight matrix of layer 1."""
    path = tmp_path / "broken"
    shutil.copytree(tiny_llama, path)
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].view(-1)[:3] = torch.nan
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


# ── refused before Prefect starts ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("budget", ["1 bpw", "100 B"])
def test_a_budget_below_the_smallest_names_the_feasible_range(budget: str, tiny_llama: Path, refuse: Refuse) -> None:
    message = refuse(tiny_llama, budgets=[budget])
    assert "is below the smallest feasible budget of" in message
    assert "(feasible: " in message
    assert message.endswith("raise the budget or add smaller configurations to the menu")


def test_a_menu_that_does_not_fit_names_module_and_configuration(narrow: Path, refuse: Refuse) -> None:
    message = refuse(narrow, measure__menu=["b4g32", "b4g128"], strategies=["uniform"], budgets=["8 bpw"])
    assert message.startswith("layer 0 self_attn.q_proj: b4g128 does not fit a matrix of 576 weights")
    assert message.endswith("take it out of the menu")


def test_a_sensitivity_configuration_that_does_not_fit_is_named_by_its_key(narrow: Path, refuse: Refuse) -> None:
    changes = {"measure__menu": ["b4g32"], "measure__sensitivity_spec": "b4g128", "budgets": ["8 bpw"]}
    message = refuse(narrow, strategies=["sensi-boost"], **changes)
    assert message.startswith("measure.sensitivity_spec: layer 0 self_attn.q_proj: b4g128 does not fit")


def test_a_window_larger_than_the_context_is_refused(tiny_llama: Path, refuse: Refuse) -> None:
    message = refuse(tiny_llama, evaluation__window=300, evaluation__tokens=600)
    assert message.startswith("evaluation.window = 300 is more than the 256 tokens")


def test_sequences_longer_than_the_context_are_refused_when_they_are_needed(
    tiny_llama: Path, refuse: Refuse, tmp_path: Path
) -> None:
    message = refuse(tiny_llama, calibration__sequence_length=300)
    assert message.startswith("calibration.sequence_length = 300 is more than the 256 tokens")
    check_run(tiny_config(tiny_llama, tmp_path, calibration__sequence_length=300, strategies=["uniform", "mxq"]))


@pytest.mark.parametrize("source", ["/nowhere/model", "./model", "model.gguf", "package:nothing_here/x.gguf", "a b"])
def test_models_that_are_not_there_are_refused(source: str, refuse: Refuse) -> None:
    message = refuse(Path(), models=[{"name": "tiny", "source": source}])
    assert source.removeprefix("package:").removeprefix("./").partition("/")[0] in message


def test_a_checkpoint_of_lmq_is_no_model_to_quantize(tiny_llama: Path, refuse: Refuse, tmp_path: Path) -> None:
    model = tmp_path / "quantized"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "lmq", "format_version": 1, "modules": {}, "axis": 1}
    (model / "config.json").write_text(json.dumps(config))
    assert "is quantized already (lmq); pass the full-precision model it was made from" in refuse(model)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "holds no text; pass a .txt, .jsonl or .parquet file, wikitext2, c4, ptb or pydoc-topics"),
        ("one.txt", "One paragraph alone.", "is one document, of which no part can be taken"),
        ("short.txt", "A few.\n\nWords only.", "sequences of 32 need 96; give a longer text, or fewer or shorter"),
        ("other.jsonl", '{"body": "text"}\n', "has no column 'text' (it has: body); set `column`"),
        ("bad.jsonl", "{", "line 1 is not JSON"),
        ("not-utf8.txt", "\udcff", "is not UTF-8 text"),
    ],
)
def test_texts_that_cannot_be_measured_on_are_refused(
    name: str, content: str, message: str, tiny_llama: Path, refuse: Refuse, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content, errors="surrogateescape")
    said = refuse(tiny_llama, calibration__source=str(path))
    assert message in said


def test_an_evaluation_text_shorter_than_a_window_is_refused(tiny_llama: Path, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few.\n\nWords only.")
    message = refuse(tiny_llama, evaluation__source=str(tmp_path / "short.txt"))
    assert "fewer than one window of 64; give a longer text or a smaller evaluation.window" in message


def test_a_missing_text_is_refused(tiny_llama: Path, refuse: Refuse, tmp_path: Path) -> None:
    message = refuse(tiny_llama, evaluation__source=str(tmp_path / "missing.txt"))
    assert message.startswith(f"there is no text file {tmp_path / 'missing.txt'}")


@pytest.mark.parametrize("device", ["tpu", "mps", "cuda:99", "cuda:", "CPU"])
def test_devices_that_are_not_there_are_refused(device: str) -> None:
    with pytest.raises(InputError, match=rf"runner.device = '{device}'.*(allowed: auto, cpu|set runner.device=auto)"):
        resolve_device(device)


@pytest.mark.parametrize("key", ["store", "runs_dir"])
def test_places_that_are_files_are_refused_by_key(key: str, tiny_llama: Path, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refuse(tiny_llama, ("run",), **{key: str(tmp_path / "file" / "inside")})
    assert message == f"{key}: {tmp_path / 'file'} is a file, not a directory; give another place"


@pytest.mark.parametrize("key", ["store", "runs_dir"])
def test_places_that_cannot_be_written_in_are_refused_by_key(
    key: str, tiny_llama: Path, refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed)  # root may write anywhere
    message = refuse(tiny_llama, ("run",), **{key: str(closed)})
    assert message.startswith(f"{key}: {closed} cannot be written in; give another place")


def test_a_store_of_an_unknown_protocol_is_refused(tiny_llama: Path, refuse: Refuse) -> None:
    assert refuse(tiny_llama, store="foo://bucket").startswith("the store 'foo://bucket' cannot be opened")


# ── found while working ──────────────────────────────────────────────────────────────────────────────────


def graph_of(config: RunConfig) -> Graph:
    preparation, nodes = preparation_graph(config, identify_models(config))
    node = nodes[config.models[0].name]
    model = prepared_model(config, config.models[0], node, execute_directly(preparation)[node], "cpu")
    return build_graph(config, [model], identify_texts(config))[0]


def test_nan_in_a_weight_stops_its_layer_and_keeps_what_was_made(broken: Path, tmp_path: Path) -> None:
    config = tiny_config(broken, tmp_path, strategies=["mxq"])
    with pytest.raises(NotFiniteError, match=r"layer 1 mlp\.up_proj holds 3 elements of 8,192 that are NaN"):
        execute_directly(graph_of(config))
    store = ArtifactStore(config.store)
    assert [item.config["layer"] for item in store.manifests("grids")] == [0]
    assert verify(store) == []
    assert list((Path(config.store) / "tmp").iterdir()) == []


def test_a_short_text_stops_its_stage_and_leaves_nothing_of_it(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few.\n\nWords only.")
    config = tiny_config(tiny_llama, tmp_path, calibration__source=str(tmp_path / "short.txt"))
    with pytest.raises(InputError, match=r"the calibration text has \d+ tokens where 3 sequences of 32 need 96"):
        execute_directly(graph_of(config))
    assert list(ArtifactStore(config.store).manifests("calibration")) == []


@pytest.fixture(scope="module")
def prefect_home(server: SharedServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("prefect")
    shutil.copy(server.new_database, home / "prefect.db")
    return home


@pytest.fixture(scope="module")
def runner(prefect_home: Path) -> Iterator[Runner]:
    """Starts `lmq run` in processes that have no Prefect server but one of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        with forking_runner(PREFECT_HOME=str(prefect_home)) as runner:
            yield runner


def lmq_run(runner: Runner, config: RunConfig, place: Path) -> tuple[int, str]:
    """Exit code of `lmq run`, and what it printed."""
    path = place / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    run = runner.run(path)
    try:
        return run.wait(), run.output
    finally:
        run.end_with_its_server()


def written_at(prefect_home: Path) -> dict[Path, int]:
    """Files of Prefect's database with the times they were written at."""
    return {path: path.stat().st_mtime_ns for path in prefect_home.glob("*.db*")}


@pytest.mark.slow
def test_a_short_text_ends_the_command_with_2_and_one_message(
    runner: Runner, tiny_llama: Path, tmp_path: Path, prefect_home: Path
) -> None:
    (tmp_path / "short.txt").write_text("A few.\n\nWords only.")
    before = written_at(prefect_home)
    config = tiny_config(tiny_llama, tmp_path, calibration__source=str(tmp_path / "short.txt"))
    code, printed = lmq_run(runner, config, tmp_path)
    assert code == 2, printed
    assert printed.startswith("lmq: the calibration text has")
    assert printed.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    assert written_at(prefect_home) == before, "Prefect was started"


@pytest.mark.slow
def test_nan_in_a_weight_ends_the_run_with_2_and_one_message(runner: Runner, broken: Path, tmp_path: Path) -> None:
    code, printed = lmq_run(runner, tiny_config(broken, tmp_path, strategies=["mxq"]), tmp_path)
    assert code == 2, printed
    assert printed.count("mlp.up_proj holds 3 elements") == 1
    assert "Traceback" not in printed
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_measured(tiny_qwen, tmp_path):
    shutil.copytree(tiny_qwen, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens([f"word{number}" for number in range(30)] + ["e t", "e s", "s a", "t t", "n a", "e a"])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(
        InputError, match=r"the tokenizer of tiny gives token 53\d, where its model has a vocabulary of 512"
    ):
        check_run(tiny_config(tmp_path / "model", tmp_path))
