"""What every measurement is made of: its value in the registry, its table, and the layer it works on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor, nn

from lmq.errors import LmqError
from lmq.formats.coded_grid import EncodedMatrix
from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import LayerGrids
from lmq.measurement.pooling import pooled_traces
from lmq.measurement.traces import ModuleTrace, trace_modules
from lmq.measurement.upper_triangle import UpperTriangle
from lmq.model.block_inputs import BlockInputs
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure, ModuleInfo
from lmq.numerics import fast_products
from lmq.tables import MODULE_FIELDS, SPEC_FIELDS, TableSchema

Row = dict[str, Any]


class Need(Enum):
    """What a measurement works on beside the weights of the layer, by its name among the inputs of a stage."""

    GRIDS = "grids"
    """Grids of every configuration of the menu."""
    STATES = "hidden"
    """States that enter the layer, float32 [sequences, sequence_length, hidden]."""
    LEAVING_STATES = "leaving"
    """States that leave the layer."""
    LAST_STATES = "last"
    """States that leave the last layer."""
    TOKENS = "tokens"
    """The calibration tokens."""
    TEXT_GRADIENTS = "text_gradients"
    """Gradient of the loss of the text at the states that leave the layer, like them in shape."""
    DRAWN_GRADIENTS = "drawn_gradients"
    """The same for labels that the model draws: [draws · sequences, sequence_length, hidden], sequences fastest."""
    MOMENTS = "moments"
    """Second moments of every module's inputs, weighted by these gradients, by kind."""

    @property
    def on_text(self) -> bool:
        """Whether it is captured from the calibration text."""
        return self is not Need.GRIDS


class LayerReplay:
    """One decoder layer with what was captured around it: what everything measured layer by layer works on.

    Each input is read when it is first asked for; the block is loaded then, and released on leaving the context.
    `settings` are those of the measurement, such as the names of the menu's configurations.
    """

    def __init__(
        self,
        structure: ModelStructure,
        layer: int,
        *,
        device: torch.device,
        settings: Mapping[str, Any],
        open_model: Callable[[], StreamedModel],
        read_weights: Callable[[], Mapping[str, Tensor]],
        inputs: Mapping[Need, Callable[[], Any]],
    ):
        self.structure = structure
        self.layer = layer
        self.device = device
        self.settings = settings
        self._open_model = open_model
        self._read_weights = read_weights
        self._inputs = inputs
        self._read: dict[Need, Any] = {}
        self._opened = ExitStack()

    def __enter__(self) -> LayerReplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def has(self, need: Need) -> bool:
        """Whether this input was given."""
        return need in self._inputs

    def _input(self, need: Need) -> Any:
        if need not in self._inputs:
            raise LmqError(f"layer {self.layer} was given no {need.value}; name Need.{need.name} in what is needed")
        if need not in self._read:
            self._read[need] = self._inputs[need]()
        return self._read[need]

    @property
    def hidden(self) -> Tensor:
        """States that enter the layer, float32 [sequences, sequence_length, hidden]."""
        return self._input(Need.STATES)

    @property
    def leaving(self) -> Tensor:
        """States that leave the layer, in the shape of `hidden`."""
        return self._input(Need.LEAVING_STATES)

    @property
    def last(self) -> Tensor:
        """States that leave the last layer, in the shape of `hidden`."""
        return self._input(Need.LAST_STATES)

    @property
    def gradient(self) -> Tensor:
        """Loss gradient at the states that leave the layer: of the text, or of every draw of labels."""
        drawn = self.has(Need.DRAWN_GRADIENTS)
        return self._input(Need.DRAWN_GRADIENTS if drawn else Need.TEXT_GRADIENTS)

    @property
    def moments(self) -> Mapping[str, UpperTriangle]:
        """Fisher-weighted second moments of the modules' inputs, by kind, in nats per token."""
        return self._input(Need.MOMENTS)

    @property
    def grids(self) -> LayerGrids:
        """Grids of the layer's modules by configuration."""
        return self._input(Need.GRIDS)

    @cached_property
    def modules(self) -> tuple[ModuleInfo, ...]:
        """Modules of the layer, in model order."""
        return self.structure.in_layer(self.layer)

    @cached_property
    def menu(self) -> tuple[QuantSpec, ...]:
        """Configurations to measure."""
        return tuple(QuantSpec.parse(name) for name in self.settings["menu"])

    @cached_property
    def model(self) -> StreamedModel:
        """The model of the layer."""
        return self._open_model()

    @cached_property
    def block(self) -> nn.Module:
        """The layer's block with its weights."""
        return self._opened.enter_context(self.model.block(self.layer))

    @cached_property
    def block_inputs(self) -> BlockInputs:
        """What the block is called with beside the states."""
        return self.model.block_inputs(self.hidden.shape[1])[self.layer]

    def stored_weights(self) -> Mapping[str, Tensor]:
        """Weights of all modules as stored, kind → float32 [out_features, in_features]; no block is built."""
        return self._read_weights()

    def weight(self, module: ModuleInfo) -> Tensor:
        """Weight of a module in the block, [out_features, in_features]."""
        return self.block.get_submodule(module.id.kind).get_parameter("weight").detach()

    def grid(self, module: ModuleInfo, spec: QuantSpec) -> EncodedMatrix:
        """Grid of a module at a configuration, on the layer's device."""
        return self.grids[module.id][spec].to(self.device)

    def errors(
        self, module: ModuleInfo, specs: Sequence[QuantSpec] | None = None
    ) -> Iterator[tuple[QuantSpec, Tensor]]:
        """Weight error E = Ŵ − W [out_features, in_features] of a module, at one configuration after the other.

        `specs` None: at those of the menu.
        """
        weight = self.weight(module)
        for spec in self.menu if specs is None else specs:
            yield spec, self.grid(module, spec).round_trip(weight) - weight

    def traces(self, dtype: torch.dtype, *, fast_block: bool = False) -> Iterator[tuple[ModuleInfo, ModuleTrace]]:
        """What went through every module, kept in `dtype`; those that were handed out are not held any more.

        Experts that few tokens were routed to have a share of those of the others (`lmq.measurement.pooling`).
        `fast_block` runs the block itself in the faster type where there is one (`lmq.numerics.fast_products`).
        """
        kinds = [module.id.kind for module in self.modules]
        with fast_products(self.device, None if fast_block else torch.float32):
            traces = trace_modules(self.block, self.block_inputs, self.hidden, self.gradient, kinds, dtype)
        traces = pooled_traces(traces)
        for module in self.modules:
            yield module, traces.pop(module.id.kind)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One thing that can be measured of a model: from it follow its table, stage, choice, columns and titles.

    name: in `measure.also`, in the needs of strategies and in file names. `needs` are the inputs of the stage, and
    `settings` the values of the configuration that it is told: `menu`, `spec`, `specs`, `sequences`. Raise `version`
    when the same inputs would give another table. `measure` gives the rows of one layer's table, `tensors` what other
    stages take from it beside the table. Without `measure` the measurement has a stage of its own.
    """

    name: str
    title: str
    schema: TableSchema
    needs: frozenset[Need] = frozenset()
    settings: tuple[str, ...] = ()
    version: int = 1
    measure: Callable[[LayerReplay], Iterable[Row]] | None = None
    tensors: Callable[[LayerReplay], dict[str, Tensor]] | None = None

    @property
    def stage(self) -> str:
        """Name of the stage that measures it."""
        return self.name.replace("_", "-")

    @property
    def file(self) -> str:
        """File of its table in the stage's artifact."""
        return f"{self.stage}.parquet"

    @property
    def on_text(self) -> bool:
        """Whether it is measured on calibration text."""
        return any(need.on_text for need in self.needs)


