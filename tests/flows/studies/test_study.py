"""Studies on tiny models: what is written, what is shared with runs, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lmq_flows.cli import main
from lmq_flows.graph.build import build_graph
from lmq_flows.graph.direct import execute_directly
from lmq_flows.run.plan import ready_models
from lmq_flows.studies.study import StudyOptions, model_names, text_names
from lmq_tasks.stage import open_store
from tests.flows.conftest import tiny_config

SMALL = ["--sequences", "2", "--sequence-length", "32", "--threads", "1"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def study(place: Path, *argv: str | Path) -> Path:
    """Run a study and return where its results are."""
    out = place / "out"
    assert main(["study", *map(str, argv), *SMALL, "--store", str(place / "store"), "--out", str(out)]) == 0
    return out


def test_sensitivity_is_measured_in_every_combination(
    tiny_llama: Path, tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "other.txt"
    text.write_text("\n\n".join(f"Paragraph {number} tells of {number * number} things." for number in range(400)))
    argv = ["sensitivity", tiny_llama, tiny_qwen, "--text", "pydoc-topics", text]
    out = study(tmp_path, *argv, "--quantizer", "rtn", "nf4", "--config", "b3g64", "b4g64")
    rows = rows_of(out / "sensitivity.csv")
    settings = {(row["model"], row["text"], row["quantizer"], row["configuration"]) for row in rows}
    assert len(settings) == 2 * 2 * 3  # nf4 has 4 bits only
    assert len(rows) == len(settings) * 4 * 4  # parts and layers
    assert all(float(row["sensitivity"]) > 0 for row in rows)
    bits = {(row["quantizer"], row["configuration"]): float(row["bits_per_weight"]) for row in rows}
    assert bits["nf4", "b4g64"] == 4.5
    assert bits["rtn", "b4g64"] == pytest.approx(4.254, abs=1e-3)
    correlations = rows_of(out / "correlations.csv")
    assert {row["dimension"] for row in correlations} == {"model", "text", "quantizer", "configuration"}
    assert (out / "study.svg").read_text().startswith("<svg")
    page = (out / "study.html").read_text()
    assert "rtn – nf4" in page
    assert "NF4 at b4g64 stands for 4-bit NormalFloat" in page
    printed = capsys.readouterr().out
    assert "rtn – nf4" in printed
    assert str(out / "study.html") in printed.replace("\n", "")


def test_what_a_run_measured_is_not_measured_again(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(
        tiny_llama,
        tmp_path,
        strategies=["sensi-boost"],
        measure__menu=["b4g64"],
        calibration={"sequences": 2, "sequence_length": 32},
    )
    models, texts = ready_models(config)
    graph, _, measured = build_graph(config, models, texts)
    execute_directly(graph, measured["tiny"].tables["sensitivity"])
    study(tmp_path, "sensitivity", tiny_llama, "--config", "b4g64")
    printed = capsys.readouterr().out
    for stage, count in (("forward", 3), ("grids", 4), ("sensitivity", 4)):
        assert any(line.startswith(stage) and f"({count} cached)" in line for line in printed.splitlines())


def test_cheap_costs_stand_beside_the_exact_one(
    tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["costs", tiny_qwen, "--pairs", "14", "--config", "b2g64", "b4g64", "--draws", "2", "--exact-sequences", "2"]
    out = study(tmp_path, *argv)
    rows = rows_of(out / "costs.csv")
    assert len(rows) == 14
    assert sorted(row["kind"] for row in rows) == sorted(2 * [*{row["kind"] for row in rows}])
    assert len({row["kind"] for row in rows}) == 7
    for row in rows:
        assert float(row["divergence"]) > 0
        assert float(row["divergence_stderr"]) > 0
        assert float(row["squared Frobenius norm"]) > 0
        assert float(row["sequence-wise Fisher"]) > 0
        assert float(row["delta loss, gradient at the quantized point"]) > 0
    printed = capsys.readouterr().out
    assert "sequence-wise Fisher" in printed
    assert "gradient at full precision" in printed
    assert "gradient at the quantized point" in printed
    assert len(list((tmp_path / "store" / "manifests" / "divergence").iterdir())) <= 4
    assert (out / "study.svg").read_text().count("<svg ") == 9
    assert "Which cost predicts best?" in (out / "study.html").read_text()


def test_nf4_alone_at_other_widths_is_refused(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "sensitivity", str(tiny_llama), "--quantizer", "nf4", "--config", "b3g64"]) == 2
    assert "nf4 has 4 bits, and so has none of b3g64; add b4g64" in capsys.readouterr().err


def test_models_of_one_name_are_told_apart() -> None:
    assert model_names(["a/Model.gguf", "org/model@main", "x/"]) == {
        "model": "a/Model.gguf",
        "model-2": "org/model@main",
        "x": "x/",
    }


def test_texts_go_by_their_file_names_where_these_differ() -> None:
    sources = ["pydoc-topics", "a/x.txt", "dataset:wiki/raw", "a/y.txt", "b/y.txt"]
    assert list(text_names(sources).values()) == ["pydoc-topics", "x.txt", "dataset:wiki/raw", "a/y.txt", "b/y.txt"]


def test_options_make_a_configuration_that_measures_on_the_given_text(tmp_path: Path) -> None:
    options = StudyOptions(sequences=3, sequence_length=40, store=str(tmp_path), threads=1)
    config = options.request(["somewhere"], "pydoc-topics", ["b4g64"])
    assert config.calibration.sequences == 3
    assert config.calibration.sequence_length == 40
    assert config.measure.menu == ("b4g64",)
    assert open_store(config.store) is open_store(str(tmp_path))
