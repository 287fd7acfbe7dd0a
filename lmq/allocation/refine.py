"""Refine an allocation by measured loss: cautious steps, each kept only when the loss on a validation slice falls.

Around the current allocation p the loss of another allocation c is, to second order in the weight errors,

    L(c) ≈ L(p) + Σ_m first_order[m, c_m] + Σ_m second_order[m, c_m] + cross terms of modules that change together.

The cross terms are not measured, and the second order, taken from full precision, understates the curvature at the
quantized point. Solving the program for the two sums as they are changes most modules at once and makes the loss
worse; so the second order is multiplied by a caution above 1, which keeps only changes whose first-order gain is
well above their curvature. The caution is tried from bold to careful, and only the measured loss decides: a step is
taken when its loss falls by more than the standard error of the fall over the sequences of the slice. `ModelTrials`
measures losses and local costs on the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from lmq.allocation.program import ProgramConstraints
from lmq.allocation.solver import solve
from lmq.errors import InputError
from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import Allocation
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.model.structure import ModuleId

logger = logging.getLogger(__name__)

UNIFORM = "uniform"

MeasuredLosses = Callable[[np.ndarray], np.ndarray]
"""Loss of an allocation [modules] on each sequence of the validation slice [sequences], in nats per token."""

LossChanges = Mapping[tuple[ModuleId, QuantSpec], np.ndarray]
"""⟨∇_W L, Ŵ − W⟩ of every module and configuration [draws · sequences], from `lmq.measurement.sequence_fisher`."""


@dataclass(frozen=True, eq=False)
class LocalCosts:
    """What changing one module does to the loss, others kept: [modules, configurations], nats per token.

    `first_order` is the inner product of the loss gradient at the quantized point with the change of weights,
    `second_order` (not negative) the curvature along that change; both are 0 at the current allocation.
    """

    first_order: np.ndarray
    second_order: np.ndarray


class Trials(Protocol):
    """Allocations (module → configuration) tried on the model itself; `lmq.allocation.refine.ModelTrials` is one."""

    def divergences(self, allocation: Allocation) -> np.ndarray:
        """Loss on each sequence of the validation slice [sequences], nats per token."""
        ...

    def local_costs(self, allocation: Allocation, menu: Sequence[QuantSpec]) -> LocalCosts:
        """Local costs around the allocation, [modules of the allocation, menu]."""
        ...


MeasuredLocalCosts = Callable[[np.ndarray], LocalCosts]
"""Local costs around an allocation [modules], measured on calibration text outside the validation slice."""


@dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """How far to look.

    rounds: how often the local costs are measured anew. cautions: factors of the second order, bold to careful.
    """

    rounds: int = 4
    cautions: tuple[float, ...] = (1.5, 2.0, 3.0, 4.5)

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise InputError(f"rounds = {self.rounds} is negative; give 0 (choose among the candidates) or more")
        if not self.cautions or min(self.cautions) < 1 or list(self.cautions) != sorted(set(self.cautions)):
            raise InputError(
                f"cautions = {self.cautions} must be rising factors of at least 1, such as (1.5, 2.0, 3.0, 4.5)"
            )


@dataclass(frozen=True, eq=False)
class Step:
    """An allocation that was measured, and its losses [sequences].

    `origin` is a candidate's name or `round 1, caution 3`.
    """

    origin: str
    columns: np.ndarray
    changed_modules: int
    losses: np.ndarray

    @property
    def loss(self) -> float:
        """Mean over the sequences of the validation slice."""
        return float(self.losses.mean())

    def is_better_than(self, other: Step) -> bool:
        """Whether the loss is below the other's by more than the standard error of the difference.

        Of a single sequence there is none: any fall counts.
        """
        if not (math.isfinite(self.loss) and math.isfinite(other.loss)):
            return self.loss < other.loss
        falls = other.losses - self.losses
        stderr = falls.std(ddof=1) / len(falls) ** 0.5 if len(falls) > 1 else 0.0
        return bool(falls.mean() > stderr)


@dataclass(frozen=True, eq=False)
class Refinement:
    """The best allocation that was measured, its loss, that of uniform at the same budget, and all that was tried."""

    columns: np.ndarray
    loss: float
    uniform_loss: float
    tried: tuple[Step, ...]

    @property
    def gain_over_uniform(self) -> float:
        """Nats per token by which the loss on the validation slice is below uniform's.

        Never negative where uniform was a candidate.
        """
        return self.uniform_loss - self.loss


def refine(
    candidates: Mapping[str, np.ndarray],
    sizes_bytes: np.ndarray,
    budget_bytes: int,
    *,
    uniform: np.ndarray,
    measured_losses: MeasuredLosses,
    local_costs: MeasuredLocalCosts,
    options: RefineOptions | None = None,
    constraints: ProgramConstraints | None = None,
) -> Refinement:
    """The candidate of least measured loss, improved by cautious steps while its measured loss falls.

    `candidates` are columns [modules] of `sizes_bytes` [modules, configurations] that keep the budget and
    the constraints: what is returned is never worse than any of them, as measured. `uniform` is the allocation that the
    gain is stated against; it need not be a candidate. Raises InputError where there is no candidate, and for one of
    the wrong shape or over the budget.
    """
    options = options or RefineOptions()
    _check({UNIFORM: uniform, **candidates}, sizes_bytes, budget_bytes)
    if not candidates:
        raise InputError("there are no candidates to choose among; give one or more")
    losses_of = _measured_once(measured_losses)
    tried = [Step(name, columns, 0, losses_of(columns)) for name, columns in candidates.items()]
    best = _least(tried)
    for number in range(1, options.rounds + 1):
        costs = local_costs(best.columns)
        steps = _cautious_steps(best.columns, costs, sizes_bytes, budget_bytes, options.cautions, constraints)
        measured = [
            Step(
                f"round {number}, caution {caution:g}",
                columns,
                int((columns != best.columns).sum()),
                losses_of(columns),
            )
            for caution, columns in steps.items()
        ]
        tried += measured
        if not measured or not _least(measured).is_better_than(best):
            break
        best = _least(measured)
        logger.info("%s changed %d modules: loss %.4f", best.origin, best.changed_modules, best.loss)
    return Refinement(best.columns, best.loss, float(losses_of(uniform).mean()), tuple(tried))


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """Token ids [sequences, sequence_length] and the states that leave the full-precision model's last block."""

    token_ids: Tensor
    reference_states: Tensor


