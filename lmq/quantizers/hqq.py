"""Half-quadratic quantization (Badri & Shaji 2023), fast: the same numbers as hqq 0.2.8 in float32.

But for weights so small that hqq's limits on scales act (`lmq.quantizers.rtn.min_max_grid`), which has none here.

hqq runs 20 iterations over the whole matrix and stops when the mean absolute error of the whole matrix no longer
falls. Here each block of groups goes through all iterations while it is in the processor's cache; the zeros of
every iteration are kept, and the stop is found afterwards from the summed errors. Most groups reach a zero that an
iteration gives back unchanged within a few iterations, and are left alone from there on. The shrink step, a power
of every error, is taken only in groups where some error can be large enough for it to act.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from lmq.errors import InputError
from lmq.formats.groups import group_blocks, require_axis, to_groups
from lmq.formats.spec import QuantSpec
from lmq.quantizers.integer_zeros import IntegerZeros, refit_scale, require_integer_zeros, whole_zeros
from lmq.quantizers.rtn import min_max_grid

_ROUNDED_BITS = 4


@dataclass(frozen=True, kw_only=True)
class Hqq:
    """Zeros that minimise the l_p norm of the error by half-quadratic splitting; scales of the min-max grid.

    `kappa` multiplies beta after each iteration: 1.0 is what hqq 0.2.8 does, 1.01 what the papers used. `round_zero`
    has the iterations start from whole zeros at 4 bits, as `BaseQuantizeConfig` of hqq asks for and its bare
    `Quantizer.quantize` does not.
    `integer_zeros` takes the nearest whole zeros instead (see `lmq.quantizers.integer_zeros`), and refits the scales.
    """

    name: ClassVar[str] = "hqq"
    axis: int = 1
    iterations: int = 20
    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.0
    round_zero: bool = False
    integer_zeros: IntegerZeros = False

    def __post_init__(self) -> None:
        require_axis(self.axis)
        require_integer_zeros(self.integer_zeros)
        if self.iterations < 1:
            raise InputError(f"iterations = {self.iterations} is not allowed; hqq needs at least 1")
        if not 0 < self.lp_norm < 1:
            raise InputError(f"lp_norm = {self.lp_norm} is not allowed; it lies between 0 and 1, 0.7 by default")
        if self.beta <= 0 or self.kappa < 1:
            raise InputError(f"beta = {self.beta}, kappa = {self.kappa}: beta must be positive, kappa at least 1")

    def fit(self, weight: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero float32 [groups]."""
        groups = to_groups(weight.detach(), spec.group_size, self.axis)
        inverse_scale, covering_zero = min_max_grid(groups, spec.bits)
        zeros = torch.empty(self.iterations + 1, len(groups), device=weight.device)
        zeros[0] = covering_zero.round() if self.round_zero and spec.bits == _ROUNDED_BITS else covering_zero
        error_sums = torch.zeros(self.iterations, dtype=torch.float64, device=weight.device)
        for block in group_blocks(groups):
            error_sums += self._iterate(
                groups[block], inverse_scale[block], covering_zero[block], zeros[:, block], 2**spec.bits - 1
            )
        stop = _stopping_iteration(error_sums / weight.numel())
        scale, zero = 1 / inverse_scale, zeros[stop].clone()
        if not self.integer_zeros:
            return scale, zero
        scale, zero = whole_zeros(groups, scale, zero, spec.bits, self.integer_zeros)
        return refit_scale(groups, scale, zero, spec.bits), zero

    def describe(self) -> dict[str, Any]:
        """Options as JSON."""
        return {"name": self.name, **asdict(self)}

    def _iterate(
        self,
        groups: torch.Tensor,
        inverse_scale: torch.Tensor,
        covering_zero: torch.Tensor,
        zeros: torch.Tensor,
        top: int,
    ) -> torch.Tensor:
        """Fill zeros [1:, groups] from zeros[0] for one block [groups, group_size].

        Returns the sum of absolute errors at each iteration, float64 [iterations]. With a constant beta, a group whose
        zero came out as it went in stays there, and is iterated no further.
        """
        scaled = groups.to(torch.float32) * inverse_scale[:, None]
        # sums over transposed groups (axis 0) round differently when there are fewer, which ties would amplify
        leaves_settled = self.kappa == 1 and scaled.is_contiguous()
        zero = zeros[0]
        errors = torch.empty_like(zero)
        error_sums = torch.empty(self.iterations, dtype=torch.float64, device=groups.device)
        moving = torch.arange(len(groups), device=groups.device)
        for iteration in range(self.iterations):
            beta = self.beta * self.kappa**iteration
            next_zero, errors[moving] = self._step(scaled, inverse_scale, covering_zero, zero, top, beta)
            zeros[iteration + 1] = zeros[iteration]
            zeros[iteration + 1, moving] = next_zero
            error_sums[iteration] = errors.sum(dtype=torch.float64)
            kept = (next_zero != zero).nonzero().flatten()
            zero = next_zero
            if not leaves_settled or len(kept) == len(zero):
                continue
            if not len(kept):
                zeros[iteration + 2 :] = zeros[iteration + 1]
                error_sums[iteration + 1 :] = error_sums[iteration]
                break
            scaled, inverse_scale, covering_zero, zero, moving = (
                values[kept] for values in (scaled, inverse_scale, covering_zero, zero, moving)
            )
        return error_sums

    def _step(
        self,
        scaled: torch.Tensor,
        inverse_scale: torch.Tensor,
        covering_zero: torch.Tensor,
        zero: torch.Tensor,
        top: int,
        beta: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next zero, and the sum of absolute errors with the present one; float32 [groups] each.

        `scaled` [groups, group_size] are the weights times `inverse_scale`.
        """
        scale = 1 / inverse_scale
        residual = scaled + zero[:, None]
        residual.round_().clamp_(0, top).sub_(scaled)  # codes - weight / scale
        next_zero = residual.mean(1)
        residual.sub_(zero[:, None])  # (quantized - weight) / scale
        # the min-max grid covers its group, so an error beyond half a step needs the zero to have moved
        largest_error = ((zero - covering_zero).abs_() + 0.5).mul_(scale)
        active = (largest_error > self._shrink_threshold(beta)).nonzero().flatten()
        if len(active):
            errors = residual[active].neg_().mul_(scale[active, None])
            next_zero[active] += _shrink(errors, beta, self.lp_norm).mean(1).mul_(inverse_scale[active])
        return next_zero, residual.abs_().sum(1).mul_(scale)

    def _shrink_threshold(self, beta: float) -> float:
        """Absolute error below which the shrink step gives exactly 0."""
        return (1 / beta) ** (1 / (2 - self.lp_norm))


def _shrink(errors: torch.Tensor, beta: float, lp_norm: float) -> torch.Tensor:
    """Generalised soft threshold sign(e) · max(|e| - |e|^(p - 1) / beta, 0) of the l_p norm."""
    sizes = errors.abs()
    return (sizes - sizes.pow(lp_norm - 1) / beta).clamp_min_(0).mul_(errors.sign())


def _stopping_iteration(mean_errors: torch.Tensor) -> int:
    """Index of the zeros that hqq keeps: those made in the first iteration whose float32 error did not fall."""
    best = np.float32(np.inf)
    for iteration, error in enumerate(mean_errors.to(torch.float32).tolist()):
        if not np.float32(error) < best:
            return iteration + 1
        best = np.float32(error)
    return len(mean_errors)
