"""Mixtures of experts, of which every expert's matrix is a layer of its own: `mlp.experts.3.gate_up_proj`.

transformers keeps the routed experts of a block in two parameters, `gate_up_proj` [experts, 2 · inner, hidden] and
`down_proj` [experts, hidden, inner] (gpt-oss: transposed), and describes how they are computed with by the attributes
that its `use_experts_implementation` gives them. `split_experts` puts `RoutedExperts` in their place, one more
implementation of that description. A matrix of an expert is then a matrix like any other, but for two things: it is a
slice of what is stored, and it sees the tokens alone that are routed to it.

Gate and up stay one matrix, as transformers has them: they share their inputs, and engines fuse them anyway. Biases
stay in one parameter for all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmq.errors import UnsupportedModel
from lmq.numerics import OneDnnProducts

_DESCRIPTION = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
"""What `transformers.integrations.moe.use_experts_implementation` says of a module of fused experts."""


@dataclass(frozen=True)
class Slice:
    """A matrix of one of `experts` in the model that transformers has: `fused[number]`, perhaps transposed."""

    fused: str
    number: int
    experts: int
    transposed: bool

    def of(self, parameter: Tensor) -> Tensor:
        """The matrix [out_features, in_features] in the fused parameter."""
        matrix = parameter[self.number]
        return matrix.t().contiguous() if self.transposed else matrix


class Expert(nn.Module):
    """One expert: `down_proj(activation(gate_up_proj(states)))`; without a gate the first matrix is `up_proj`."""

    _fused: Any

    def __init__(self, fused: Any, first: str, shapes: dict[str, tuple[int, int]]):
        super().__init__()
        self.first = first
        for name, (out_features, in_features) in shapes.items():
            self.add_module(name, nn.Linear(in_features, out_features, bias=False, device="meta"))
        # not as a submodule: it holds no tensors any more, only what its class computes between the matrices
        object.__setattr__(self, "_fused", fused)

    def forward(
        self,
        states: Tensor,
        first_bias: Tensor | None = None,
        last_bias: Tensor | None = None,
        *,
        unwatched: bool = False,
    ) -> Tensor:
        """Outputs [tokens, hidden] of `states` [tokens, hidden], before they are weighted by the router.

        `unwatched` passes the hooks of the two matrices by.
        """
        first, last = self.get_submodule(self.first), self.get_submodule("down_proj")
        inside = first.forward(states) if unwatched else first(states)
        if first_bias is not None:
            inside = inside + first_bias
        inside = self._fused._apply_gate(inside) if self._fused.has_gate else self._fused.act_fn(inside)
        outputs: Tensor = last.forward(inside) if unwatched else last(inside)
        return outputs if last_bias is None else outputs + last_bias


class RoutedExperts(nn.Module):
    """The routed experts of a block, by their numbers; only those that a token is routed to are run."""

    def __init__(self, fused: Any, path: str):
        super().__init__()
        self.num_experts: int = fused.num_experts
        self.first = "gate_up_proj" if fused.has_gate else "up_proj"
        self.transposed: bool = fused.is_transposed
        shapes = {name: _shape_of(fused, name, path) for name in (self.first, "down_proj")}
        hidden, inner = shapes["down_proj"]
        expected = (inner * (2 if fused.has_gate else 1), hidden)
        if shapes[self.first] != expected:
            raise UnsupportedModel(
                f"{path}.{self.first} holds matrices {list(shapes[self.first])} where those of down_proj, "
                f"{[hidden, inner]}, mean {list(expected)}; lmq does not know this layout of experts"
            )
        biases = {name: parameter for name, parameter in fused.named_parameters() if parameter.ndim == 2}
        self.matrices = tuple(shapes)
        unknown = [name for name, _ in fused.named_parameters() if name not in {*shapes, *biases}]
        if unknown or fused.has_post_expert_norm or fused.has_bias != bool(biases):
            raise UnsupportedModel(
                f"{path} ({type(fused).__name__}) has {unknown[0] if unknown else 'biases or a norm'} beside "
                f"{self.first} and down_proj and their biases; lmq does not know this layout of experts"
            )
        for name, bias in biases.items():
            self.register_parameter(name, bias)
        for name in shapes:
            delattr(fused, name)
        for name in biases:
            delattr(fused, name)
        for number in range(self.num_experts):
            self.add_module(str(number), Expert(fused, self.first, shapes))
        self.read: Callable[[int], Mapping[str, Tensor]] | None = None
        """Reads the weights of an expert that has none, by its own names; they are let go after every use."""
        self.every_token = False
        """Whether experts see all tokens, of which only what is routed to them counts: see `every_token`."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the experts' outputs [tokens, hidden], weighted by `top_k_weights` [tokens, k].

        `top_k_index` [tokens, k] are the experts of every token. On the meta device, where there is no routing, every
        expert sees every token.
        """
        if hidden_states.is_meta:
            return torch.stack([self.run(number, hidden_states) for number in range(self.num_experts)]).sum(0)
        again = self.read is not None or self.every_token
        if again and torch.is_grad_enabled() and hidden_states.requires_grad:
            summed: Tensor = _OneAtATime.apply(hidden_states, top_k_weights, top_k_index, self)
            return summed
        return self.summed(hidden_states, top_k_index, top_k_weights)

    def summed(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, unwatched: bool = False
    ) -> Tensor:
        """What `forward` gives; `unwatched` passes the hooks of the matrices by."""
        summed = torch.zeros_like(hidden_states)
        for number, rows in self.routed(top_k_index):
            tokens = rows // top_k_index.shape[1]
            with self.in_memory(number):
                if self.every_token and not unwatched:
                    outputs = self.run(number, hidden_states)[tokens]
                else:
                    outputs = self.run(number, hidden_states[tokens], unwatched=unwatched)
            outputs = outputs * top_k_weights.flatten()[rows, None]
            summed.index_add_(0, tokens, outputs.to(summed.dtype))
        return summed

    def routed(self, top_k_index: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Every expert that sees tokens, and its places in the flattened `top_k_index` [tokens, k], in order."""
        experts = top_k_index.flatten()
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=self.num_experts).tolist()
        first = 0
        for number, count in enumerate(counts[: self.num_experts]):
            if count or self.every_token:
                yield number, order[first : first + count]
            first += count

    @contextmanager
    def in_memory(self, number: int) -> Iterator[None]:
        """An expert with its weights, read where they are not there and let go afterwards."""
        expert = self.get_submodule(str(number))
        bare = expert.state_dict()
        if self.read is None or not any(tensor.is_meta for tensor in bare.values()):
            yield
            return
        expert.load_state_dict(self.read(number), assign=True)
        try:
            yield
        finally:
            expert.load_state_dict(bare, assign=True)

    def run(self, number: int, states: Tensor, *, unwatched: bool = False) -> Tensor:
        """Outputs [tokens, hidden] of one expert, which is in memory, before they are weighted by the router."""
        biases = (self._parameters.get(f"{name}_bias") for name in (self.first, "down_proj"))
        of_expert = [None if bias is None else bias[number] for bias in biases]
        outputs: Tensor = self.get_submodule(str(number))(states, *of_expert, unwatched=unwatched)
        return outputs

    def joined(self) -> nn.Module:
        """transformers' own module with the experts' weights, which takes them over."""
        fused: Any = next(module for module in self.modules() if isinstance(module, Expert))._fused
        for name in self.matrices:
            linear = [self.get_submodule(f"{number}.{name}") for number in range(self.num_experts)]
            stacked = torch.stack([module.get_parameter("weight").detach() for module in linear])
            fused.register_parameter(name, nn.Parameter(stacked.mT.contiguous() if self.transposed else stacked, False))
        for name, bias in self._parameters.items():
            fused.register_parameter(name, bias)
        made: nn.Module = fused.train(self.training)
        return made

    def slices(self, path: str) -> Iterator[tuple[str, Slice]]:
        """Every expert's weights by their names in a model where this module is at `path`, and where they come from."""
        for number in range(self.num_experts):
            for name in self.matrices:
                yield (
                    f"{path}.{number}.{name}.weight",
                    Slice(f"{path}.{name}", number, self.num_experts, self.transposed),
                )


