"""Learned rounding: codes, scales and zeros of a block move together, for what leaves the block; layer by layer.

As AutoRound (arXiv 2309.05516) and the first phase of EfficientQAT (arXiv 2407.11062), but from the codes of a
calibrated quantizer: what is learned is where in its cell every weight lies, so that a code moves on when its weight
comes to the next cell. Every value moves by the sign of its gradient, in steps that shrink to 0 along a line. A layer
is learned on states of the unquantized model and needs no other layer. What is lowered is the squared error of every
channel times the mean square of the loss gradient there, which is what the error costs where channels are independent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lmq.checkpoint.tuning_schedule import TuningSchedule
from lmq.errors import InputError
from lmq.formats.coded_grid import CodedGrid, EncodedMatrix, grid_of_codes
from lmq.formats.gguf_types import GgufMatrix, as_float16, levels_of, unpack_blocks
from lmq.formats.groups import Grid, from_groups, to_groups
from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import Allocation, LayerGrids
from lmq.model.block_inputs import BlockInputs
from lmq.model.structure import ModuleId
from lmq.numerics import fast_products, require_finite

_INSIDE = 0.499
"""How far from the middle of its cell a weight may begin, in codes."""


@dataclass(frozen=True, kw_only=True)
class RoundingSchedule(TuningSchedule):
    """The rates are those of the first step: of a weight and of a zero in codes, of a scale as a share of it."""

    what = "learned rounding"

    weight_rate: float = 0.005
    scale_rate: float = 0.001
    zero_rate: float = 0.008

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_rate", "scale_rate", "zero_rate"):
            if not 0 <= getattr(self, name) < 0.5:
                raise InputError(
                    f"{name} = {getattr(self, name)} of learned rounding is not allowed; give 0 to less than 0.5"
                )


class LearnedMatrix(ABC):
    """Where the weights of one matrix lie between its codes: `position` float32 [groups, group_size] in codes."""

    position: Tensor
    top: int
    """The highest code."""

    def _begin(self, exact: Tensor, codes: Tensor) -> None:
        """A weight lies where it is, or at the edge of the cell of its code where that is not the nearest."""
        self.position = exact.clamp(codes - _INSIDE, codes + _INSIDE)

    @property
    def codes(self) -> Tensor:
        """The nearest codes, float32 [groups, group_size]."""
        return self.position.round().clamp_(0, self.top)

    def _move(self, gradient: Tensor, rate: float) -> None:
        """Move by the sign of a gradient by the positions."""
        self.position.sub_(gradient.sign(), alpha=rate).clamp_(-0.5, self.top + 0.5)

    @abstractmethod
    def weight(self) -> Tensor:
        """The weight that these stand for, float32 [out_features, in_features]."""

    @abstractmethod
    def step(self, gradient: Tensor, schedule: RoundingSchedule, share: float) -> None:
        """Move against the signs of a gradient by the weight [out_features, in_features], by a share of the rates."""

    @abstractmethod
    def stored(self) -> EncodedMatrix:
        """As a checkpoint stores it."""


class LearnedGrid(LearnedMatrix):
    """A matrix on lmq's own grid: scales and zeros float32 [groups] move too, whole zeros stay."""

    def __init__(self, grid: Grid, weight: Tensor, *, integer_zeros: bool = False):
        self.spec, self._shape, self._axis, self._integer_zeros = grid.spec, grid.shape, grid.axis, integer_zeros
        self.top = 2**grid.spec.bits - 1
        self.scale, self.zero = grid.decode()
        groups = to_groups(weight.detach().float().reshape(grid.shape), grid.spec.group_size, grid.axis)
        exact = torch.where(self.scale > 0, 1 / self.scale, 0)[:, None] * groups + self.zero[:, None]
        self._begin(exact, grid.codes(weight).float())

    def weight(self) -> Tensor:
        """(code − zero) · scale."""
        return from_groups((self.codes - self.zero[:, None]) * self.scale[:, None], self._shape, self._axis)

    def step(self, gradient: Tensor, schedule: RoundingSchedule, share: float) -> None:
        """Move positions, scales and zeros."""
        by_group = to_groups(gradient, self.spec.group_size, self._axis)
        by_scale = (by_group * (self.codes - self.zero[:, None])).sum(1)
        self._move(by_group, share * schedule.weight_rate)
        if not self._integer_zeros:
            moved = self.zero + share * schedule.zero_rate * by_group.sum(1).sign()
            self.zero = moved.clamp_(-self.top, 2 * self.top)
        self.scale = self.scale * (1 - share * schedule.scale_rate * by_scale.sign())

    def stored(self) -> CodedGrid:
        """Scales and zeros in 8 bits again, before these codes."""
        codes, whole = self.codes.to(torch.uint8), self._integer_zeros
        return grid_of_codes(codes, self.scale, self.zero, self.spec, self._shape, self._axis, integer_zeros=whole)


