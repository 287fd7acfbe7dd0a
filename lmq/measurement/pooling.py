"""Experts that few tokens are routed to: what is measured of them comes from the tokens of their whole layer.

A matrix of an expert that saw fewer than `FEWEST_TOKENS` tokens has too little of its own to choose codes by, and a
cost near 0 that a program would take its bits for. Its second moments are the mean of those of all experts of the
layer, and its costs are measured on an equal share of their tokens: those of an expert that is used as much as the
others. Which ones were pooled is kept, and named in reports (`lmq.measurement.expert_tokens`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from lmq.measurement.traces import ModuleTrace
from lmq.model.structure import without_number

FEWEST_TOKENS = 64
"""Experts that saw fewer tokens are pooled."""

M = TypeVar("M")


def pooled_traces(traces: Mapping[str, ModuleTrace]) -> dict[str, ModuleTrace]:
    """Traces of a layer by kind, with a share of all experts' tokens where an expert saw few."""
    found = dict(traces)
    for kinds in _groups(traces):
        of_group = [traces[kind] for kind in kinds]
        for number, kind in enumerate(kinds):
            if len(traces[kind].inputs) < FEWEST_TOKENS:
                found[kind] = _share(of_group, number)
    return found


def pooled_moments(
    moments: Mapping[str, M], tokens: Mapping[str, int], mean: Callable[[Sequence[M]], M]
) -> dict[str, M]:
    """Second moments of a layer by kind, with their `mean` over all experts where an expert saw few `tokens`."""
    found = dict(moments)
    for kinds in _groups(moments):
        few = [kind for kind in kinds if tokens[kind] < FEWEST_TOKENS]
        if few:
            found |= dict.fromkeys(few, mean([moments[kind] for kind in kinds]))
    return found


def _groups(kinds: Mapping[str, object]) -> list[list[str]]:
    """The same matrix of all experts of a layer."""
    groups: dict[str, list[str]] = {}
    for kind in kinds:
        if (name := without_number(kind)) != kind:
            groups.setdefault(name, []).append(kind)
    return list(groups.values())


def _share(traces: Sequence[ModuleTrace], number: int) -> ModuleTrace:
    """Of the tokens of n experts every n-th from `number` on, sequence by sequence."""
    count, draws = len(traces), traces[0].draws
    by_expert = [(trace, list(trace.lengths or ())) for trace in traces]
    inputs = zip(*(trace.inputs.split(lengths) for trace, lengths in by_expert), strict=True)
    gradients = zip(*(trace.gradients.split(lengths * draws) for trace, lengths in by_expert), strict=True)
    of_inputs, of_outputs = (
        [torch.cat(of_sequence)[number::count] for of_sequence in pieces] for pieces in (inputs, gradients)
    )
    return ModuleTrace(torch.cat(of_inputs), torch.cat(of_outputs), tuple(map(len, of_inputs)), draws)