class _OneAtATime(torch.autograd.Function):
    """The sum of `RoutedExperts`, of which one expert is in memory at a time, forward as well as back.

    Each is computed again on the way back, where hooks of its matrices see it as they otherwise do on the way forward.
    Where experts see every token, the gradient at the outputs for a token that is not routed to an expert is the one at
    the sum times the mean weight of the experts that it is routed to; it goes no further back.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weights: Tensor, index: Tensor, experts: RoutedExperts) -> Tensor:
        ctx.save_for_backward(states, weights, index)
        ctx.experts = experts
        return experts.summed(states, index, weights, unwatched=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        states, weights, index = ctx.saved_tensors
        of_states, of_weights = torch.zeros_like(states), torch.zeros_like(weights)
        every_token = ctx.experts.every_token
        entering = states.detach().requires_grad_(True)  # one tensor for all experts, which tracing keeps once
        for number, rows in ctx.experts.routed(index):
            tokens = rows // index.shape[1]
            of_router = weights.flatten()[rows, None]
            if every_token:
                leaving = gradient * weights.mean(1, keepdim=True)
                leaving[tokens] = gradient[tokens] * of_router
            else:
                entering, leaving = states[tokens].detach().requires_grad_(True), gradient[tokens] * of_router
            with ctx.experts.in_memory(number), torch.enable_grad(), OneDnnProducts():
                outputs = ctx.experts.run(number, entering)
                (at_entering,) = torch.autograd.grad(outputs, entering, leaving.to(outputs.dtype))
            routed = tokens if every_token else slice(None)
            of_states.index_add_(0, tokens, at_entering[routed])
            of_weights.view(-1)[rows] = (outputs.detach()[routed] * gradient[tokens]).sum(-1).to(of_weights.dtype)
        return of_states, of_weights, None, None


def split_experts(model: nn.Module, only: Container[str] | None = None) -> dict[str, Slice]:
    """Put `RoutedExperts` without weights in the place of a model's fused experts, in place.

    `only` are the paths of those that are wanted, None for all. Gives every expert's weights, by their new names.
    Raises UnsupportedModel for experts of another layout.
    """
    found = [
        (path, module) for path, module in model.named_modules() if _is_fused(module) and (only is None or path in only)
    ]
    slices: dict[str, Slice] = {}
    for path, module in found:
        split = RoutedExperts(module, path).train(module.training)
        split.requires_grad_(False)
        model.set_submodule(path, split)
        slices.update(split.slices(path))
    return slices


@contextmanager
def every_token(block: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within it, if `wanted`, every expert of a block sees every token; what the block computes stays the same.

    Hooks of the experts' matrices then see all tokens, where rare experts would have too few to choose codes by.
    """
    experts = [module for module in block.modules() if isinstance(module, RoutedExperts)]
    for module in experts:
        module.every_token = wanted
    try:
        yield
    finally:
        for module in experts:
            module.every_token = False


