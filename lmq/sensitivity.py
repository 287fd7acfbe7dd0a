"""Activation sensitivity of the parts of a block, as the SensiBoost authors measure it (equation 10).

Hidden states enter the block from the unquantized model. The weights of one part are quantized, the part's
output is compared with the unquantized one, and the mean squared error is the score of every module of the
part. `attn_in` and `mlp_gate` (all projections into attention and MLP) are judged by the output of the whole
attention or MLP (of the whole block where they are no submodule of their own), `attn_out` and `mlp_down` by
their own. The authors' program leaves `attn_out` out where its
shape differs from the value projection (grouped-query attention); here it is always measured.

The block runs once for all configurations, and what enters and leaves its modules is kept. A part is then replayed on
changes alone: with an error E of its weight a module gives y + E x, and one behind it y + W (x' - x). Products of
changes may be taken in bfloat16: its rounding is relative to the change, not to the output that the change is lost in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import torch
from torch import Tensor, nn

from lmq.errors import NotFiniteError
from lmq.streaming import BlockInputs
from lmq.structure import ModuleInfo
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

Configuration = TypeVar("Configuration", bound=Hashable)
QuantizedWeight = Callable[[str], Tensor]
"""Makes the quantized weight [out_features, in_features] of a module kind, each time it is asked for."""

_TOKENS_AT_ONCE = 4096


def part_sensitivities(
    block: nn.Module,
    block_inputs: BlockInputs,
    hidden: Tensor,
    modules: Sequence[ModuleInfo],
    quantized: Mapping[str, Tensor],
) -> dict[str, float]:
    """Mean squared output error of every part of one block, by part.

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

    As `part_sensitivities`, with the block run once for all configurations. Products are taken in `dtype`; bfloat16
    changes the scores by up to 1e-3 (`lmq.fisher.fast_matmul_dtype` says where it is fast).
    """
    parts: dict[str, list[str]] = {}
    for module in modules:
        parts.setdefault(module.part, []).append(module.id.kind)
    replay = _Replay(block, block_inputs, parts, dtype)
    sums = {configuration: dict.fromkeys(parts, 0.0) for configuration in quantized}
    elements = dict.fromkeys(parts, 0)
    for sequences in hidden.split(max(1, _TOKENS_AT_ONCE // hidden.shape[1])):
        passes = [replay.record(sequence[None]) for sequence in sequences]
        for part, kinds in parts.items():
            for configuration, make in quantized.items():
                errors = {kind: replay.error(kind, make(kind)) for kind in kinds}
                sums[configuration][part] += sum(replay.squared_change(part, errors, seen) for seen in passes)
            elements[part] += sum(seen.outputs[part].numel() for seen in passes)
    for part in parts:
        for scores in sums.values():
            _require_finite(scores[part], part, modules[0].id.layer)
            scores[part] /= elements[part]
    return sums


def _require_finite(squared_error: float, part: str, layer: int) -> None:
    if not math.isfinite(squared_error):
        raise NotFiniteError(
            f"the output error of {part} in layer {layer} is {squared_error}: "
            "the states that enter the layer or its quantized weights are not finite; measure both again"
        )


@dataclass(frozen=True, eq=False)
class _Pass:
    """What entered and left modules (by kind) and judged submodules (by part) when the block ran on one sequence."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class _Replay:
    """Runs a block, and its parts again with changed weights; products are taken in `dtype`."""

    def __init__(
        self, block: nn.Module, block_inputs: BlockInputs, parts: Mapping[str, Sequence[str]], dtype: torch.dtype
    ):
        self._block = block
        self._block_inputs = block_inputs
        self._paths = {part: _judged_by(part, kinds) for part, kinds in parts.items()}
        self._modules = {kind: block.get_submodule(kind) for kinds in parts.values() for kind in kinds}
        self._weights = {kind: module.get_parameter("weight").to(dtype) for kind, module in self._modules.items()}

    def error(self, kind: str, quantized: Tensor) -> Tensor:
        """E = W' - W of a module."""
        return (quantized - self._modules[kind].get_parameter("weight")).to(self._weights[kind].dtype)

    def record(self, hidden: Tensor) -> _Pass:
        """Run the block on one sequence `hidden` [1, sequence_length, hidden]."""
        seen = _Pass()

        def run(kind: str, states: Tensor) -> Tensor:
            output = _product(states, self._weights[kind])
            bias = getattr(self._modules[kind], "bias", None)
            seen.inputs[kind], seen.modules[kind] = states, output if bias is None else output + bias
            return seen.modules[kind]

        def keep(part: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.calls[part], seen.outputs[part] = (args, kwargs), _tensor(output)

        handles = [
            self._block.get_submodule(path).register_forward_hook(
                lambda _, *call, part=part: keep(part, *call), with_kwargs=True
            )
            for part, path in self._paths.items()
        ]
        try:
            with self._forwards(self._modules, run):
                self._block_inputs.run(self._block, hidden)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def squared_change(self, part: str, errors: Mapping[str, Tensor], seen: _Pass) -> float:
        """Summed squared change of the output that a part is judged by, for weight errors E of its modules."""
        path = self._paths[part]
        if path in errors:
            change = _product(seen.inputs[path], errors[path])
            return change.square_().sum(dtype=torch.float64).item()

        def run(kind: str, states: Tensor) -> Tensor:
            output, before = seen.modules[kind], seen.inputs[kind]
            if states is not before:
                output = output + _product(states - before, self._weights[kind])
            return output + _product(states, errors[kind]) if kind in errors else output

        inside = [kind for kind in self._modules if not path or kind.startswith(f"{path}.")]
        args, kwargs = seen.calls[part]
        with self._forwards(inside, run):
            output = _tensor(self._block.get_submodule(path)(*args, **kwargs))
        return (output - seen.outputs[part]).square_().sum(dtype=torch.float64).item()

    @contextmanager
    def _forwards(self, kinds: Iterable[str], run: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        """Within, `run(kind, states)` takes the place of the modules' own forward."""
        for kind in kinds:
            self._modules[kind].forward = functools.partial(run, kind)
        try:
            yield
        finally:
            for kind in kinds:
                del self._modules[kind].forward


def _judged_by(part: str, kinds: Sequence[str]) -> str:
    """Path of the submodule whose output is compared: the module itself, or the sub-block it feeds ("": the block)."""
    if part in ("attn_out", "mlp_down"):
        return kinds[0]
    sub_blocks = {kind.rpartition(".")[0].partition(".")[0] for kind in kinds}
    return sub_blocks.pop() if len(sub_blocks) == 1 else ""


def _product(states: Tensor, weight: Tensor) -> Tensor:
    """States times a weight [out_features, in_features] in the weight's dtype; the result in that of the states."""
    return nn.functional.linear(states.to(weight.dtype), weight).to(states.dtype)


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
