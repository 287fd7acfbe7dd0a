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
    console.print(_kinds(structure))
    console.print(_uniform_sizes(structure))
    routers = ", routers" if structure.has_experts else ""
    say(
        f"not quantized (embeddings, head, norms, biases{routers}): {structure.other_parameters:,} weights, "
        f"{structure.other_bytes / 1e6:,.1f} MB"
    )
    for note in structure.kept_notes:
        say(f"of these, in the blocks: {note}")
    for part in structure.kept_beside:
        say(f"of these, beside the language model: {part}")
    return 0


def summary(structure: ModelStructure) -> str:
    """A model in one line."""
    towers = " and ".join(f"{tower.layers} layers, hidden size {tower.hidden_size}" for tower in structure.towers)
    tied = "tied" if structure.tied_embeddings else "untied"
    outputs = f"vocabulary {structure.vocabulary_size:,}, {structure.dtype}, {tied} embeddings"
    if structure.sees_images:
        outputs = f"{structure.loss} with {structure.vocabulary_size:,} outputs, {structure.dtype}"
    return (
        f"{structure.architecture}: {towers}, {outputs}; "
        f"{len(structure.quantized)} modules of {structure.parameters:,} weights"
    )


def _kinds(structure: ModelStructure) -> Table:
    """A row for every kind; the same matrix of all experts is one. With experts, which tokens a kind sees is said."""
    from lmq.model.structure import without_number

    active = ("Tokens",) if structure.has_experts else ()
    table = Table("Kind", "Part", "Shape", "Modules", "Weights", *active)
    for kind in dict.fromkeys(without_number(kind) for kind in structure.kinds):
        infos = [info for info in structure.modules if without_number(info.id.kind) == kind]
        shapes = sorted({f"{info.out_features} × {info.in_features}" for info in infos})
        layers = len({info.id.layer for info in infos})
        routed = infos[0].id.kind != kind
        modules = f"{layers} layers × {len(infos) // layers} experts" if routed else str(len(infos))
        weights = sum(info.parameters for info in infos)
        tokens = ("routed" if routed else "all",) if active else ()
        table.add_row(kind, infos[0].part, ", ".join(shapes), modules, f"{weights:,}", *tokens)
    return table


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
