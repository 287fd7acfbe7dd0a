"""`lmq budget`: which sizes a model can have in both storage layouts, and what a budget means in bytes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.table import Table

from lmq_flows.cli.arguments import add_model, add_store
from lmq_flows.cli.inspect import summary
from lmq_flows.cli.terminal import console, say

if TYPE_CHECKING:
    from lmq.allocation.budget import Budget, LayoutRange
    from lmq.formats.spec import QuantSpec
    from lmq.model.structure import ModelStructure
    from lmq.model.unquantized import UnquantizedPart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq budget`."""
    add_model(parser)
    add_store(parser, "where a converted model is kept")
    parser.add_argument(
        "budgets", nargs="*", metavar="BUDGET", help="any number of budgets, as in 4.25, '80 MB', 'uniform b3g64 + 2%%'"
    )
    parser.add_argument("--menu", metavar="b2g128,…", help="configurations to choose from (default: all that fit)")
    parser.add_argument(
        "--axis",
        type=int,
        choices=(0, 1),
        default=1,
        help="axis along which the hqq library groups weights (default: %(default)s)",
    )
    parser.set_defaults(command=budget_command, continued_list="budgets")


def budget_command(arguments: argparse.Namespace) -> int:
    """Print what sizes a model can have in both storage layouts, and what budgets become; measures nothing."""
    from lmq.allocation.budget import LAYOUTS, Budget, LayoutRange, module_sizes
    from lmq.formats.spec import STOPS, QuantSpec
    from lmq.model.unquantized import unquantized_parts
    from lmq_flows.run.plan import inspect_model

    budgets = {text: Budget.parse(text) for text in arguments.budgets}
    menu = tuple(QuantSpec.parse(name) for name in arguments.menu.split(",")) if arguments.menu else STOPS
    inspected = inspect_model(arguments.model, arguments.store)
    structure = inspected.structure
    if arguments.menu:
        module_sizes(structure.modules, menu)  # a configuration that was asked for must fit
    # the hqq library holds no type of llama.cpp
    layouts = LAYOUTS if any(spec.gguf is None for spec in menu) else LAYOUTS[:1]
    ranges = [LayoutRange.of(structure.modules, menu, layout, axis=arguments.axis) for layout in layouts]
    say(summary(structure))
    console.print(_feasible_table(ranges, structure))
    console.print(_stops_table(ranges, menu, structure))
    console.print(_parts_table(unquantized_parts(inspected.model_dir, structure), structure))
    if budgets:
        console.print(_budgets_table(budgets, ranges, structure))
    say(
        "A budget is for the quantized modules as lmq stores them (layout paper). Layout hqq is what the hqq library "
        f"stores for the same configuration, axis {arguments.axis}."
    )
    return 0


def _feasible_table(ranges: list[LayoutRange], structure: ModelStructure) -> Table:
    table = _numbers_table("Feasible sizes of the quantized modules", ["Layout"], ["Smallest", "Largest"])
    for found in ranges:
        ends = (found.smallest_bytes, found.largest_bytes)
        table.add_row(found.layout, *(_with_bits(size, structure) for size in ends))
    return table


def _stops_table(ranges: list[LayoutRange], menu: tuple[QuantSpec, ...], structure: ModelStructure) -> Table:
    columns = [f"{found.layout}: {what}" for what in ("quantized modules", "whole model") for found in ranges]
    table = _numbers_table("The same configuration everywhere", ["Uniform"], columns)
    for spec in sorted(menu, key=lambda spec: spec.bits_per_weight):
        sizes = [found.uniform_bytes.get(spec) for found in ranges]
        modules = ["does not fit" if size is None else _with_bits(size, structure) for size in sizes]
        whole = ["–" if size is None else f"{(size + structure.other_bytes) / 1e6:,.2f} MB" for size in sizes]
        table.add_row(spec.name, *modules, *whole)
    return table


def _parts_table(parts: tuple[UnquantizedPart, ...], structure: ModelStructure) -> Table:
    title = f"Not quantized, stored as {structure.dtype} in either layout"
    table = _numbers_table(title, ["Part"], ["Tensors", "Weights", "Bytes"])
    for part in parts:
        if part.tensors:
            table.add_row(part.name, str(part.tensors), f"{part.parameters:,}", f"{part.size_bytes:,} B")
        elif part.name == "lm_head":
            table.add_row(part.name, "tied", "–", "–")
    total = str(sum(part.tensors for part in parts))
    table.add_row("all", total, f"{structure.other_parameters:,}", f"{structure.other_bytes:,} B")
    return table


def _budgets_table(budgets: dict[str, Budget], ranges: list[LayoutRange], structure: ModelStructure) -> Table:
    """A row per budget, as it was written, and layout."""
    table = Table("Budget", "Becomes", "Layout", "Feasible", "Largest uniform within", "Next uniform over")
    table.title, table.title_justify = "Budgets", "left"
    for text, budget in budgets.items():
        budget_bytes = budget.resolve(structure)
        for found in ranges:
            first = (text, _with_bits(budget_bytes, structure)) if found is ranges[0] else ("", "")
            feasible = _feasibility(found, budget_bytes)
            around = [_apart(found, spec, budget_bytes) for spec in found.uniform_around(budget_bytes)]
            table.add_row(*first, found.layout, feasible, *around)
    return table


def _numbers_table(title: str, names: list[str], columns: list[str]) -> Table:
    table = Table(*names, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _with_bits(size_bytes: int, structure: ModelStructure) -> str:
    return f"{size_bytes:,} B = {8 * size_bytes / structure.parameters:.3f} bpw"


def _feasibility(found: LayoutRange, budget_bytes: int) -> str:
    if budget_bytes < found.smallest_bytes:
        return f"no: {found.smallest_bytes - budget_bytes:,} B short"
    if budget_bytes > found.largest_bytes:
        return f"yes: {budget_bytes - found.largest_bytes:,} B to spare"
    return "yes"


def _apart(found: LayoutRange, spec: QuantSpec | None, budget_bytes: int) -> str:
    """A uniform configuration with its size relative to the budget."""
    from lmq.report.results import format_percent

    if spec is None:
        return "none"
    size_bytes = found.uniform_bytes[spec]
    if size_bytes == budget_bytes:
        return f"{spec.name} (exactly)"
    return f"{spec.name} ({format_percent(size_bytes / budget_bytes - 1, signed=True, decimals=2)})"