class LearnedBlocks(LearnedMatrix):
    """A matrix in a type of GGUF: d and e of a block move too, where they are float16; s and m of its groups stay."""

    def __init__(self, matrix: GgufMatrix, weight: Tensor):
        self._kind = matrix.kind
        self.top = len(self._kind.levels) - 1
        self.grid, codes = unpack_blocks(matrix.blocks, self._kind, matrix.shape)
        scale, minimum = self.grid.scale(), self.grid.minimum()
        groups = weight.detach().float().reshape(-1, self._kind.group_size)
        above = groups if minimum is None else groups + minimum[:, None]
        level = torch.where(scale != 0, 1 / scale, 0)[:, None] * above
        levels = level.new_tensor(self._kind.levels)
        below = (torch.searchsorted(levels, level.contiguous(), right=True) - 1).clamp_(0, self.top - 1)
        exact = below + (level - levels[below]) / (levels[below + 1] - levels[below])
        self._begin(exact, codes.view(groups.shape).float())

    def weight(self) -> Tensor:
        """d · s · level − e · m."""
        return self.grid.weights(self.codes.to(torch.uint8))

    def step(self, gradient: Tensor, schedule: RoundingSchedule, share: float) -> None:
        """Move positions, d and e; both as a share of themselves."""
        grid, kind = self.grid, self._kind
        by_group = gradient.reshape(-1, kind.group_size)
        by_scale = (by_group * levels_of(self.codes.to(torch.uint8), kind)).sum(1).view(grid.scales.shape)
        self._move(by_group * grid.scale()[:, None], share * schedule.weight_rate)
        if kind.unit is not None:
            return
        rate = share * schedule.scale_rate
        by_unit = (by_scale * grid.scales).sum(1)
        self.grid = replace(grid, unit=grid.unit - rate * grid.unit.abs() * by_unit.sign())
        if grid.minimum_unit is not None and grid.minima is not None:
            by_minimum = -(by_group.sum(1).view(grid.minima.shape) * grid.minima).sum(1)
            moved = grid.minimum_unit - rate * grid.minimum_unit.abs() * by_minimum.sign()
            self.grid = replace(self.grid, minimum_unit=moved)

    def stored(self) -> GgufMatrix:
        """With the nearest d and e that the type holds."""
        grid = replace(self.grid, unit=self._kind.nearest_unit(self.grid.unit))
        if grid.minimum_unit is not None:
            grid = replace(grid, minimum_unit=as_float16(grid.minimum_unit))
        return GgufMatrix.of(grid, self.codes.to(torch.uint8).view(grid.shape))


def learned_matrix(matrix: EncodedMatrix, weight: Tensor, *, integer_zeros: bool = False) -> LearnedMatrix:
    """Where learning begins: at the stored codes of `weight` [out_features, in_features]."""
    if isinstance(matrix, GgufMatrix):
        return LearnedBlocks(matrix, weight)
    return LearnedGrid(matrix, weight, integer_zeros=integer_zeros)


def channel_importance(gradient: Tensor) -> Tensor:
    """What a squared error of every channel costs, float32 [hidden], 1 on average.

    `gradient` [draws · sequences, sequence_length, hidden] is that of the loss at the states. Where it is 0 throughout,
    every channel counts alike.
    """
    importance = torch.linalg.vector_norm(gradient.float(), dim=(0, 1)).square()
    mean = importance.mean()
    return importance / mean if mean > 0 else torch.ones_like(importance)


def learn_rounding(
    block: nn.Module,
    inputs: BlockInputs,
    entering: Tensor,
    leaving: Tensor,
    importance: Tensor,
    grids: LayerGrids,
    allocation: Allocation,
    schedule: RoundingSchedule,
    advance: Callable[[float], None] = lambda _: None,
) -> tuple[dict[ModuleId, dict[QuantSpec, EncodedMatrix]], list[float]]:
    """Grids of a layer whose rounding was learned, and the mean weighted squared error of what leaves it at every step.

    `block` holds the unquantized weights, which are replaced; `entering`, `leaving` are states of the unquantized model
    [sequences, sequence_length, hidden], `importance` [hidden] is that of `channel_importance`; `grids` are those of
    the layer, of which the allocation's are taken. `advance` is told how far this is, from 0 to 1. Raises
    NotFiniteError.
    """
    linears = {module: block.get_submodule(module.kind) for module in grids}
    learned = {
        module: learned_matrix(
            by_spec[allocation[module]].to(inputs.device),
            linears[module].get_parameter("weight"),
            integer_zeros=schedule.integer_zeros,
        )
        for module, by_spec in grids.items()
    }
    errors = []
    for number in range(schedule.steps):
        for module, matrix in learned.items():
            linears[module].weight = nn.Parameter(matrix.weight())
        chosen = schedule.sequences_of(number, len(entering))
        weights = {module: linear.get_parameter("weight") for module, linear in linears.items()}
        error, gradients = _gradients(block, inputs, weights, entering[chosen], leaving[chosen], importance)
        errors.append(error)
        for module, gradient in gradients.items():
            require_finite(gradient, f"the gradient of learned rounding at {module}")
            learned[module].step(gradient, schedule, 1 - number / schedule.steps)
        advance((number + 1) / schedule.steps)
    return {module: {allocation[module]: matrix.stored()} for module, matrix in learned.items()}, errors


def _gradients(
    block: nn.Module,
    inputs: BlockInputs,
    weights: Mapping[ModuleId, Tensor],
    entering: Tensor,
    leaving: Tensor,
    importance: Tensor,
) -> tuple[float, dict[ModuleId, Tensor]]:
    """Mean weighted squared error of what leaves the block, and its gradients by the weights, sequence by sequence."""
    sums = {module: torch.zeros_like(weight, dtype=torch.float32) for module, weight in weights.items()}
    total = 0.0
    for sequence in range(len(entering)):
        piece = slice(sequence, sequence + 1)
        with torch.enable_grad(), fast_products(inputs.device):
            off = inputs.run(block, entering[piece]).float() - leaving[piece].to(inputs.device)
            error = (off.square() * importance.to(inputs.device)).mean()
        for found, gradient in zip(
            sums.values(), torch.autograd.grad(error, list(weights.values()), allow_unused=True), strict=True
        ):
            if gradient is not None:  # an expert that no token of the sequence was routed to has none
                found += gradient
        total += error.item()
    return total / len(entering), sums
