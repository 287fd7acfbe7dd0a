"""Activation sensitivity of the parts of a block, as the SensiBoost authors measure it (equation 10).

Hidden states enter the block from the unquantized model. The weights of one part are quantized, the part's
output is compared with the unquantized one, and the mean squared error is the score of every module of the
part. `attn_in` and `mlp_gate` (all projections into attention and MLP) are judged by the output of the whole
attention or MLP (of the whole block where they are no submodule of their own), `attn_out` and `mlp_down` by
their own. The authors' program leaves `attn_out` out where its
shape differs from the value projection (grouped-query attention); here it is always measured.

The block runs once for all configurations, and every part again for each (`lmq.measurement.part_replay`). The error of
a module that is judged by its own output follows from the second moments of its inputs
(`lmq.measurement.second_moments`): where there are many configurations, these replace its replays.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

import pyarrow as pa
import torch
from torch import Tensor, nn

from lmq.errors import NotFiniteError
from lmq.formats import FORMATS, Format, rounding_format
from lmq.formats.coded_grid import EncodedMatrix
from lmq.formats.spec import QuantSpec
from lmq.measurement.base import LayerReplay, Need, Profile, Row
from lmq.measurement.part_replay import JUDGED_ALONE, ChangeReplay, PartReplay, Pass, judged_with
from lmq.measurement.pooling import FEWEST_TOKENS
from lmq.measurement.second_moments import row_errors, second_moments
from lmq.model.block_inputs import BlockInputs
from lmq.model.structure import PARTS, ModuleId, ModuleInfo, without_number
from lmq.numerics import fast_matmul_dtype
from lmq.tables import MODULE_FIELDS, SPEC_FIELDS, TableSchema

SENSITIVITY_SCHEMA = TableSchema(
    "sensitivity",
    1,
    pa.schema(
        [
            *MODULE_FIELDS,
            pa.field("part", pa.string(), nullable=False),
            *SPEC_FIELDS,
            pa.field("sensitivity", pa.float64()),
        ]
    ),
)

_log = logging.getLogger(__name__)

Configuration = TypeVar("Configuration", bound=Hashable)
QuantizedWeight = Callable[[str], Tensor]
"""Makes the quantized weight [out_features, in_features] of a module kind, each time it is asked for."""

_TOKENS_AT_ONCE = 8192

_LEAST_GAIN = 2
"""How many times fewer products second moments must need, which take a pass more over the inputs."""


def part_sensitivities(
    block: nn.Module,
    block_inputs: BlockInputs,
    hidden: Tensor,
    modules: Sequence[ModuleInfo],
    quantized: Mapping[str, Tensor],
) -> dict[str, float]:
    """Mean squared output error of every part of one block, by `lmq.measurement.part_replay.judged_with`.

    `hidden` [sequences, sequence_length, hidden] enters the block; `quantized` maps each module kind to its
    quantized weight [out_features, in_features]. The block is left as it was. Raises NotFiniteError naming
    part and layer.
    """
    return part_sensitivity_table(block, block_inputs, hidden, modules, {"": quantized.__getitem__})[""]


@torch.no_grad()
def part_sensitivity_table(
    block: nn.Module,
    block_inputs: BlockInputs,
    hidden: Tensor,
    modules: Sequence[ModuleInfo],
    quantized: Mapping[Configuration, QuantizedWeight],
    dtype: torch.dtype = torch.float32,
) -> dict[Configuration, dict[str, float]]:
    """Mean squared output error of every part of one block under every configuration.

    As `part_sensitivities`, with the block run once for all configurations. Every routed expert has its own two parts,
    judged by its output; those that saw few tokens (`lmq.measurement.pooling`) have the mean of all experts. Products
    are taken in `dtype`; bfloat16 changes the scores by up to 1e-3 (`lmq.numerics.fast_matmul_dtype` says where it is
    fast).
    """
    parts: dict[str, list[ModuleInfo]] = {}
    for module in modules:
        parts.setdefault(judged_with(module), []).append(module)
    _name_missing({module.part for module in modules}, modules[0].id.layer)
    replay = _replay(block, block_inputs, parts, dtype)
    sums = {configuration: dict.fromkeys(parts, 0.0) for configuration in quantized}
    elements = dict.fromkeys(parts, 0)
    for sequences in hidden.split(max(1, _tokens_at_once(dtype) // hidden.shape[1])):
        passes = [replay.record(sequence[None]) for sequence in sequences]
        for part, members in parts.items():
            called = [seen for seen in passes if part in seen.outputs]
            if not called:
                continue
            for configuration, squared_error in _squared_errors(replay, part, members, called, quantized):
                sums[configuration][part] += squared_error
            elements[part] += sum(seen.outputs[part].numel() for seen in called)
    for scores in sums.values():
        for part in parts:
            _require_finite(scores[part], part, modules[0].id.layer)
    tokens = {part: count // parts[part][-1].out_features for part, count in elements.items()}
    return {configuration: _means(scores, elements, tokens) for configuration, scores in sums.items()}


def _means(sums: Mapping[str, float], elements: Mapping[str, int], tokens: Mapping[str, int]) -> dict[str, float]:
    """Sums over elements; an expert of few tokens has that of all experts together."""
    means = {}
    for part in sums:
        own = [part]
        if tokens[part] < FEWEST_TOKENS and " " in part:
            own = [other for other in sums if without_number(other) == without_number(part)]
        means[part] = sum(sums[other] for other in own) / max(1, sum(elements[other] for other in own))
    return means


def _name_missing(parts: Iterable[str], layer: int) -> None:
    missing = [part for part in PARTS if part not in set(parts)]
    if missing:
        _log.warning("layer %d has no %s: it gets no sensitivity of that name", layer, " and no ".join(missing))


def _replay(
    block: nn.Module, block_inputs: BlockInputs, parts: Mapping[str, Sequence[ModuleInfo]], dtype: torch.dtype
) -> PartReplay:
    kinds = {part: [module.id.kind for module in members] for part, members in parts.items()}
    if dtype == torch.float32:
        return PartReplay(block, block_inputs, kinds)
    return ChangeReplay(block, block_inputs, kinds, dtype)


def _tokens_at_once(dtype: torch.dtype) -> int:
    """Changes are replayed from what every module took and gave, which is kept for all tokens: fewer at once."""
    return _TOKENS_AT_ONCE if dtype == torch.float32 else _TOKENS_AT_ONCE // 2


def _squared_errors(
    replay: PartReplay,
    part: str,
    members: Sequence[ModuleInfo],
    passes: Sequence[Pass],
    quantized: Mapping[Configuration, QuantizedWeight],
) -> Iterator[tuple[Configuration, float]]:
    """Summed squared output error of a part over all passes, for every configuration."""
    tokens = sum(seen.outputs[part].numel() // seen.outputs[part].shape[-1] for seen in passes)
    if _moments_pay(members, tokens, len(quantized)):
        (kind,) = (module.id.kind for module in members)
        moments = second_moments(torch.cat([seen.calls[part][0][0].flatten(0, -2) for seen in passes]))
        for configuration, make in quantized.items():
            by_row = row_errors(moments, make(kind) - replay.weight(kind))
            yield configuration, moments.tokens * by_row.sum().item()
        return
    for configuration, make in quantized.items():
        weights = {module.id.kind: replay.substitute(module.id.kind, make(module.id.kind)) for module in members}
        yield configuration, sum(replay.squared_change(part, weights, seen) for seen in passes)


def _moments_pay(members: Sequence[ModuleInfo], tokens: int, configurations: int) -> bool:
    """Whether a part that is judged by its one module is far cheaper by H: counted in products."""
    if members[0].part not in JUDGED_ALONE or len(members) > 1:
        return False
    out_features, in_features = members[0].out_features, members[0].in_features
    replayed = configurations * tokens * out_features * in_features
    by_moments = (tokens + configurations * out_features) * in_features**2 / 2
    return replayed > _LEAST_GAIN * by_moments


def _require_finite(squared_error: float, part: str, layer: int) -> None:
    if not math.isfinite(squared_error):
        raise NotFiniteError(
            f"the output error of {part} in layer {layer} is {squared_error}: "
            "the states that enter the layer or its quantized weights are not finite; measure both again"
        )


def measure_sensitivity(layer: LayerReplay) -> Iterator[Row]:
    """Activation sensitivity of one layer's parts at one configuration.

    Weights are rounded to the grids, or, where `quantizer` names a format of `lmq.formats`, to that format in groups of
    the configuration's size. Products are taken in bfloat16 where the processor is fast at it.
    """
    spec = QuantSpec.parse(layer.settings["spec"])
    rounded_to = _rounded_to(layer, spec)
    quantized = {module.id.kind: rounded_to[module.id].round_trip(layer.weight(module)) for module in layer.modules}
    by_kind = {"": quantized.__getitem__}
    dtype = fast_matmul_dtype(layer.device)
    scores = part_sensitivity_table(layer.block, layer.block_inputs, layer.hidden, layer.modules, by_kind, dtype)[""]
    for module in layer.modules:
        yield {**asdict(module.id), "part": module.part, **asdict(spec), "sensitivity": scores[judged_with(module)]}


def _rounded_to(layer: LayerReplay, spec: QuantSpec) -> dict[ModuleId, EncodedMatrix | Format]:
    if (name := layer.settings.get("quantizer", "")) in FORMATS:
        return {module.id: rounding_format(name, group_size=spec.group_size) for module in layer.modules}
    return {module.id: layer.grid(module, spec) for module in layer.modules}


SENSITIVITY = Profile(
    name="sensitivity",
    title="Activation sensitivity",
    schema=SENSITIVITY_SCHEMA,
    needs=frozenset({Need.GRIDS, Need.STATES}),
    settings=("spec",),
    version=5,
    measure=measure_sensitivity,
    meaning="Mean squared change of the output of a part when its weights are quantized; "
    "modules measured together share it.",
    difference="divide",
)
