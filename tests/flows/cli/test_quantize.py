"""`lmq quantize`: one line from a model to a smaller one, in real runs on tiny models."""

from __future__ import annotations

import html
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from prefect.settings import PREFECT_API_URL
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

import lmq
from lmq.checkpoint.write import quantized_bytes, read_quantization_config
from lmq.errors import InputError
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.packed_layer import QuantizedEmbedding
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.model.structure import ModelStructure
from lmq.model.tensors import read_headers, size_bytes
from lmq.report.results import format_measured, read_results
from lmq_flows.cli import main
from lmq_flows.run.given_plan import read_plan
from lmq_flows.run.one_model import EFFORTS, GPU_SET_ASIDE_BYTES, CheckpointPath, Goal, prepare_goal
from lmq_storage import ArtifactStore
from tests.flows.cli.conftest import refusal
from tests.flows.processes import Runner, finished_work, forking_runner, save_small_llama, wait_until


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Store, runs and checkpoints are made in the current directory."""
    monkeypatch.chdir(tmp_path)


def smallest_bytes(model: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """The smallest checkpoint, as the refusal of a smaller one names it."""
    message = refusal(capsys, "quantize", model, "--size", "1kB")
    found = re.search(r"the smallest checkpoint takes ([\d,.]+) MB", message)
    assert found is not None, message
    return round(float(found[1].replace(",", "")) * 1e6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), [("tiny_llama", []), ("tiny_qwen", ["--equalize"])])
def test_one_line_makes_a_checkpoint_within_the_size_that_opens(server, request, name, more, tmp_path, capsys):
    model = request.getfixturevalue(name)
    size = smallest_bytes(model, capsys) + 12_000
    line = ["quantize", str(model), "--size", f"{size}B", "--effort", "quick", *more]
    assert main([*line, "-o", "small"]) == 0
    printed = capsys.readouterr().out
    files = [path for path in (tmp_path / "small").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= size
    assert lmq.load(tmp_path / "small", dtype=torch.float32)(torch.arange(8)[None]).logits.isfinite().all()
    (run_dir,) = (tmp_path / "runs").iterdir()
    results = {result.strategy: result for result in read_results(run_dir / "results.json")}
    assert results["loss-aware"].size_bytes == quantized_bytes(tmp_path / "small")
    chosen = results["loss-aware"]
    assert format_measured(chosen.perplexity, chosen.perplexity_stderr) in printed
    for words in (": about ", "GB of memory", "uniform at this size", "goes on", 'lmq.load("small")'):
        assert words in printed
    assert main([*line, "-o", "again"]) == 0
    said = re.search(r"(\d+) of (\d+) layers and variants are there already", capsys.readouterr().out)
    assert said is not None
    assert said[1] == said[2] != "0"
    assert content(tmp_path / "again") == content(tmp_path / "small")
    assert isinstance(lmq.load(tmp_path / "small").get_input_embeddings(), QuantizedEmbedding)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.slow
def test_python_gives_the_path_of_what_the_command_makes(server, tiny_llama, tmp_path):
    path = lmq.quantize(tiny_llama, bits=4.5, effort="quick", output=tmp_path / "made")
    assert path == tmp_path / "made"
    assert isinstance(path, Path)
    assert (path / "config.json").is_file()
    (report,) = (tmp_path / "runs").glob("*/report.html")
    shown = re.search(r'<iframe srcdoc="([^"]*)"', path._repr_html_())
    assert shown is not None
    assert html.unescape(shown[1]) == report.read_text()
    assert str(path) in path._repr_html_()
    assert quantized_bytes(path) * 8 <= 4.5 * prepare_goal(Goal(model=str(tiny_llama), bits=4.5)).structure.parameters


@pytest.mark.slow
def test_the_best_effort_tunes_what_it_planned_and_says_what_it_kept(
    server: None,
    tiny_qwen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = {"sequences": 8, "label_draws": 1, "rounding_steps": 20, "polish_steps": 4, "evaluation_tokens": 2048}
    monkeypatch.setitem(EFFORTS, "best", replace(EFFORTS["best"], **short))
    assert main(["quantize", str(tiny_qwen), "--bits", "2.6", "--effort", "best", "-o", "small", "--yes"]) == 0
    store, kept = ArtifactStore("store"), set()
    for stage in ("learned", "polished"):
        (manifest,) = store.manifests(stage)
        if json.loads(store.path(manifest.ref, "kept.json").read_text())["kept"]:
            kept.add(stage)
    (run_dir,) = (tmp_path / "runs").iterdir()
    results = {result.strategy: result for result in read_results(run_dir / "results.json")}
    assert results["uniform"].quantizer == "fisher-gptq"  # what it is compared with is not tuned
    quantizer, *tuned = results["auto"].quantizer.split(", ")
    assert quantizer == "fisher-gptq"
    assert set(tuned) == kept
    assert "uniform at this size, not tuned" in capsys.readouterr().out


@pytest.fixture(scope="module")
def runner(server: None) -> Iterator[Runner]:
    with forking_runner(PREFECT_API_URL=PREFECT_API_URL.value()) as runner:
        yield runner


@pytest.mark.slow
def test_the_same_line_after_it_was_stopped_goes_on(runner: Runner, tiny_llama, tmp_path, tmp_path_factory):
    layers = 9
    model = save_small_llama(tiny_llama, tmp_path_factory.mktemp("small-llama"), layers, width=128)
    line = ("quantize", str(model), "--bits", "4.25", "--effort", "quick", "-o", "small")
    made = tmp_path / "store" / "manifests" / "sampled-backward"
    finished = {}
    for number, least in ((signal.SIGTERM, 2), (signal.SIGINT, 5)):
        run = runner.start(*line, place=tmp_path)
        here = lambda run=run, least=least: run.is_over or len(list(made.glob("*.json"))) >= least  # noqa: E731
        wait_until(here, "the moment to stop", lambda run=run: run.output)
        os.kill(run.pid, number)
        assert run.wait() == 1, run.output
        assert "finished work is kept" in run.output
        assert not (tmp_path / "small").exists()
        kept, finished = finished, finished_work(tmp_path / "store")
        assert kept.items() <= finished.items(), "finished work was repeated"
        assert least <= sum(path.parent.name == "sampled-backward" for path in finished) < layers - 1
    runner.start(*line, place=tmp_path).finish()
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished work was repeated"
    assert (tmp_path / "small" / "config.json").is_file()


@pytest.mark.slow
def test_a_file_for_llama_cpp_holds_what_was_planned(
    server: None, tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["quantize", str(tiny_qwen), "--bits", "5.2", "--for", "llama.cpp", "--effort", "quick", "-o", "small.gguf"]
    assert main(line) == 0
    assert "llama-cli -m small.gguf" in capsys.readouterr().out
    (run_dir,) = (tmp_path / "runs").iterdir()
    (result,) = [item for item in read_results(run_dir / "results.json") if item.strategy == "loss-aware"]
    checkpoint = QuantizedCheckpoint(run_dir / result.checkpoint)
    assert {spec.gguf is not None for spec in checkpoint.specs.values()} == {True}
    tensors = gguf.GGUFReader("small.gguf").tensors
    quantized = sum(tensor.n_bytes for tensor in tensors if len(tensor.shape) > 1)
    assert quantized == result.size_bytes <= 5.2 * sum(math.prod(shape) for shape in checkpoint.shapes.values()) / 8


@pytest.mark.slow
def test_a_directory_for_gptq_holds_what_was_planned(
    server: None, tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(tiny_qwen), "--bits", "3.9", "--for", "gptq", "--effort", "quick", "-o", "small"]) == 0
    said = capsys.readouterr().out
    told = r"at most [\d.]+ MB on disk, [\d.]+ of them quantized matrices\nfor GPTQModel and SGLang.*\nat most"
    assert re.search(told, said)
    assert "GPTQModel.load('small')" in said
    (run_dir,) = (tmp_path / "runs").iterdir()
    (result,) = [item for item in read_results(run_dir / "results.json") if item.strategy == "loss-aware"]
    checkpoint = QuantizedCheckpoint(run_dir / result.checkpoint)
    assert len({spec.bits for spec in checkpoint.specs.values()}) > 1
    opened = lmq.load("small", dtype=torch.float32)
    for path in checkpoint.specs:
        weight = opened.get_submodule(path).weight.detach()
        assert torch.allclose(weight, checkpoint.weight(path), rtol=2**-10)
    stored = read_headers(Path("small"))
    of_matrices = {name for name in stored if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx")}
    matrices_bytes = sum(size_bytes(stored[name]) for name in of_matrices)
    assert matrices_bytes == result.size_bytes <= 3.9 * sum(math.prod(s) for s in checkpoint.shapes.values()) / 8


def test_a_target_is_kept_before_anything_is_made(
    tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("quantize", tiny_qwen, "--bits", "5.2", "--for")
    assert "unknown target 'lama.cpp'; did you mean 'llama.cpp'" in refusal(capsys, *line, "lama.cpp")
    assert "llama.cpp opens one file; name it as in " in refusal(capsys, *line, "llama.cpp", "-o", "small")
    assert "too few; the fewest" in refusal(capsys, "quantize", tiny_qwen, "--bits", "3", "--for", "llama.cpp")
    prepared = prepare_goal(Goal(model=str(tiny_qwen), bits=4.5, target="vllm"))
    assert prepared.config.measure.menu == ("b4g64", "b4g32", "b8g64", "b8g32")
    assert not prepared.config.embeddings
    assert prepare_goal(Goal(model=str(tiny_qwen), bits=5.2, target="llama.cpp")).goal.directory.suffix == ".gguf"


@pytest.mark.parametrize(
    ("effort", "asked", "equalized"),
    [("normal", None, False), ("normal", True, True), ("best", None, True), ("best", False, False)],
)
def test_the_best_effort_rescales_channels_and_tunes(
    effort: str, asked: bool | None, equalized: bool, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = prepare_goal(Goal(model=str(tiny_llama), bits=4.5, effort=effort, equalize=asked)).config
    assert config.models[0].equalize is equalized
    assert config.tuning == (("learned_rounding", "polish") if effort == "best" else ())
    assert ("equalized" in config.name) is (asked is not None)


def test_tables_that_cannot_be_quantized_stay_as_they_are(tiny_llama, tmp_path):
    """OPT-350M looks rows of another width up."""
    config = OPTConfig(
        vocab_size=512,
        hidden_size=64,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        do_layer_norm_before=False,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "opt")
    prepared = prepare_goal(Goal(model=str(tmp_path / "opt"), size="750kB"))
    assert not prepared.structure.embeddings
    assert not prepared.config.embeddings
    assert prepare_goal(Goal(model=str(tiny_llama), size="400kB")).config.embeddings


def test_what_cannot_be_made_is_refused_before_anything_is(tiny_llama, tmp_path, capsys):
    here = sorted(tmp_path.iterdir())
    assert "there is no model directory" in refusal(capsys, "quantize", "./lost", "--size", "1MB")
    assert "write it as in 400MB" in refusal(capsys, "quantize", tiny_llama, "--size", "4.25")
    assert "is not a budget" in refusal(capsys, "quantize", tiny_llama, "--size", "small")
    assert "give a size below that" in refusal(capsys, "quantize", tiny_llama, "--size", "1GB")
    assert "too few; the fewest" in refusal(capsys, "quantize", tiny_llama, "--bits", "1")
    smallest = smallest_bytes(tiny_llama, capsys)
    assert prepare_goal(Goal(model=str(tiny_llama), size=f"{smallest}B")).config.budgets
    assert sorted(path for path in tmp_path.iterdir() if path.name != "store") == here


def test_a_directory_that_is_there_is_never_touched(tiny_llama, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert "exists already" in refusal(capsys, "quantize", tiny_llama, "--bits", "4", "-o", "mine")
    assert content(tmp_path / "mine") == {"notes.txt": b"keep"}
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("options", [[], ["--size", "1MB", "--bits", "4"], ["--bits", "four"]])
def test_how_small_is_said_once(options, tiny_llama, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", str(tiny_llama), *options])


def write_plan(path: Path, structure: ModelStructure, **changes: str) -> dict[str, QuantSpec]:
    """A plan with the configurations in turn, as a table; the configuration of every matrix by its path."""
    menu = [QuantSpec.parse(name) for name in ("b3g64", "b8g64", "b2g64")]
    plan = dict(zip([info.id for info in structure.modules], itertools.cycle(menu)))
    lines = [f"{module.kind},{module.layer},{spec.bits},{spec.group_size}" for module, spec in plan.items()]
    text = "\n".join(["kind,layer,bits,group_size", *lines])
    for before, after in changes.items():
        text = text.replace(before, after)
    path.write_text(text)
    return {structure.path(module): spec for module, spec in plan.items()}


@pytest.fixture
def fine_tune(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights."""
    path = tmp_path_factory.mktemp("tuned") / "fine-tune"
    shutil.copytree(tiny_qwen, path)
    tensors = {name: tensor * 1.01 for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.slow
def test_a_plan_of_another_model_is_kept_and_only_the_quantizer_measures(
    server: None, tiny_qwen: Path, fine_tune: Path, tmp_path: Path
) -> None:
    expected = write_plan(tmp_path / "plan.csv", discover(tiny_qwen, weights_sha256="0"))
    assert main(["quantize", str(fine_tune), "--plan", "plan.csv", "--effort", "quick", "-o", "small"]) == 0
    assert read_quantization_config(tmp_path / "small").specs == expected
    made = {path.name for path in (tmp_path / "store" / "manifests").iterdir()}
    assert "sampled-backward" in made
    assert not {"sequence-fisher", "fisher", "sensitivity", "kurtosis", "divergence"} & made
    (run_dir,) = (tmp_path / "runs").iterdir()
    again = read_plan(run_dir.name)
    assert again.size_bytes(discover(fine_tune, weights_sha256="0")) == quantized_bytes(tmp_path / "small")
    assert again.specs == read_plan("plan.csv").specs


def test_a_plan_that_does_not_fit_is_refused_before_anything_is(
    tiny_qwen: Path, tiny_phi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    structure = discover(tiny_qwen, weights_sha256="0")
    place, line = tmp_path / "plan.csv", ("quantize", tiny_qwen, "--plan", "plan.csv")
    assert "there is no plan plan.csv" in refusal(capsys, *line)
    write_plan(place, structure)
    other = refusal(capsys, "quantize", tiny_phi, "--plan", "plan.csv")
    assert "is not a plan for this model (28 matrices, the model has 16)" in other
    assert "the plan lacks layer 0 self_attn.qkv_proj" in other
    assert "the model lacks layer 0 self_attn.q_proj" in other
    for change, words in (
        (
            {"k_proj,3,": "k_proj,7,"},
            "the plan lacks layer 3 self_attn.k_proj; the model lacks layer 7 self_attn.k_proj",
        ),
        ({"k_proj,3,": "k_proj,2,"}, "layer 2 self_attn.k_proj is there a second time"),
        ({"q_proj,0,3,": "q_proj,0,five,"}, "line 2 of plan.csv: invalid literal"),
        ({"q_proj,0,3,": "q_proj,0,9,"}, "line 2 of plan.csv: bits = 9 is not a weight width"),
        ({"group_size": "groups"}, "is not a plan: it has no group_size"),
    ):
        write_plan(place, structure, **change)
        assert words in refusal(capsys, *line)
    rows = [f"{info.id.layer},{info.id.kind},4,64,{2 * info.parameters}" for info in structure.modules]
    place.write_text("\n".join(["layer,kind,bits,group_size,parameters", *rows]))
    assert "of another size are layer 0 self_attn.q_proj, " in refusal(capsys, *line)
    assert not (tmp_path / "runs").exists()


def test_a_run_with_several_plans_names_them(
    tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    structure = discover(tiny_qwen, weights_sha256="0")
    run_dir = tmp_path / "runs" / "base"
    run_dir.mkdir(parents=True)
    assert "holds no allocation-*.csv" in refusal(capsys, "quantize", tiny_qwen, "--plan", "base")
    for name in ("one", "two"):
        write_plan(run_dir / f"allocation-{name}.csv", structure)
    message = refusal(capsys, "quantize", tiny_qwen, "--plan", "base")
    assert "has 2 plans; give one of the files runs/base/allocation-one.csv, runs/base/allocation-two.csv" in message
    (run_dir / "allocation-two.csv").write_text("layer,kind,bits,group_size\n0,self_attn.q_proj,4,64\n")
    assert len(read_plan("base").specs) == len(structure.modules)


def test_what_a_gpu_holds_beside_is_taken_off_its_memory(tiny_qwen: Path, tmp_path: Path) -> None:
    prepared = prepare_goal(Goal(model=str(tiny_qwen), fit_gpu="1001.3MB", context="200"))
    shares = prepared.beside_in_memory
    left = prepared.gpu_left
    assert GPU_SET_ASIDE_BYTES + sum(shares.values()) + left == 1_001_300_000
    assert shares["cache of 200 tokens: 4 layers × 2 heads × 16 × 2 × 4 bytes"] == 200 * 4 * 2 * 16 * 2 * 4
    assert shares["the largest matrix, unpacked"] == 64 * 128 * 4
    assert prepared.config.budgets == (f"{left - prepared.beside_bytes} B",)
    assert prepared.config.budgets == prepare_goal(Goal(model=str(tiny_qwen), size=f"{left}B")).config.budgets


@pytest.mark.parametrize(("context", "tokens"), [(None, 256), ("100", 100)])
def test_what_is_in_memory_while_it_runs_is_told_for_a_context(
    tiny_qwen: Path, tmp_path: Path, context: str | None, tokens: int
) -> None:
    prepared = prepare_goal(Goal(model=str(tiny_qwen), size="400KB", context=context))
    assert prepared.gpu_left is None
    (cache, cache_bytes), *_ = prepared.beside_in_memory.items()
    assert cache.startswith(f"cache of {tokens} tokens")
    assert cache_bytes == tokens * 4 * 2 * 16 * 2 * 4
    with pytest.raises(InputError, match="sees 256 tokens at once, not 1,024"):
        prepare_goal(Goal(model=str(tiny_qwen), size="400KB", context="1k"))


def test_what_does_not_fit_a_gpu_is_refused(
    tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("quantize", tiny_qwen, "--fit-gpu")
    assert "nothing of 900MB is left" in refusal(capsys, *line, "900MB", "--context", "200")
    assert "fits as it is" in refusal(capsys, *line, "24GB", "--context", "200")
    assert "sees 256 tokens at once, not 32,768" in refusal(capsys, *line, "24GB", "--context", "32k")
    assert "is not a number of tokens" in refusal(capsys, *line, "24GB", "--context", "long")
    assert "write it as in 400MB" in refusal(capsys, *line, "24", "--context", "200")
    assert "fit_gpu needs context" in refusal(capsys, *line, "24GB")


def test_a_path_shows_a_report_only_where_there_is_one(tmp_path: Path) -> None:
    path = CheckpointPath(tmp_path / "made & <done>")
    assert path == tmp_path / "made & <done>"
    assert os.fspath(path) == str(tmp_path / "made & <done>")
    assert path._repr_html_() is None
    path.report = tmp_path / "report.html"
    assert path._repr_html_() is None
    path.report.write_text('<h1 class="title">"A" & B</h1>')
    shown = path._repr_html_()
    assert "made &amp; &lt;done&gt;" in shown
    assert 'srcdoc="&lt;h1 class=&quot;title&quot;&gt;&quot;A&quot; &amp; B&lt;/h1&gt;"' in shown
    assert (path / "config.json")._repr_html_() is None
    assert pickle.loads(pickle.dumps(path)) == path