class ModelTrials:
    """Divergence of allocations on a validation slice, and local costs around an allocation on the calibration slice.

    The curvature comes from the loss changes of the calibration slice, the slope from a pass over it back through
    the model as the allocation quantizes it.
    """

    def __init__(self, point: QuantizedPoint, *, calibration: Slice, validation: Slice, loss_changes: LossChanges):
        self._point = point
        self._calibration = calibration
        self._validation = validation
        self._loss_changes = loss_changes

    def divergences(self, allocation: Allocation) -> np.ndarray:
        """Mean KL from full precision on each sequence of the validation slice, nats per token.

        Float64 [sequences]. Raises NotFiniteError.
        """
        slice_ = self._validation
        return self._point.divergences(slice_.token_ids, slice_.reference_states, allocation).numpy()

    def local_costs(self, allocation: Allocation, menu: Sequence[QuantSpec]) -> LocalCosts:
        """Slopes and curvatures [modules, menu]; both are 0 at the allocation itself. Raises NotFiniteError."""
        slice_ = self._calibration
        slopes = self._point.slopes(slice_.token_ids, slice_.reference_states, allocation, menu)
        predicted = slice_.token_ids.shape[1] - 1
        curvatures = [
            [
                0.5 * float(np.square(self._loss_changes[module, spec] - self._loss_changes[module, now]).mean())
                for spec in menu
            ]
            for module, now in allocation.items()
        ]
        return LocalCosts(slopes, np.array(curvatures) / predicted)


def _measured_once(measured_losses: MeasuredLosses) -> MeasuredLosses:
    """The same losses, measured once for equal allocations."""
    known: dict[bytes, np.ndarray] = {}

    def losses_of(columns: np.ndarray) -> np.ndarray:
        key = columns.astype(np.int64).tobytes()
        if key not in known:
            known[key] = measured_losses(columns)
        return known[key]

    return losses_of


def _cautious_steps(
    current: np.ndarray,
    costs: LocalCosts,
    sizes_bytes: np.ndarray,
    budget_bytes: int,
    cautions: tuple[float, ...],
    constraints: ProgramConstraints | None,
) -> dict[float, np.ndarray]:
    """The different allocations that each caution proposes, but for the current one."""
    proposals: dict[float, np.ndarray] = {}
    for caution in cautions:
        change = costs.first_order + caution * costs.second_order
        # the solver's gap is relative to the objective, which therefore must not be near 0
        above_zero = change - change.min(axis=1, keepdims=True) + np.abs(change).mean()
        columns = solve(above_zero, sizes_bytes, budget_bytes, constraints=constraints).choice
        if not any(np.array_equal(columns, known) for known in (current, *proposals.values())):
            proposals[caution] = columns
    return proposals


def _least(steps: list[Step]) -> Step:
    return min(steps, key=lambda step: step.loss)


def _check(candidates: Mapping[str, np.ndarray], sizes_bytes: np.ndarray, budget_bytes: int) -> None:
    for name, columns in candidates.items():
        if columns.shape != (len(sizes_bytes),):
            raise InputError(
                f"candidate {name!r} has shape {columns.shape}; give one column per module: ({len(sizes_bytes)},)"
            )
        size_bytes = int(np.take_along_axis(sizes_bytes, columns[:, None], axis=1).sum())
        if size_bytes > budget_bytes:
            raise InputError(
                f"candidate {name!r} takes {size_bytes:,} bytes of a budget of {budget_bytes:,}; "
                "leave it out or give its own budget"
            )
