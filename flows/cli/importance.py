"""Commands about the importance of layers: measure it, and prune a model by it."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lmq.evaluation.perplexity import Estimate
from lmq.layers.importance.correlation import rank_correlations
from lmq.layers.importance.estimates import ShapleyOptions
from lmq.report.figures import importance_bands
from lmq.report.figures.standalone import standalone_svg
from lmq.report.results import NOT_MEASURED
from lmq_flows.cli.terminal import console
from lmq_flows.run.prepare import check_directory
from lmq_flows.studies.importance import ImportanceOptions, MeasuredImportance, measure_importance
from lmq_flows.studies.pruning import WHOLE, JudgedRemoval, PruningOptions, prune
from lmq_flows.studies.pruning_metrics import ANGULAR
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


def importance_command(arguments: argparse.Namespace) -> int:
    """Measure the importance of every layer; print and write it."""
    (name,) = model_names([arguments.model])
    out: Path = arguments.out or Path("runs") / f"importance-{name}"
    check_directory(out, "--out")
    options = _importance_options(arguments, removal=arguments.without != "removal")
    found = measure_importance(arguments.model, options, arguments.angular_layers, console)
    console.print(_layers_table(found))
    console.print(_correlation_table(found.metrics))
    for note in (_block_note(found), _work_note(found)):
        if note:
            console.print(note, highlight=False, soft_wrap=True)
    _write(found, out)
    return 0


def prune_command(arguments: argparse.Namespace) -> int:
    """Write a shallower checkpoint, and print what it is worth beside other choices of as many layers."""
    options = PruningOptions(
        metric=arguments.metric,
        fraction=arguments.fraction,
        out=arguments.out,
        evaluation=arguments.evaluation,
        tokens=arguments.tokens,
        window=arguments.window,
        random_draws=arguments.random,
        seed=arguments.seed,
    )
    found, judged = prune(arguments.model, _importance_options(arguments), options, console)
    console.print(_judged_table(found, judged))
    scored = judged[0].evaluation.scored_tokens
    stride = max(1, options.window // 2)
    console.print(
        f"perplexity strided {options.window}/{stride}, {scored:,} tokens of {options.evaluation} scored, "
        "none of them measured on",
        highlight=False,
    )
    console.print(str(options.out), highlight=False, soft_wrap=True)
    return 0


def _importance_options(arguments: argparse.Namespace, *, removal: bool = True) -> ImportanceOptions:
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
        console.print(str(path), highlight=False, soft_wrap=True)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _judged_table(found: MeasuredImportance, judged: Sequence[JudgedRemoval]) -> Table:
    count = len(judged[1].layers)
    table = Table("Chosen by", "Layers removed", title_justify="left")
    table.title = f"{found.model} without {count} of its {found.structure.layers} layers"
    for header in ("Perplexity", "Times the whole model's"):
        table.add_column(header, justify="right")
    before = judged[0].evaluation.perplexity.value
    for item in judged:
        perplexity = item.evaluation.perplexity
        ratio = NOT_MEASURED if item.chosen_by == WHOLE else f"{perplexity.value / before:,.2f}"
        chosen_by = f"{ANGULAR} (neighbours)" if item.chosen_by == ANGULAR else item.chosen_by
        table.add_row(chosen_by, _layer_numbers(item.layers), _with_error(perplexity), ratio)
    return table


def _with_error(estimate: Estimate) -> str:
    return f"{estimate.value:,.2f}" + (f" ± {estimate.stderr:,.2f}" if estimate.stderr is not None else "")


def _layer_numbers(layers: Sequence[int]) -> str:
    """`21–29`, `3, 5, 8`; a run of neighbours is written as one."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    return ", ".join(texts) or NOT_MEASURED