@dataclass(frozen=True, kw_only=True)
class CostColumn:
    """A cost of a module under a configuration, lower being better: a column of a cost table, and how reports name it.

    `name` tells it from the costs of all other measurements. Reports show `title` and `meaning`, a sentence with the
    unit; studies of costs show `label`, and the square of a cost that is a norm (`squared`), which adds up.
    """

    name: str
    column: str
    label: str
    title: str
    meaning: str
    squared: bool = False

    def studied(self, row: Mapping[str, Any]) -> float | None:
        """The number that studies compare, from a row of its table; None where it was not measured."""
        value = row[self.column]
        return value**2 if self.squared and value is not None else value


@dataclass(frozen=True, kw_only=True)
class Cost(Measurement):
    """What every module loses under every configuration: a table of modules × configurations, in one or more columns.

    The first column is the one that strategies allocate by.
    """

    columns: tuple[CostColumn, ...]


@dataclass(frozen=True, kw_only=True)
class Profile(Measurement):
    """One number per module, in the column `name` of its table; `difference` is how its jumps are looked for.

    `meaning` is a sentence for reports.
    """

    meaning: str
    difference: Literal["subtract", "divide"]


def cost_schema(name: str, version: int, *columns: pa.Field) -> TableSchema:
    """Schema of a cost table: module, configuration, size, and the measurement's own columns."""
    size = (pa.field("parameters", pa.int64(), nullable=False), pa.field("size_bytes", pa.int64(), nullable=False))
    return TableSchema(name, version, pa.schema([*MODULE_FIELDS, *SPEC_FIELDS, *size, *columns]))


def cost_row(module: ModuleInfo, spec: QuantSpec, **columns: Any) -> Row:
    """Row of a cost table for a module at a configuration."""
    size_bytes = spec.size_bytes(module.parameters, module.in_features)
    return {**asdict(module.id), **asdict(spec), "parameters": module.parameters, "size_bytes": size_bytes, **columns}
