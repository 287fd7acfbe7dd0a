"""The published outliers and boosts of Llama-2-7B, and the proven optima of its budget programs."""

import csv
import gzip
import json
import random
from fractions import Fraction
from pathlib import Path

import pytest

from lmq.allocation.budget import module_sizes
from lmq.allocation.error_table import ErrorTable
from lmq.allocation.solver import solve
from lmq.allocation.strategies import Measurements, strategy
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model.structure import ModuleId, ModuleInfo
from lmq.outliers import outlier_modules, profiles_by_kind

MODEL = "Llama-2-7b-hf"
DIFFERENCE = {"kurtosis": "subtract", "sensitivity": "divide"}
HIDDEN_SIZE = 4096


@pytest.fixture(scope="module")
def vectors(shared: Path) -> Path:
    return shared / "vectors"


@pytest.fixture(scope="module")
def rows(vectors: Path) -> list[dict[str, str]]:
    """The table's rows in an arbitrary order, which must not matter."""
    with gzip.open(vectors / f"table-{MODEL}.csv.gz", "rt") as file:
        table = list(csv.DictReader(file))
    random.Random(5).shuffle(table)
    return table


@pytest.fixture(scope="module")
def signals(rows) -> dict[str, dict[ModuleId, float]]:
    return {name: {_module(row): float(row[name]) for row in rows} for name in DIFFERENCE}


@pytest.fixture(scope="module")
def modules(rows) -> tuple[ModuleInfo, ...]:
    parameters = {_module(row): int(row["params"]) for row in rows}
    return tuple(
        ModuleInfo(module, count // HIDDEN_SIZE, HIDDEN_SIZE, "any") for module, count in sorted(parameters.items())
    )


@pytest.fixture(scope="module")
def error_table(rows) -> ErrorTable:
    """Frobenius norms with the published sizes, which are whole bytes."""
    table = []
    for row in rows:
        size_bytes = Fraction(row["memmb"]) * 2**20
        assert size_bytes.denominator == 1
        module = _module(row)
        table.append(
            {
                "layer": module.layer,
                "kind": module.kind,
                "bits": int(row["nbit1"]),
                "group_size": int(row["gsize1"]),
                "meta_bits": int(row["nbit2"]),
                "meta_group_size": int(row["gsize2"]),
                "size_bytes": int(size_bytes),
                "frobenius_error": float(row["fnorm"]),
            }
        )
    return ErrorTable.from_rows(table, "frobenius_error")


def _module(row: dict[str, str]) -> ModuleId:
    return ModuleId(int(row["layer"]), row["module"])


@pytest.mark.parametrize("top_m", [0, 1, 2, 3])
@pytest.mark.parametrize("signal", DIFFERENCE)
def test_outliers_are_the_published_ones(vectors, signals, signal, top_m):
    published = json.loads((vectors / "outliers.json").read_text())[MODEL][signal][str(top_m)]
    found = outlier_modules(profiles_by_kind(signals[signal]), difference=DIFFERENCE[signal], top_m=top_m)
    assert found == published


def test_boosts_are_the_published_ones(vectors, signals, modules):
    measurements = Measurements(modules=modules, menu=STOPS, profiles=signals)
    with (vectors / "boost-allocations.csv").open() as file:
        published = [row for row in csv.DictReader(file) if row["matches_published"] == "1"]
    assert len(published) == 95
    for row in published:
        base = QuantSpec(int(row["base_bits"]), int(row["base_group"]))
        boost = QuantSpec(int(row["boost_bits"]), int(row["boost_group"]))
        boosted = set(row["boosted"].split())
        expected = {m.id: boost if f"{m.id.layer}.{m.id.kind}" in boosted else base for m in modules}
        chosen = strategy(row["algo"], boost_stop=int(row["boost_stop"]), top_m=int(row["top_m"]))
        allocation = chosen.allocate(measurements, int(module_sizes(modules, [base]).sum()))
        assert allocation.specs == expected, row
        assert {f"{a.module.layer}.{a.module.kind}" for a in allocation.assignments if a.boosted} == boosted


def test_the_program_reaches_every_proven_optimum(vectors, error_table, modules):
    parameters = sum(module.parameters for module in modules)
    with (vectors / "milp-optima.csv").open() as file:
        optima = list(csv.DictReader(file))
    assert len(optima) == 32
    for row in optima:
        budget_bytes = int(parameters * Fraction(row["budget"]) / 8)
        solution = solve(error_table.cost, error_table.size_bytes, budget_bytes)
        assert solution.objective == pytest.approx(float(row["optimum"]), rel=1e-9), row
        assert solution.size_bytes <= budget_bytes
        assert solution.lower_bound <= solution.objective
        assert solution.gap <= 1e-9


@pytest.mark.parametrize("budget", ["2.13", "3.25"])
def test_highs_reaches_proven_optima(vectors, error_table, modules, budget):
    budget_bytes = int(sum(module.parameters for module in modules) * Fraction(budget) / 8)
    solution = solve(error_table.cost, error_table.size_bytes, budget_bytes, method="highs")
    with (vectors / "milp-optima.csv").open() as file:
        optimum = next(float(row["optimum"]) for row in csv.DictReader(file) if row["budget"] == budget)
    assert solution.objective == pytest.approx(optimum, rel=1e-9)
    assert solution.size_bytes <= budget_bytes
    assert solution.gap <= 1e-9
