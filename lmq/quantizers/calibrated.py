"""What the quantizers share that use second moments of the inputs: grids weighted by their diagonal, as stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmq.errors import InputError
from lmq.formats.coded_grid import EncodedMatrix
from lmq.formats.gguf_types import GgufMatrix, GgufType
from lmq.formats.groups import Grid, encode, require_axis, to_groups
from lmq.formats.spec import QuantSpec
from lmq.quantizers.coordinate_descent import descend, descend_gguf
from lmq.quantizers.error_feedback import (
    Feedback,
    Lattice,
    Order,
    codes_with_feedback,
    damped_moments,
    feedback_of,
    round_with_feedback,
    stacked,
)
from lmq.quantizers.gguf_fit import fit_type, steps_of
from lmq.quantizers.integer_zeros import IntegerZeros, refit_scale, require_integer_zeros, whole_zeros
from lmq.quantizers.weighted_grid import fit_weighted

_WEIGHTS_AT_ONCE, _WEIGHTS_AT_ONCE_ON_GPU = 1 << 24, 1 << 28
"""Weights of all matrices and configurations that are rounded together."""


def fitted_grid(weight: Tensor, importance: Tensor, spec: QuantSpec, axis: int, *, integer_zeros: IntegerZeros) -> Grid:
    """The stored grid of `weight` [out_features, in_features] of least error weighted by `importance` [in_features]."""
    scale, zero = fitted_values(weight, importance, spec, axis, integer_zeros=integer_zeros)
    return encode(weight, scale, zero, spec, axis, integer_zeros=bool(integer_zeros))


def fitted_values(
    weight: Tensor, importance: Tensor, spec: QuantSpec, axis: int, *, integer_zeros: IntegerZeros
) -> tuple[Tensor, Tensor]:
    """Scale and zero float32 [groups] of that grid before they are stored."""
    scale, zero = fit_weighted(weight, importance, spec, axis)
    if integer_zeros:
        groups = to_groups(weight, spec.group_size, axis)
        scale, zero = whole_zeros(groups, scale, zero, spec.bits, integer_zeros)
        scale = refit_scale(groups, scale, zero, spec.bits)
    return scale, zero


def gguf_types_of(menu: Sequence[QuantSpec], in_features: int, axis: int = 1) -> dict[GgufType, list[QuantSpec]]:
    """The types of GGUF that rows of `in_features` take, each with the configurations of the menu that become it.

    Raises InputError for rows that none fits, and for groups along another axis.
    """
    types: dict[GgufType, list[QuantSpec]] = {}
    for spec in menu:
        if spec.gguf is not None:
            if axis != 1:
                raise InputError(f"{spec.name} groups weights along in_features; set measure.axis to 1")
            types.setdefault(spec.gguf.of_rows(in_features), []).append(spec)
    return types


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
    integer_zeros: IntegerZeros = False
    sweeps: int = 0

    def __post_init__(self) -> None:
        require_axis(self.axis)
        require_integer_zeros(self.integer_zeros)
        if not 0 <= self.damping <= 1:
            raise InputError(f"damping = {self.damping} is not allowed; give a share of the mean diagonal from 0 to 1")
        if self.order not in ("descending", "stored"):
            raise InputError(f"order = {self.order!r} is not allowed; allowed: descending, stored")
        if self.sweeps < 0:
            raise InputError(f"sweeps = {self.sweeps} is not allowed; give 0 or more")

    def quantize(
        self, weights: Tensor, moments: Tensor, menu: Sequence[QuantSpec]
    ) -> list[dict[QuantSpec, EncodedMatrix]]:
        """Grid and codes of every matrix for every configuration.

        `weights` [matrices, out_features, in_features], `moments` [matrices, in_features, in_features]. Raises
        InputError for a type of GGUF that the rows do not fit, or along another axis.
        """
        feedbacks = [feedback_of(matrix, damping=self.damping, order=self.order) for matrix in moments]
        found: list[dict[QuantSpec, EncodedMatrix]] = [{} for _ in weights]
        limit = _WEIGHTS_AT_ONCE_ON_GPU if weights.is_cuda else _WEIGHTS_AT_ONCE
        at_once = max(1, limit // weights[0].numel())
        for kind, specs in gguf_types_of(menu, weights.shape[2], self.axis).items():
            for start in range(0, len(weights), at_once):
                some = slice(start, start + at_once)
                matrices = self._gguf_matrices(weights[some], moments[some], kind, feedbacks[some])
                for by_spec, matrix in zip(found[some], matrices, strict=True):
                    by_spec |= dict.fromkeys(specs, matrix)
        own = [spec for spec in menu if spec.gguf is None]
        for group_size in sorted({spec.group_size for spec in own}):
            alike = [spec for spec in own if spec.group_size == group_size]
            pairs = [(number, spec) for number in range(len(weights)) for spec in alike]
            for start in range(0, len(pairs), at_once):
                together = pairs[start : start + at_once]
                numbers = [number for number, _ in together]
                fitted = [self._grid(weights[number], moments[number], spec) for number, spec in together]
                coded = round_with_feedback(weights[numbers], fitted, [feedbacks[number] for number in numbers])
                if self.sweeps:
                    damped = stacked([damped_moments(moments[number], self.damping) for number in numbers])
                    coded = descend(
                        weights[numbers], coded, damped, sweeps=self.sweeps, tune_zeros=not self.integer_zeros
                    )
                for (number, spec), grid in zip(together, coded, strict=True):
                    found[number][spec] = grid
        return [{spec: by_spec[spec] for spec in menu} for by_spec in found]

    def _gguf_matrices(
        self, weights: Tensor, moments: Tensor, kind: GgufType, feedbacks: Sequence[Feedback]
    ) -> list[GgufMatrix]:
        """The matrices in a type of GGUF: error feedback on weighted grids as they are stored, then the sweeps."""
        fitted = [fit_type(weight, self._importance(of), kind) for weight, of in zip(weights, moments, strict=True)]
        steps = steps_of(kind, weights.device)
        lattices = [Lattice(*grid.decode(), grid.shape, kind.group_size) for grid in fitted]
        codes = codes_with_feedback(weights, lattices, steps, feedbacks)
        if self.sweeps:
            damped = stacked([damped_moments(matrix, self.damping) for matrix in moments])
            fitted, codes = descend_gguf(weights, fitted, codes, damped, steps, sweeps=self.sweeps)
        return [GgufMatrix.of(grid, matrix) for grid, matrix in zip(fitted, codes, strict=True)]

    def _importance(self, moments: Tensor) -> Tensor:
        """What grids are weighted by."""
        diagonal = moments.diagonal()
        return diagonal if self.weighted_grid else torch.ones_like(diagonal)

    def _grid(self, weight: Tensor, moments: Tensor, spec: QuantSpec) -> Grid:
        """The grid that a matrix is rounded on."""
        return fitted_grid(weight, self._importance(moments), spec, self.axis, integer_zeros=self.integer_zeros)
