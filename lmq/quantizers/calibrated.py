"""What the quantizers share that use second moments of the inputs: grids weighted by their diagonal, as stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmq.errors import InputError
from lmq.formats.groups import Grid, encode, require_axis, to_groups
from lmq.formats.spec import QuantSpec
from lmq.quantizers.coordinate_descent import descend
from lmq.quantizers.error_feedback import Order, damped_moments, feedback_of, round_with_feedback
from lmq.quantizers.integer_zeros import refit_scale, whole_zeros
from lmq.quantizers.weighted_grid import fit_weighted

_WEIGHTS_AT_ONCE, _WEIGHTS_AT_ONCE_ON_GPU = 1 << 26, 1 << 28
"""Weights of all matrices and configurations that are rounded together."""


def fitted_grid(weight: Tensor, importance: Tensor, spec: QuantSpec, axis: int, *, integer_zeros: bool) -> Grid:
    """The stored grid of `weight` [out_features, in_features] of least error weighted by `importance` [in_features]."""
    scale, zero = fitted_values(weight, importance, spec, axis, integer_zeros=integer_zeros)
    return encode(weight, scale, zero, spec, axis, integer_zeros=integer_zeros)


def fitted_values(
    weight: Tensor, importance: Tensor, spec: QuantSpec, axis: int, *, integer_zeros: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero float32 [groups] of that grid before they are stored."""
    scale, zero = fit_weighted(weight, importance, spec, axis)
    if integer_zeros:
        groups = to_groups(weight, spec.group_size, axis)
        scale, zero = whole_zeros(groups, scale, zero, spec.bits)
        scale = refit_scale(groups, scale, zero, spec.bits)
    return scale, zero


@dataclass(frozen=True, kw_only=True)
class ErrorFeedback:
    """Options of the quantizers with error feedback.

    `damping` is λ of `lmq.quantizers.error_feedback`, a share of the mean diagonal of H; `order` in which columns are
    rounded. `weighted_grid` weights the squared error that grids are fitted to by the diagonal of H. `sweeps` of
    `lmq.quantizers.coordinate_descent` follow.
    """

    axis: int = 1
    damping: float = 0.01
    order: Order = "descending"
    weighted_grid: bool = True
    integer_zeros: bool = False
    sweeps: int = 0

    def __post_init__(self) -> None:
        require_axis(self.axis)
        if not 0 <= self.damping <= 1:
            raise InputError(f"damping = {self.damping} is not allowed; give a share of the mean diagonal from 0 to 1")
        if self.order not in ("descending", "stored"):
            raise InputError(f"order = {self.order!r} is not allowed; allowed: descending, stored")
        if self.sweeps < 0:
            raise InputError(f"sweeps = {self.sweeps} is not allowed; give 0 or more")

    def quantize(self, weights: Tensor, moments: Tensor, menu: Sequence[QuantSpec]) -> list[dict[QuantSpec, Grid]]:
        """Grid and codes of every matrix for every configuration.

        `weights` [matrices, out_features, in_features], `moments` [matrices, in_features, in_features].
        """
        feedbacks = [feedback_of(matrix, damping=self.damping, order=self.order) for matrix in moments]
        found: list[dict[QuantSpec, Grid]] = [{} for _ in weights]
        limit = _WEIGHTS_AT_ONCE_ON_GPU if weights.is_cuda else _WEIGHTS_AT_ONCE
        at_once = max(1, limit // weights[0].numel())
        for group_size in sorted({spec.group_size for spec in menu}):
            alike = [spec for spec in menu if spec.group_size == group_size]
            pairs = [(number, spec) for number in range(len(weights)) for spec in alike]
            for start in range(0, len(pairs), at_once):
                together = pairs[start : start + at_once]
                numbers = [number for number, _ in together]
                grids = [self._grid(weights[number], moments[number], spec) for number, spec in together]
                coded = round_with_feedback(weights[numbers], grids, [feedbacks[number] for number in numbers])
                if self.sweeps:
                    damped = torch.stack([damped_moments(moments[number], self.damping) for number in numbers])
                    coded = descend(
                        weights[numbers], coded, damped, sweeps=self.sweeps, tune_zeros=not self.integer_zeros
                    )
                for (number, spec), grid in zip(together, coded, strict=True):
                    found[number][spec] = grid
        return [{spec: by_spec[spec] for spec in menu} for by_spec in found]

    def _grid(self, weight: Tensor, moments: Tensor, spec: QuantSpec) -> Grid:
        """The grid that a matrix is rounded on."""
        diagonal = moments.diagonal()
        importance = diagonal if self.weighted_grid else torch.ones_like(diagonal)
        return fitted_grid(weight, importance, spec, self.axis, integer_zeros=self.integer_zeros)
