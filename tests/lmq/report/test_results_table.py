from dataclasses import replace

from lmq.evaluation.task_scores import TaskScore, main_score
from lmq.report.results import VariantResult
from lmq.report.results_table import latex_table, results_table

FULL = VariantResult(model="m", strategy="full-precision", perplexity=10.0, protocol="strided 1024/512", tokens=100)


def test_the_protocol_is_named_with_the_perplexity() -> None:
    headers, _ = results_table([FULL, replace(FULL, strategy="mxq")])
    assert "Perplexity (strided 1024/512)" in headers
    assert "Windows" not in headers


def test_several_protocols_have_a_column() -> None:
    other = replace(FULL, strategy="mxq", protocol="non-overlapping 2048")
    headers, rows = results_table([FULL, other, replace(FULL, protocol=None, perplexity=None)])
    assert "Perplexity" in headers
    assert [row[headers.index("Windows")] for row in rows] == ["strided 1024/512", "non-overlapping 2048", "–"]


def test_what_nobody_measured_has_no_column() -> None:
    headers, _ = results_table([FULL])
    assert not {"Resident", "Peak generating", "Prompt tokens/s", "Generated tokens/s"} & set(headers)


def test_memory_and_speed() -> None:
    measured = replace(FULL, memory_resident_bytes=269_000_000, generation_tokens_per_second=31.25)
    headers, rows = results_table([measured, FULL])
    assert headers[-3:] == ["Resident", "Generated tokens/s", "Note"]
    assert [row[-3:-1] for row in rows] == [["269.0 MB", "31.2"], ["–", "–"]]


SCORES = (
    TaskScore(task="hellaswag", metric="acc", value=0.30, stderr=0.005, samples=10042),
    TaskScore(task="hellaswag", metric="acc_norm", value=0.35, stderr=0.004, samples=10042),
    TaskScore(task="boolq", metric="acc", value=0.5, stderr=None, samples=20),
    TaskScore(task="piqa", error="the data is not at hand"),
)


def test_tasks_have_a_column_with_n_and_standard_error() -> None:
    headers, rows = results_table([replace(FULL, tasks=SCORES), replace(FULL, strategy="mxq")])
    assert headers[-3:] == ["hellaswag acc_norm, n = 10042", "boolq acc, n = 20", "Note"]
    assert rows[0][-3:] == ["35.0% ± 0.4%", "50.0%", "piqa: the data is not at hand"]
    assert rows[1][-3:] == ["–", "–", ""]


def test_the_metric_that_papers_print() -> None:
    assert main_score(SCORES, "hellaswag").value == 0.35
    assert main_score(SCORES, "piqa") is None
    assert main_score(None, "boolq") is None
    assert main_score((TaskScore(task="t", metric="exact_match", value=0.1),), "t").metric == "exact_match"


def test_latex_has_every_column() -> None:
    table = latex_table([replace(FULL, tasks=SCORES)])
    assert r"hellaswag acc\_norm, n = 10042" in table
    assert r"35.0\% $\pm$ 0.4\%" in table
