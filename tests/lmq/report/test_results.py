import json
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmq.errors import InputError, NotFiniteError
from lmq.evaluation.task_scores import TaskScore
from lmq.report.results import (
    VariantResult,
    format_bytes,
    format_difference,
    format_measured,
    format_percent,
    read_results,
    relative_perplexity,
    write_results,
)
from lmq.report.results_table import markdown_table, results_table

FULL = VariantResult(
    model="m", strategy="full-precision", bits_per_weight=16.0, checkpoint_bytes=269_060_552, perplexity=29.19
)
MIXED = VariantResult(
    model="m",
    strategy="mxq",
    budget="uniform b4g64 +2%",
    budget_bytes=56_460_000,
    size_bytes=56_459_436,
    bits_per_weight=4.3389,
    checkpoint_bytes=114_500_000,
    perplexity=35.0,
    perplexity_stderr=0.41,
    kl_divergence=0.2486,
    kl_divergence_stderr=0.0031,
)
FAILED = VariantResult(model="m", strategy="gptq", budget="uniform b2g64", error="out of | memory\nat layer 3")


def test_round_trip_keeps_what_was_not_measured_as_null(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, [FULL, MIXED, FAILED])
    assert read_results(path) == [FULL, MIXED, FAILED]
    assert json.loads(path.read_text())[2]["perplexity"] is None
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]


@given(
    st.builds(
        VariantResult,
        model=st.text(min_size=1),
        strategy=st.text(min_size=1),
        perplexity=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        tokens=st.none() | st.integers(0, 2**53),
        error=st.none() | st.text(),
        memory_resident_bytes=st.none() | st.integers(0, 2**53),
        tasks=st.none()
        | st.lists(st.builds(TaskScore, task=st.text(), value=st.none() | st.floats(0, 1)), max_size=2).map(tuple),
    )
)
def test_any_record_survives_the_file(tmp_path_factory, result):
    path = tmp_path_factory.mktemp("results") / "results.json"
    write_results(path, [result])
    assert read_results(path) == [result]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, [FULL])
    with pytest.raises(TypeError):
        write_results(path, [replace(FULL, model=object())])  # type: ignore[arg-type]
    assert read_results(path) == [FULL]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(NotFiniteError, match=r"perplexity of m mxq .* record None"):
        replace(MIXED, perplexity=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perplexty": 3.0}, "unknown key 'perplexty'; did you mean 'perplexity'"),
        ({"tokens": 3.5}, "tokens = 3.5 is not int | null"),
        ({"tokens": True}, "tokens = True is not int | null"),
        ({"model": None}, "model = None is not str"),
        ({"tasks": [{"task": "piqa"}]}, "a task score has the keys"),
        ({"tasks": "piqa"}, "a list of task scores was expected"),
    ],
)
def test_a_file_of_another_version_is_refused(tmp_path, change, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([asdict(FULL), asdict(FULL) | change]))
    with pytest.raises(InputError) as caught:
        read_results(path)
    assert f"variant 1 of {path}" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"model": ', "is damaged"),
        ("{}", "holds a dict where a list"),
        ("[3]", "is 3 where an object was expected"),
        ('[{"model": "m"}]', "has no strategy, budget"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_results(path)


def test_what_an_earlier_version_did_not_measure_is_null(tmp_path):
    path = tmp_path / "results.json"
    later = {name for name in asdict(MIXED) if name.startswith(("memory", "peak", "performance", "predicted"))}
    later |= {"tasks", "prompt_tokens_per_second", "generation_tokens_per_second"}
    path.write_text(json.dumps([{key: value for key, value in asdict(MIXED).items() if key not in later}]))
    assert read_results(path) == [MIXED]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.json does not exist"):
        read_results(tmp_path / "nothing.json")


def test_labels_name_strategy_and_budget():
    assert FULL.label == "full-precision"
    assert MIXED.label == "mxq @ uniform b4g64 +2%"
    assert VariantResult(model="m", strategy="uniform", budget="uniform b4g64").label == "uniform b4g64"


def test_table_compares_with_full_precision_of_the_same_model():
    other = replace(MIXED, model="other")
    headers, rows = results_table([FULL, MIXED, FAILED, other])
    table = [dict(zip(headers, row, strict=True)) for row in rows]
    assert table[0]["vs full precision"] == "reference"
    assert table[1]["vs full precision"] == "+19.9%"
    assert relative_perplexity(MIXED, [FULL]) == pytest.approx(35 / 29.19 - 1)
    assert table[3]["vs full precision"] == "–"
    assert table[1]["Perplexity"] == "35.00 ± 0.41"
    assert table[1]["KL to full precision"] == "0.2486 ± 0.0031"
    assert table[1]["On disk"] == "114.5 MB"
    assert table[2]["Perplexity"] == "–"
    assert table[2]["Note"].startswith("failed: out of | memory")


def test_table_shows_the_budget_what_is_used_of_it_and_what_is_over():
    over = replace(MIXED, strategy="sensi-boost", size_bytes=58_742_000)
    small = replace(MIXED, budget_bytes=999_999, size_bytes=20_000_000)
    unknown = replace(MIXED, size_bytes=None)
    headers, rows = results_table([FULL, MIXED, over, small, unknown])
    table = [dict(zip(headers, row, strict=True)) for row in rows]
    assert [row["Used of budget"] for row in table] == [
        "–",
        "56.46 of 56.46 MB",
        "58.74 of 56.46 MB",
        "20.00 of 1.000 MB",
        "– of 56.46 MB",
    ]
    assert [row["Unused"] for row in table] == ["–", "564 B", "−2.282 MB", "−19.00 MB", "–"]
    assert over.unused_bytes == -2_282_000


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (-999, "−999 B"), (1000, "1.000 kB"), (999_999_999, "1,000 MB"), (3_412_345_678, "3.412 GB")],
)
def test_differences_are_exact_below_a_kilobyte(size_bytes, text):
    assert format_difference(size_bytes) == text


def test_markdown_escapes_what_would_break_the_table():
    lines = markdown_table([FULL, FAILED]).splitlines()
    assert len(lines) == 4
    assert "out of \\| memory at layer 3" in lines[3]


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (None, 0.1, "–"),
        (35.8234, 0.414, "35.82 ± 0.41"),
        (35.8234, None, "35.82"),
        (535.83, 5.91, "535.8 ± 5.9"),
        (4054.3, 45.2, "4,054 ± 45"),
        (5.8226, 0.00312, "5.823 ± 0.003"),
        (3.2e7, 1e6, "3.2e+07"),
        (0.0, 0.0, "0.00 ± 0.00"),
    ],
)
def test_measured_values_are_rounded_to_their_uncertainty(value, stderr, text):
    assert format_measured(value, stderr) == text


def test_sizes_and_shares():
    assert format_bytes(1_234_560_000) == "1,234.6 MB"
    assert format_bytes(12_345) == "12.3 kB"
    assert format_bytes(None) == "–"
    assert format_percent(-0.031, signed=True) == "−3.1%"
