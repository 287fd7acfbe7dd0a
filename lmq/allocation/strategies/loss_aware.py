"""The loss-aware program: least estimated harm to the loss under the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmq.allocation.solver import Allocation
from lmq.allocation.strategies.base import Choices, Measurements, solve_program, table_costs
from lmq.errors import unknown_name

_TABLES = {"sequence": "sequence_fisher", "token": "fisher"}


@dataclass(frozen=True, kw_only=True)
class LossAware:
    """Least sum of Fisher costs, made non-increasing in size per module.

    `fisher` says which: "sequence" squares the change of the loss sequence by sequence, for labels that the model
    draws itself (`lmq.measurement.sequence_fisher`), "token" token by token, for the labels of the text
    (`lmq.measurement.token_fisher`).
    """

    name: ClassVar[str] = "loss-aware"
    summary: ClassVar[str] = "least sum of loss-aware costs (sequence- or token-wise Fisher) within the budget"
    source: ClassVar[str] = "score as in NVIDIA Model Optimizer's gradient scorer; program of MXQ"
    keeps_constraints: ClassVar[bool] = True
    quantizer: ClassVar[str | None] = None

    fisher: str = "sequence"

    def __post_init__(self) -> None:
        if self.fisher not in _TABLES:
            raise unknown_name("loss-aware fisher", str(self.fisher), _TABLES)

    @property
    def needs(self) -> frozenset[str]:
        """The error table of the chosen cost."""
        return frozenset({_TABLES[self.fisher]})

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """Solve the program for the monotone costs. Raises InfeasibleBudget, InputError."""

        name = _TABLES[self.fisher]

        def costs_of(choices: Choices) -> np.ndarray:
            return non_increasing(table_costs(measurements, name, choices), choices.sizes_bytes)

        return solve_program(measurements, budget_bytes, costs_of)


def non_increasing(costs: np.ndarray, sizes_bytes: np.ndarray) -> np.ndarray:
    """Costs [modules, configurations] where no configuration costs more than a smaller one of the same module.

    A larger configuration that measured worse does so by noise of the calibration: it gets the smaller one's cost. Of
    two that are equally large each keeps its own.
    """
    by_size = np.lexsort((-costs, sizes_bytes), axis=1)  # of equally large ones the best comes last
    running = np.minimum.accumulate(np.take_along_axis(costs, by_size, axis=1), axis=1)
    monotone = np.empty_like(costs)
    np.put_along_axis(monotone, by_size, running, axis=1)
    return monotone
