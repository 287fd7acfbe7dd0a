"""Which dependencies are tried against their pins, and what is said of them; nothing is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def _program() -> ModuleType:
    """The program, which no package holds: tests see the folders that are installed."""
    spec = importlib.util.spec_from_file_location("pins", ROOT / "benchmarks" / "pins" / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PINS = _program()
PROJECT = """
[project]
dependencies = ["prefect>=3.8.8,<3.9", "torch>=2.6", "hqq==0.2.8", "numpy"]
"""
PREFECT = Requirement("prefect>=3.8.8,<3.9")


def test_pinned_is_what_has_an_upper_bound() -> None:
    assert [pin.name for pin in PINS.pins(PROJECT)] == ["prefect", "hqq"]
    assert [pin.name for pin in PINS.pins(PROJECT, ["hqq"])] == ["hqq"]


def test_every_pin_of_the_project_has_a_probe_and_every_probe_a_pin() -> None:
    assert {pin.name for pin in PINS.pins((ROOT / "pyproject.toml").read_text())} == PINS.PROBES.keys()


def test_a_package_that_is_not_pinned_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"^torch: not pinned; pinned are prefect, hqq$"):
        PINS.pins(PROJECT, ["hqq", "torch"])


def test_a_pin_without_a_probe_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^numpy: pinned without a probe; add one to PROBES$"):
        PINS.pins('[project]\ndependencies = ["numpy<3"]')


@pytest.mark.parametrize(
    ("tried", "failure", "end"),
    [
        ("3.9.1", None, "3.9.1 | works | can go |"),
        ("3.9.1", "TypeError: a | b", r"3.9.1 | TypeError: a \| b | stays |"),
        ("3.8.8", None, "3.8.8 | not tried | stays: nothing newer |"),
        (None, "ERROR: no index", "none | ERROR: no index | stays |"),
    ],
)
def test_a_row_says_whether_the_pin_can_go(tried: str | None, failure: str | None, end: str) -> None:
    assert PINS.row(PREFECT, tried, failure).endswith(end)


def test_a_release_after_the_pinned_one_is_another_version() -> None:
    assert PINS.row(Requirement("hqq==0.2.8"), "0.2.8.post1", None).endswith("| works | can go |")


def test_what_stands_in_the_way_is_the_last_line_that_says_something() -> None:
    assert PINS.last_line("Traceback\n  ValueError: no\n\n") == "ValueError: no"
    assert PINS.last_line("FAILED a.py::b - c\n!!! stopping !!!\n1 failed\n") == "FAILED a.py::b - c"
    assert PINS.last_line("\n") == "ended without a word"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["torch"], "torch: not pinned; pinned are prefect"), (["--work", __file__], "is a file; name a folder")],
)
def test_bad_input_ends_with_2_before_anything_is_installed(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pins", *arguments])
    with pytest.raises(SystemExit) as ended:
        PINS.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert not printed.out
