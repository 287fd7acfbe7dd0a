"""A block run once, and its parts again with other weights: the replays of activation sensitivity.

In float32 a part is run with its quantized weights as they are. The rounding of bfloat16 would drown small changes,
so there a part is replayed on changes alone: with an error E of its weight a module gives y + E x, and one behind it
y + W (x' - x), of which only the products are taken in bfloat16. Its rounding is then relative to the change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lmq.measurement.copies import Copies
from lmq.model.block_inputs import BlockInputs, copied
from lmq.model.structure import ModuleInfo, expert_number
from lmq.numerics import OneDnnProducts, linear

JUDGED_ALONE = ("attn_out", "mlp_down")
"""Parts judged by the output of their one module."""


def judged_with(module: ModuleInfo) -> str:
    """What a module is judged with: the modules of its part, of which every routed expert has its own.

    `mlp_gate`, or `mlp_gate mlp.experts.3`, which is judged by the output of that expert.
    """
    expert = module.id.kind.rpartition(".")[0]
    return module.part if expert_number(module.id.kind) is None else f"{module.part} {expert}"


def is_judged_alone(part: str) -> bool:
    """Whether a part, as `judged_with` names it, is judged by the output of its one module."""
    return part.partition(" ")[0] in JUDGED_ALONE


@dataclass(frozen=True, eq=False)
class Pass:
    """What a replay kept when the block ran on one sequence: of modules by kind, of judged submodules by part.

    All are copies: a block may change what it gave and took in place (Falcon adds attention to the MLP's output).
    Experts that no token was routed to are in none of them.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class PartReplay:
    """Runs a block, and its parts again with quantized weights, in the block's own dtype."""

    def __init__(self, block: nn.Module, block_inputs: BlockInputs, parts: Mapping[str, Sequence[str]]):
        self.paths = {part: _judged_by(part, kinds) for part, kinds in parts.items()}
        self._block = block
        self._block_inputs = block_inputs
        self._modules = {kind: block.get_submodule(kind) for kinds in parts.values() for kind in kinds}

    def weight(self, kind: str) -> Tensor:
        """Unquantized weight of a module [out_features, in_features]."""
        return self._modules[kind].get_parameter("weight")

    def substitute(self, kind: str, quantized: Tensor) -> Tensor:
        """What `squared_change` takes for a quantized weight."""
        return quantized.to(self.weight(kind).dtype)

    def record(self, hidden: Tensor) -> Pass:
        """Run the block on one sequence `hidden` [1, sequence_length, hidden]."""
        seen, copies = Pass(), Copies()

        def keep_call(part: str, *call: Any) -> None:
            seen.calls[part] = copied(call, copies)

        def keep_output(part: str, output: Any) -> None:
            seen.outputs[part] = _tensor(output).clone()

        with ExitStack() as hooks, self._forwards(self._modules, functools.partial(self._run_and_keep, seen, copies)):
            for part, path in self.paths.items():
                judged = self._block.get_submodule(path)
                before = judged.register_forward_pre_hook(
                    lambda _, *call, part=part: keep_call(part, *call), with_kwargs=True
                )
                after = judged.register_forward_hook(lambda _, __, output, part=part: keep_output(part, output))
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            self._block_inputs.run(self._block, hidden)
        return seen

    def squared_change(self, part: str, substitutes: Mapping[str, Tensor], seen: Pass) -> float:
        """Summed squared change of the output that a part is judged by, when its modules have other weights."""
        path = self.paths[part]
        inside = [kind for kind in self._modules if not path or path == kind or kind.startswith(f"{path}.")]
        args, kwargs = copied(seen.calls[part])
        with self._forwards(inside, functools.partial(self._run_changed, seen, substitutes)), OneDnnProducts():
            output = _tensor(self._block.get_submodule(path)(*args, **kwargs))
        return (output - seen.outputs[part]).square_().sum(dtype=torch.float64).item()

    def _run_and_keep(self, seen: Pass, copies: Copies, kind: str, states: Tensor) -> Tensor:
        return linear(states, self.weight(kind), self._bias(kind))

    def _run_changed(self, seen: Pass, substitutes: Mapping[str, Tensor], kind: str, states: Tensor) -> Tensor:
        return linear(states, substitutes.get(kind, self.weight(kind)), self._bias(kind))

    def _bias(self, kind: str) -> Tensor | None:
        return getattr(self._modules[kind], "bias", None)

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


class ChangeReplay(PartReplay):
    """Replays changes alone, with products in `dtype`; keeps what enters and leaves every module."""

    def __init__(
        self, block: nn.Module, block_inputs: BlockInputs, parts: Mapping[str, Sequence[str]], dtype: torch.dtype
    ):
        super().__init__(block, block_inputs, parts)
        self._weights = {kind: self.weight(kind).to(dtype) for kind in self._modules}

    def substitute(self, kind: str, quantized: Tensor) -> Tensor:
        """E = W' - W of a module."""
        return (quantized - self.weight(kind)).to(self._weights[kind].dtype)

    def squared_change(self, part: str, substitutes: Mapping[str, Tensor], seen: Pass) -> float:
        """As in `PartReplay`."""
        path = self.paths[part]
        if path not in substitutes:
            return super().squared_change(part, substitutes, seen)
        return _product(seen.inputs[path], substitutes[path]).square_().sum(dtype=torch.float64).item()

    def _run_and_keep(self, seen: Pass, copies: Copies, kind: str, states: Tensor) -> Tensor:
        output, bias = _product(states, self._weights[kind]), self._bias(kind)
        seen.inputs[kind], seen.modules[kind] = copies(states), output if bias is None else output + bias
        return seen.modules[kind].clone()

    def _run_changed(self, seen: Pass, substitutes: Mapping[str, Tensor], kind: str, states: Tensor) -> Tensor:
        before = seen.inputs.get(kind)
        if before is None or states.shape != before.shape:  # an expert that other tokens are routed to now
            bias = self._bias(kind)
            weight = self._weights[kind] + substitutes.get(kind, torch.zeros_like(self._weights[kind]))
            return _product(states, weight) if bias is None else _product(states, weight) + bias
        output = seen.modules[kind].clone()
        if not torch.equal(states, before):
            output += _product(states - before, self._weights[kind])
        if kind in substitutes:
            output += _product(states, substitutes[kind])
        return output


def _judged_by(part: str, kinds: Sequence[str]) -> str:
    """Path of the submodule whose output is compared: the module itself, or the sub-block it feeds ("": the block)."""
    if is_judged_alone(part):
        return kinds[0]
    if expert := part.partition(" ")[2]:
        return expert
    sub_blocks = {kind.rpartition(".")[0].partition(".")[0] for kind in kinds}
    return sub_blocks.pop() if len(sub_blocks) == 1 else ""


def _product(states: Tensor, weight: Tensor) -> Tensor:
    """States times a weight [out_features, in_features] in the weight's dtype; the result in that of the states."""
    return nn.functional.linear(states.to(weight.dtype), weight).to(states.dtype)


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