def join_experts(model: nn.Module) -> None:
    """Put transformers' own modules with dense weights back in the place of a model's `RoutedExperts`, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, RoutedExperts):
            model.set_submodule(path, module.joined())


def is_router(block: nn.Module, path: str) -> bool:
    """Whether an nn.Linear of a block weighs its experts: it lies beside them, and has an output for each, or one."""
    owner = block.get_submodule(path.rpartition(".")[0])
    experts = [module for module in owner.children() if isinstance(module, RoutedExperts)]
    outputs = len(block.get_submodule(path).get_parameter("weight"))
    return any(outputs in (1, module.num_experts) for module in experts)


def _is_fused(module: nn.Module) -> bool:
    parameter = getattr(module, "down_proj", None)
    return all(hasattr(module, name) for name in _DESCRIPTION) and isinstance(parameter, Tensor) and parameter.ndim == 3


def _shape_of(fused: Any, name: str, path: str) -> tuple[int, int]:
    """out_features and in_features of the experts' matrices in one fused parameter."""
    parameter = getattr(fused, name, None)
    if not isinstance(parameter, Tensor) or parameter.ndim != 3 or len(parameter) != fused.num_experts:
        found = list(parameter.shape) if isinstance(parameter, Tensor) else "nothing"
        raise UnsupportedModel(
            f"{path}.{name} is {found} where a matrix for each of {fused.num_experts} experts was expected, "
            "[experts, out_features, in_features]; lmq does not know this layout of experts"
        )
    rows, columns = parameter.shape[1:]
    return (columns, rows) if fused.is_transposed else (rows, columns)
