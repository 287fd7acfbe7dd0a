"""What the input embedding and the output head get, where they are quantized too.

`uniform`, `plan` and `loss-aware` decide about them as about any matrix: they have the same configuration as all, one
that is fixed, or a Fisher cost in the same unit. The measurements of the others are about blocks. There embedding and
head get beforehand what `loss-aware` gives them at the same budget where the strategy looks at its costs (`auto`), else
what `uniform` does; the strategy divides what is left over the blocks. So the papers' strategies stay what they are.
"""

from __future__ import annotations

from dataclasses import replace

from lmq.allocation.solver import Allocation, Assignment
from lmq.allocation.strategies.base import Measurements, Strategy
from lmq.allocation.strategies.loss_aware import LossAware
from lmq.allocation.strategies.plan import Plan
from lmq.allocation.strategies.uniform import Uniform
from lmq.model.structure import EMBEDDINGS

_WHOLE = (Uniform(), LossAware(), Plan())


def decides_on_embeddings(strategy: Strategy) -> bool:
    """Whether a strategy takes embedding and head for matrices like any other."""
    return strategy in _WHOLE


def set_embeddings_aside(
    strategy: Strategy, measurements: Measurements, budget_bytes: int
) -> tuple[tuple[Assignment, ...], Measurements, int]:
    """What embedding and head get beforehand, and the measurements and bytes that are left for the strategy.

    Raises InfeasibleBudget, InputError.
    """
    if decides_on_embeddings(strategy) or all(module.id.layer != EMBEDDINGS for module in measurements.modules):
        return (), measurements, budget_bytes
    first: Strategy = LossAware() if LossAware().needs <= measurements.costs.keys() else Uniform()
    decided = first.allocate(measurements, budget_bytes)
    aside = tuple(item for item in decided.assignments if item.module.layer == EMBEDDINGS)
    blocks = tuple(module for module in measurements.modules if module.id.layer != EMBEDDINGS)
    left_bytes = budget_bytes - sum(item.size_bytes for item in aside)
    return aside, replace(measurements, modules=blocks), left_bytes


def with_embeddings(allocation: Allocation, aside: tuple[Assignment, ...]) -> Allocation:
    """The allocation of the blocks with what embedding and head got beforehand."""
    return replace(allocation, assignments=allocation.assignments + aside) if aside else allocation
