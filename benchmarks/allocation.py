"""Solving the budget program: exact knapsack, HiGHS through PuLP, and scipy's milp with a dense constraint matrix.

Then the frontier of 100 budgets for every target, with its constraints, all from one error table of made-up costs.

Run `python -m benchmarks.allocation`. Times are CPU seconds. Slow solvers get fewer budgets; figures for 100 budgets
marked ~ are extrapolated from those. The Llama-2-7B table is the published one where it lies beside the checkout,
otherwise it is made up like the 405B-sized one: costs that fall with bits, lognormal over modules.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.optimize

from lmq.allocation.error_table import ErrorTable
from lmq.allocation.frontier import budget_steps, frontier, within_target
from lmq.allocation.solver import Solution, relative_gap, solve
from lmq.allocation.strategies import Measurements, strategy
from lmq.allocation.targets import TARGETS
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model.structure import ModuleId, ModuleInfo

PUBLISHED_TABLE = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "table-Llama-2-7b-hf.csv.gz"
LLAMA_7B_BLOCK = [4096 * 4096] * 4 + [4096 * 11008] * 3
LLAMA_405B_BLOCK = [16384 * 16384] * 2 + [16384 * 1024] * 2 + [16384 * 53248] * 3
LLAMAS = {"7B-sized": (4096, 4096, 11008, 32), "405B-sized": (16384, 1024, 53248, 126)}
"""Hidden size, rows of keys and values, rows of gate and up, layers."""
BUDGETS = 100
BITS_PER_WEIGHT = (2.2, 8.4)
SCIPY_GAP = 1e-4


@dataclass(frozen=True)
class Program:
    name: str
    costs: np.ndarray
    sizes_bytes: np.ndarray
    parameters: int

    def budget_bytes(self, bits_per_weight: float) -> int:
        return int(self.parameters * bits_per_weight / 8)


@dataclass(frozen=True)
class Timing:
    elapsed_s: list[float]
    largest_gap: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow-budgets", type=int, default=2, help="budgets that HiGHS and scipy get (default 2)")
    slow_budgets = parser.parse_args().slow_budgets
    solvers: dict[str, tuple[Callable[[Program, int], Solution], int]] = {
        "knapsack": (lambda program, budget: solve(program.costs, program.sizes_bytes, budget), BUDGETS),
        "HiGHS (PuLP), gap 1e-9": (
            lambda program, budget: solve(program.costs, program.sizes_bytes, budget, method="highs"),
            slow_budgets,
        ),
        f"scipy milp, dense, gap {SCIPY_GAP:g}": (solve_with_scipy, slow_budgets),
    }
    print("| table | solver | one budget, median s | one budget, worst s | 100 budgets, s | largest gap |")
    print("|---|---|---:|---:|---:|---:|")
    for program in (llama_7b(), made_up("405B-sized, made up", LLAMA_405B_BLOCK, 126)):
        for name, (solver, budgets) in solvers.items():
            timing = measure(program, solver, budgets)
            total_s = sum(timing.elapsed_s) * BUDGETS / budgets
            mark = "" if budgets == BUDGETS else "~"
            print(
                f"| {program.name} {program.costs.shape[0]}×{program.costs.shape[1]} | {name} "
                f"| {np.median(timing.elapsed_s):.3f} | {max(timing.elapsed_s):.3f} | {mark}{total_s:.1f} "
                f"| {timing.largest_gap:.0e} |",
                flush=True,
            )

    print("\n| table, made up | target | configurations | 100 budgets, s | largest gap |")
    print("|---|---|---:|---:|---:|")
    for name, shape in LLAMAS.items():
        measurements = llama_costs(*shape)
        for target in TARGETS.values():
            held = within_target(measurements, target)
            start_s = time.process_time()
            points = frontier(strategy("loss-aware"), held, budget_steps(held, BUDGETS))
            elapsed_s = time.process_time() - start_s
            gap = max(point.gap for point in points)
            modules = len(held.modules)
            print(f"| {name}, {modules} modules | {target.name} | {len(held.menu)} | {elapsed_s:.2f} | {gap:.0e} |")


def llama_costs(hidden: int, keys: int, inner: int, layers: int) -> Measurements:
    """One error table of the matrices of a Llama, for every configuration that some target holds; costs made up."""
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    modules = tuple(
        ModuleInfo(ModuleId(layer, kind), *shape, part=kind)
        for layer in range(layers)
        for kind, shape in shapes.items()
    )
    menu = tuple(dict.fromkeys([*STOPS, *(QuantSpec.parse(n) for target in TARGETS.values() for n in target.menu)]))
    generator = np.random.default_rng(0)
    fall = np.array([4.0**-spec.bits * (1 + spec.group_size / 100) for spec in menu])
    scale = generator.lognormal(0, 1, (len(modules), 1))
    costs = scale * fall * generator.lognormal(0, 0.05, (len(modules), len(menu)))
    sizes = np.array([[spec.size_bytes(m.parameters, m.in_features) for spec in menu] for m in modules])
    table = ErrorTable(tuple(module.id for module in modules), menu, costs, sizes)
    return Measurements(modules=modules, menu=menu, costs={"sequence_fisher": table})


def measure(program: Program, solver: Callable[[Program, int], Solution], budgets: int) -> Timing:
    low, high = BITS_PER_WEIGHT
    elapsed_s, gaps = [], []
    for step in range(budgets):
        budget_bytes = program.budget_bytes(low + (high - low) * (step + 0.5) / budgets)
        start_s = time.process_time()
        solution = solver(program, budget_bytes)
        elapsed_s.append(time.process_time() - start_s)
        gaps.append(solution.gap)
    return Timing(elapsed_s, max(gaps))


def solve_with_scipy(program: Program, budget_bytes: int) -> Solution:
    """The straightforward form: one dense row per module and one for the budget, the gap HiGHS stops at by default."""
    modules, configurations = program.costs.shape
    matrix = np.zeros((modules + 1, modules * configurations))
    for module in range(modules):
        matrix[module, module * configurations : (module + 1) * configurations] = 1
    matrix[-1] = program.sizes_bytes.ravel() / 2**20
    limits = np.append(np.ones(modules), budget_bytes / 2**20)
    result = scipy.optimize.milp(
        program.costs.ravel(),
        integrality=np.ones(matrix.shape[1]),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=scipy.optimize.LinearConstraint(matrix, np.append(np.ones(modules), -np.inf), limits),
        options={"mip_rel_gap": SCIPY_GAP},
    )
    choice = result.x.reshape(modules, configurations).argmax(axis=1)
    rows = np.arange(modules)
    objective = float(program.costs[rows, choice].sum())
    assert relative_gap(objective, result.mip_dual_bound) <= 2 * SCIPY_GAP
    return Solution(choice, objective, result.mip_dual_bound, int(program.sizes_bytes[rows, choice].sum()))


def llama_7b() -> Program:
    if not PUBLISHED_TABLE.is_file():
        return made_up("7B-sized, made up", LLAMA_7B_BLOCK, 32)
    with gzip.open(PUBLISHED_TABLE, "rt") as file:
        rows = list(csv.DictReader(file))
    modules = sorted({(int(row["layer"]), row["module"]) for row in rows})
    specs = [(spec.bits, spec.group_size) for spec in STOPS]
    costs, sizes_bytes = np.zeros((len(modules), len(specs))), np.zeros((len(modules), len(specs)), np.int64)
    parameters = {}
    for row in rows:
        module = int(row["layer"]), row["module"]
        cell = modules.index(module), specs.index((int(row["nbit1"]), int(row["gsize1"])))
        costs[cell] = float(row["fnorm"])
        sizes_bytes[cell] = round(float(row["memmb"]) * 2**20)
        parameters[module] = int(row["params"])
    return Program("Llama-2-7B", costs, sizes_bytes, sum(parameters.values()))


def made_up(name: str, block: list[int], layers: int) -> Program:
    generator = np.random.default_rng(0)
    parameters = block * layers
    fall = np.array([2.0**-spec.bits * (1 + spec.group_size / 100) for spec in STOPS])
    scale = np.sqrt(parameters) * generator.lognormal(0, 0.5, len(parameters))
    costs = scale[:, None] * fall * generator.lognormal(0, 0.05, (len(parameters), len(STOPS)))
    sizes_bytes = np.array([[spec.size_bytes(count) for spec in STOPS] for count in parameters])
    return Program(name, costs, sizes_bytes, sum(parameters))


if __name__ == "__main__":
    main()
