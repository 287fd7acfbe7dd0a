"""`lmq importance`: how much a model needs each of its layers, by several metrics."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lmq.layers.importance.correlation import rank_correlations
from lmq.layers.importance.estimates import ShapleyOptions
from lmq.report.figures import importance_bands
from lmq.report.figures.standalone import standalone_svg
from lmq.report.results import NOT_MEASURED
from lmq_flows.cli.arguments import add_column, add_model, add_number, add_store, at_least
from lmq_flows.cli.terminal import console, say
from lmq_flows.run.prepare import check_directory
from lmq_flows.studies.importance import ImportanceOptions, MeasuredImportance, measure_importance
from lmq_flows.studies.study import model_names

_HEADINGS = {
    "avss": "AVSS",
    "avss_pooled": "AVSS, authors' program",
    "avss_relative": "AVSS, relative ε",
    "avss_pooled_relative": "AVSS, authors' program, relative ε",
    "block_influence": "Block Influence",
    "angular_distance": "angular distance",
    "leave_one_out": "leave-one-out (nats)",
    "shapley": "Shapley (nats)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq importance`."""
    add_importance_options(parser)
    parser.add_argument(
        "--angular-layers",
        type=at_least(1),
        default=1,
        metavar="N",
        help="also measure the angular distance over blocks of N layers (default: %(default)s)",
    )
    parser.add_argument(
        "--without",
        choices=("removal",),
        help="leave out the slow metrics, which remove sub-layers: Shapley values and leave-one-out",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where tables and figure are written (default: runs/importance-MODEL)"
    )
    parser.set_defaults(command=importance_command)


def add_importance_options(parser: argparse.ArgumentParser) -> None:
    """The model, and how its importance is measured."""
    add_model(parser)
    default = ImportanceOptions()
    parser.add_argument(
        "--text", default=default.text, help="text whose first half is measured on (default: %(default)s)"
    )
    add_column(parser, default.column)
    add_number(parser, "--sequences", default.sequences, "sequences of the text to use")
    add_number(parser, "--sequence-length", default.sequence_length, "tokens in each sequence", least=8)
    shapley = parser.add_mutually_exclusive_group()
    shapley.add_argument(
        "--level",
        type=at_least(1),
        help=f"estimate Shapley values from windows of at most so many sub-layers (default: {ShapleyOptions.level})",
    )
    shapley.add_argument(
        "--permutations",
        type=at_least(1),
        metavar="N",
        help="estimate Shapley values from N random orders instead, with standard errors",
    )
    add_number(parser, "--threads", default.threads, "threads to use")
    add_store(parser)


def importance_options(arguments: argparse.Namespace, *, removal: bool = True) -> ImportanceOptions:
    """The options of `add_importance_options` as they were given; without `removal`, the fast metrics only."""
    level = {} if arguments.level is None else {"level": arguments.level}
    return ImportanceOptions(
        text=arguments.text,
        column=arguments.column,
        sequences=arguments.sequences,
        sequence_length=arguments.sequence_length,
        removal=ShapleyOptions(permutations=arguments.permutations, **level) if removal else None,
        store=arguments.store,
        threads=arguments.threads,
    )


def importance_command(arguments: argparse.Namespace) -> int:
    """Measure the importance of every layer; print and write it."""
    (name,) = model_names([arguments.model])
    out: Path = arguments.out or Path("runs") / f"importance-{name}"
    check_directory(out, "--out")
    options = importance_options(arguments, removal=arguments.without != "removal")
    found = measure_importance(arguments.model, options, arguments.angular_layers, console)
    console.print(_layers_table(found))
    console.print(_correlation_table(found.metrics))
    for note in (_block_note(found), _work_note(found)):
        if note:
            say(note)
    _write(found, out)
    return 0


def _layers_table(found: MeasuredImportance) -> Table:
    table = Table("Layer", title=f"{found.model}: importance of layers", title_justify="left")
    for name in found.metrics:
        table.add_column(_HEADINGS[name], justify="right")
    for layer, values in enumerate(zip(*found.metrics.values(), strict=True)):
        table.add_row(str(layer), *(f"{value:.4g}" for value in values))
    return table


def _correlation_table(metrics: Mapping[str, Sequence[float]]) -> Table:
    table = Table("Spearman's ρ", title="Do the metrics order the layers alike?", title_justify="left")
    for name in metrics:
        table.add_column(_HEADINGS[name], justify="right")
    for name, row in rank_correlations(metrics).items():
        table.add_row(_HEADINGS[name], *(NOT_MEASURED if rho is None else f"{rho:.2f}" for rho in row.values()))
    return table


def _block_note(found: MeasuredImportance) -> str:
    if found.block_layers == 1:
        return ""
    distance = min(found.block_distances)
    first = found.block_distances.index(distance)
    last = first + found.block_layers - 1
    layers = f"{found.block_layers} neighbouring layers: layers {first} to {last}"
    return f"least angular distance over {layers}, {distance:.4g}"


def _work_note(found: MeasuredImportance) -> str:
    if found.removal is None:
        return ""
    work = found.removal
    saved = 1 - work["block_runs"] / work["block_runs_without_reuse"]
    return (
        f"{work['evaluations']:,} models without sub-layers evaluated, for {work['evaluations_unshared']:,} that the "
        f"estimators asked for; {work['block_runs']:,} block runs instead of {work['block_runs_without_reuse']:,} "
        f"({saved:.0%} saved by reuse), in {work['matmul_dtype']}"
    )


def _write(found: MeasuredImportance, out: Path) -> None:
    """Write the tables and the figure, and say where they are."""
    out.mkdir(parents=True, exist_ok=True)
    rows = found.layers
    if found.block_layers > 1:
        name = f"angular_distance_{found.block_layers}_layers"
        distances = found.block_distances + [None] * (found.block_layers - 1)
        rows = [{**row, name: distance} for row, distance in zip(rows, distances, strict=True)]
    paths = [_write_csv(out / "importance.csv", rows)]
    if found.sublayers:
        paths.append(_write_csv(out / "sublayers.csv", found.sublayers))
    figure = importance_bands(
        {_HEADINGS[name]: values for name, values in found.metrics.items()},
        title=f"{found.model}: importance of layers",
    )
    paths.append(out / "importance.svg")
    paths[-1].write_text(standalone_svg([figure]), encoding="utf-8")
    for path in paths:
        say(path)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
