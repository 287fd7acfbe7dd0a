"""Polish: scales and zeros of all matrices are tuned together, for the divergence of the whole model; codes stay.

As the second phase of EfficientQAT (arXiv 2407.11062), but for the divergence to full precision instead of the loss of
the text: few parameters, little to overfit. Adam, its rate warmed up and brought to 0 along a cosine. A step runs the
quantized model block by block there and back; one block is in memory, with its scales, zeros and their moments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmq.checkpoint.tuning_schedule import TuningSchedule
from lmq.errors import DamagedFile, InputError
from lmq.formats.coded_grid import CodedGrid, EncodedMatrix, grid_of_codes
from lmq.formats.gguf_types import GgufMatrix
from lmq.formats.groups import Grid, from_groups, to_groups
from lmq.formats.packing import pack, unpack
from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import Allocation, LayerGrids
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModuleId

_ZERO_RATE = 8.0
"""Of a zero in codes, for a rate of 1 of the median scale."""
_WARM_STEPS = 5
_BETAS = (0.9, 0.95)
_TINY = 1e-12
_METADATA_KEY = "lmq-polish"
_STATE = ("scale", "zero", "scale_mean", "scale_square", "zero_mean", "zero_square")


@dataclass(frozen=True, kw_only=True)
class PolishSchedule(TuningSchedule):
    """`rate` is the largest step of a scale, as a share of the median scale."""

    what = "polish"

    rate: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise InputError(f"rate = {self.rate} of polish is not allowed; give a share of a scale, such as 0.001")

    def rate_at(self, step: int) -> float:
        """Rate of a step, counted from 0."""
        return self.rate * min(1.0, (step + 1) / _WARM_STEPS) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True, eq=False)
class TunedGrid:
    """Codes of one matrix with float scales and zeros that are tuned, and Adam's moments of both.

    `fixed_codes` uint8 [groups, group_size], `state` float32 [groups] by the names of `_STATE`. It stands where
    `lmq.measurement.quantized_model.QuantizedPoint` takes a `Grid`.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    axis: int
    fixed_codes: Tensor
    state: dict[str, Tensor]

    @classmethod
    def of(cls, grid: EncodedMatrix, weight: Tensor) -> TunedGrid:
        """Where tuning starts: the grid as stored, and the codes of `weight` [out_features, in_features] on it.

        Raises InputError for a type of GGUF.
        """
        if isinstance(grid, GgufMatrix):
            raise InputError(f"polish tunes scales and zeros of lmq's own grids, not those of {grid.kind.name}")
        scale, zero = (values.clone() for values in grid.decode())
        state = {"scale": scale, "zero": zero} | {name: torch.zeros_like(scale) for name in _STATE[2:]}
        return cls(grid.spec, grid.shape, grid.axis, grid.codes(weight), state)

    def to(self, device: torch.device | str) -> TunedGrid:
        """The same on another device."""
        state = {name: values.to(device) for name, values in self.state.items()}
        return TunedGrid(self.spec, self.shape, self.axis, self.fixed_codes.to(device), state)

    def round_trip(self, weight: Tensor) -> Tensor:
        """The weight with these scales and zeros, float32 [out_features, in_features]."""
        steps = self.fixed_codes.float().sub_(self.state["zero"][:, None]).mul_(self.state["scale"][:, None])
        return from_groups(steps, self.shape, self.axis)

    def step(self, gradient: Tensor, number: int, rate: float, *, tune_zeros: bool) -> None:
        """One step of Adam, counted from 0, for a gradient by the weight [out_features, in_features].

        A step at most halves a scale. Zeros stay where a stored grid can have them.
        """
        scale, zero = self.state["scale"], self.state["zero"]
        by_group = to_groups(gradient, self.spec.group_size, self.axis)
        by_scale = (by_group * (self.fixed_codes - zero[:, None])).sum(1)
        by_zero = by_group.sum(1).mul_(-scale)
        moved = scale - rate * scale.median() * self._adam("scale", by_scale, number)
        self.state["scale"] = torch.where(scale > 0, torch.maximum(moved, scale / 2), scale)
        if tune_zeros:
            top = 2**self.spec.bits - 1
            moved = zero - rate * _ZERO_RATE * self._adam("zero", by_zero, number)
            self.state["zero"] = torch.where(scale > 0, moved.clamp(-top, 2 * top), zero)

    def _adam(self, name: str, gradient: Tensor, number: int) -> Tensor:
        """Adam's direction [groups]; its moments are updated."""
        mean, square = self.state[f"{name}_mean"], self.state[f"{name}_square"]
        first, second = _BETAS
        mean.mul_(first).add_(gradient, alpha=1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (square / (1 - second ** (number + 1))).sqrt_().clamp_min_(_TINY)
        return mean / (1 - first ** (number + 1)) / root

    def stored(self, *, integer_zeros: bool) -> CodedGrid:
        """Scales and zeros in 8 bits again, before the same codes."""
        scale, zero = self.state["scale"], self.state["zero"]
        return grid_of_codes(
            self.fixed_codes, scale, zero, self.spec, self.shape, self.axis, integer_zeros=integer_zeros
        )


class Polish:
    """Tunes the grids of an allocation step by step; their state is one file per layer in `folder`."""

    def __init__(self, model: StreamedModel, allocation: Allocation, folder: Path, schedule: PolishSchedule):
        self._model = model
        self._allocation = allocation
        self._folder = folder
        self._schedule = schedule

    def start(self, grids: Callable[[int], LayerGrids]) -> None:
        """Write the state that tuning starts from: the measured grids, of which the allocation's are taken."""
        for layer in range(self._model.structure.layers):
            with self._model.block(layer) as block:
                tuned = {}
                for module, by_spec in grids(layer).items():
                    weight = block.get_submodule(module.kind).get_parameter("weight").detach()
                    tuned[module] = TunedGrid.of(by_spec[self._allocation[module]].to(weight.device), weight)
            self._write(layer, tuned)

    def run(self, first: int, last: int, token_ids: Tensor, reference_states: Tensor) -> Iterator[float]:
        """Steps `first` to `last` - 1; gives the mean divergence that each began with, in nats per token.

        `token_ids` [sequences, sequence_length], `reference_states` those that leave the unquantized last block.
        Raises NotFiniteError naming the layer.
        """
        point = QuantizedPoint(self._model, self._tuned)
        for number in range(first, last):
            chosen = self._schedule.sequences_of(number, len(token_ids))
            rate = self._schedule.rate_at(number)
            divergences: list[float] = []
            for layer in point.divergence_gradients(
                token_ids[chosen], reference_states[chosen], self._allocation, divergences
            ):
                tuned = self._read(layer.number)
                for module, gradient in layer.gradients.items():
                    tuned[module].step(gradient, number, rate, tune_zeros=not self._schedule.integer_zeros)
                self._write(layer.number, tuned)
            yield divergences[0]

    def stored(self, layer: int) -> dict[ModuleId, dict[QuantSpec, Grid]]:
        """The tuned grids of a layer as they are stored, with their codes."""
        whole = self._schedule.integer_zeros
        return {module: {grid.spec: grid.stored(integer_zeros=whole)} for module, grid in self._read(layer).items()}

    def _tuned(self, layer: int) -> Mapping[ModuleId, Mapping[QuantSpec, TunedGrid]]:
        return {module: {grid.spec: grid} for module, grid in self._read(layer).items()}

    def _write(self, layer: int, tuned: Mapping[ModuleId, TunedGrid]) -> None:
        tensors: dict[str, Tensor] = {}
        entries = []
        for number, (module, grid) in enumerate(tuned.items()):
            layout = {"shape": grid.shape, "axis": grid.axis}
            entries.append({"module": asdict(module), "spec": asdict(grid.spec), **layout})
            packed = pack(grid.fixed_codes, grid.spec.bits)
            tensors |= {f"{number}.{name}": tensor.cpu() for name, tensor in {**grid.state, "codes": packed}.items()}
        save_file(tensors, self._folder / polish_file(layer), metadata={_METADATA_KEY: json.dumps(entries)})

    def _read(self, layer: int) -> dict[ModuleId, TunedGrid]:
        path, found = self._folder / polish_file(layer), {}
        try:
            with safe_open(path, "pt", device=str(self._model.device)) as file:
                for number, entry in enumerate(json.loads(file.metadata()[_METADATA_KEY])):
                    spec, (rows, columns) = QuantSpec(**entry["spec"]), entry["shape"]
                    state = {name: file.get_tensor(f"{number}.{name}") for name in _STATE}
                    codes = unpack(file.get_tensor(f"{number}.codes"), spec.bits).view(-1, spec.group_size)
                    grid = TunedGrid(spec, (rows, columns), entry["axis"], codes, state)
                    found[ModuleId(**entry["module"])] = grid
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DamagedFile(
                f"{path} is not a readable state of polish: {error}; remove it, it is made again"
            ) from error
        return found


def polish_file(layer: int) -> str:
    """Name of the file with the state of a layer."""
    return f"polish-{layer:03d}.safetensors"
