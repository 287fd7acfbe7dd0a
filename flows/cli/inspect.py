"""`lmq inspect`: what a model is made of, and how large it is in every uniform configuration."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.table import Table

from lmq.errors import InputError
from lmq_flows.cli.arguments import add_model, add_store
from lmq_flows.cli.terminal import console, say

if TYPE_CHECKING:
    from lmq.model.structure import ModelStructure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq inspect`."""
    add_model(parser)
    add_store(parser, "where a converted model is kept")
    parser.set_defaults(command=inspect_command)


def inspect_command(arguments: argparse.Namespace) -> int:
    """Print a model's modules and the size of every uniform configuration."""
    from lmq_flows.run.plan import inspect_model

    structure = inspect_model(arguments.model, arguments.store).structure
    say(summary(structure))
    table = Table("Kind", "Part", "Shape", "Modules", "Weights")
    for kind in structure.kinds:
        infos = [info for info in structure.modules if info.id.kind == kind]
        shapes = sorted({f"{info.out_features} × {info.in_features}" for info in infos})
        weights = sum(info.parameters for info in infos)
        table.add_row(kind, infos[0].part, ", ".join(shapes), str(len(infos)), f"{weights:,}")
    console.print(table)
    console.print(_uniform_sizes(structure))
    say(
        f"not quantized (embeddings, head, norms, biases): {structure.other_parameters:,} weights, "
        f"{structure.other_bytes / 1e6:,.1f} MB"
    )
    for note in structure.kept_notes:
        say(f"of these, in the blocks: {note}")
    return 0


def summary(structure: ModelStructure) -> str:
    """A model in one line."""
    return (
        f"{structure.architecture}: {structure.layers} layers, hidden size {structure.hidden_size}, "
        f"vocabulary {structure.vocabulary_size:,}, {structure.dtype}, "
        f"{'tied' if structure.tied_embeddings else 'untied'} embeddings; "
        f"{len(structure.quantized)} modules of {structure.parameters:,} weights"
    )


def _uniform_sizes(structure: ModelStructure) -> Table:
    from lmq.formats.spec import STOPS

    table = Table("Uniform", "Bits/weight", "Quantized modules", "Whole checkpoint")
    for spec in STOPS:
        try:
            size = sum(spec.size_bytes(info.parameters, info.in_features) for info in structure.modules)
        except InputError:
            table.add_row(spec.name, "–", "does not fit every module", "–")
            continue
        bits = 8 * size / structure.parameters
        whole = (size + structure.other_bytes) / 1e6
        table.add_row(spec.name, f"{bits:.3f}", f"{size / 1e6:,.1f} MB", f"{whole:,.1f} MB")
    return table
