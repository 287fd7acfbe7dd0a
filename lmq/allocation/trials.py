"""Trying plans on the model itself: what `auto` decides by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lmq.allocation.refine import LocalCosts
from lmq.formats.spec import QuantSpec
from lmq.measurement.quantized_model import Choice, QuantizedPoint
from lmq.model.structure import ModuleId

LossChanges = Mapping[tuple[ModuleId, QuantSpec], np.ndarray]
"""⟨∇_W L, Ŵ − W⟩ of every module and configuration [draws · sequences], from `lmq.measurement.sequence_fisher`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """Token ids [sequences, sequence_length] and the states that leave the full-precision model's last block."""

    token_ids: Tensor
    reference_states: Tensor


class ModelTrials:
    """Divergence of plans on a validation slice, and local costs around a plan on the calibration slice.

    The curvature comes from the loss changes of the calibration slice, the slope from a pass over it back through
    the model as the plan quantizes it.
    """

    def __init__(self, point: QuantizedPoint, *, calibration: Slice, validation: Slice, loss_changes: LossChanges):
        self._point = point
        self._calibration = calibration
        self._validation = validation
        self._loss_changes = loss_changes

    def divergences(self, plan: Choice) -> np.ndarray:
        """Mean KL from full precision on each sequence of the validation slice, nats per token.

        Float64 [sequences]. Raises NotFiniteError.
        """
        slice_ = self._validation
        return self._point.divergences(slice_.token_ids, slice_.reference_states, plan).numpy()

    def local_costs(self, plan: Choice, menu: Sequence[QuantSpec]) -> LocalCosts:
        """Slopes and curvatures [modules of the plan, menu]; both are 0 at the plan itself. Raises NotFiniteError."""
        slice_ = self._calibration
        slopes = self._point.slopes(slice_.token_ids, slice_.reference_states, plan, menu)
        predicted = slice_.token_ids.shape[1] - 1
        curvatures = [
            [
                0.5 * float(np.square(self._loss_changes[module, spec] - self._loss_changes[module, now]).mean())
                for spec in menu
            ]
            for module, now in plan.items()
        ]
        return LocalCosts(slopes, np.array(curvatures) / predicted)
