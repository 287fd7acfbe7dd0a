"""`lmq prune`: a model without its least important layers, judged beside other choices of as many layers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lmq.evaluation.perplexity import Estimate
from lmq.report.results import NOT_MEASURED
from lmq_flows.cli.arguments import add_number
from lmq_flows.cli.importance import add_importance_options, importance_options
from lmq_flows.cli.terminal import console, say
from lmq_flows.studies.importance import MeasuredImportance
from lmq_flows.studies.pruning import ANGULAR, PRUNING_METRICS, WHOLE, JudgedRemoval, PruningOptions, prune


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq prune`."""
    add_importance_options(parser)
    default = PruningOptions
    parser.add_argument(
        "--metric",
        required=True,
        choices=PRUNING_METRICS,
        metavar="METRIC",
        help=f"what chooses the layers: {', '.join(PRUNING_METRICS)} ({ANGULAR} chooses neighbouring layers)",
    )
    parser.add_argument(
        "--fraction", type=float, default=default.fraction, help="share of the layers to remove (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the new checkpoint")
    parser.add_argument(
        "--evaluation",
        default=default.evaluation,
        metavar="TEXT",
        help="text whose second half the checkpoint is judged on (default: %(default)s)",
    )
    add_number(parser, "--tokens", default.tokens, "tokens of that text", least=16)
    add_number(parser, "--window", default.window, "tokens that the model sees at once", least=8)
    add_number(parser, "--random", default.random_draws, "random choices of layers to compare with", least=0)
    add_number(parser, "--seed", default.seed, "seed of the first random choice", least=0)
    parser.set_defaults(command=prune_command)


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
    found, judged = prune(arguments.model, importance_options(arguments), options, console)
    console.print(_judged_table(found, judged))
    scored = judged[0].evaluation.scored_tokens
    stride = max(1, options.window // 2)
    say(
        f"perplexity strided {options.window}/{stride}: {scored:,} tokens of {options.evaluation} scored, "
        "on none of which importance was measured"
    )
    say(options.out)
    return 0


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
