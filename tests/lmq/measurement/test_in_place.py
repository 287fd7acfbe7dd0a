"""Blocks that change what modules take and give in place, against twins that do not: all measurements must agree."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lmq.formats.groups import encode
from lmq.formats.packed_product import PackedWeight, packed_linear
from lmq.formats.packing import pack
from lmq.formats.spec import QuantSpec
from lmq.measurement.activation import part_sensitivity_table
from lmq.measurement.replay import backward_block, forward_block
from lmq.measurement.second_moments import capture_second_moments
from lmq.measurement.super_weights import capture_spikes
from lmq.measurement.traces import trace_modules
from lmq.model.block_inputs import BlockInputs
from lmq.model.structure import ModuleId, ModuleInfo
from lmq.numerics import OneDnnProducts
from lmq.quantizers import quantizer

HIDDEN, SEQUENCES, LENGTH = 32, 3, 7


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 64)
        self.up = nn.Linear(HIDDEN, 64, bias=False)
        self.down = nn.Linear(64, HIDDEN)


class _AddsIntoMlp(nn.Module):
    """As Falcon: attention is added into the output of the MLP."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place, self.mlp, self.attention = in_place, _Mlp(), nn.Module()
        self.attention.value = nn.Linear(HIDDEN, HIDDEN)
        self.attention.out = nn.Linear(HIDDEN, HIDDEN)
        self.mlp.forward = self._mlp  # type: ignore[method-assign]
        self.attention.forward = lambda states: self.attention.out(self.attention.value(states).cumsum(1))

    def _mlp(self, states: Tensor) -> Tensor:
        found: Tensor = self.mlp.down(torch.tanh(self.mlp.gate(states)) * self.mlp.up(states))
        return found

    def forward(self, states: Tensor) -> Tensor:
        attended, found = self.attention(states), self.mlp(states)
        found = found.add_(attended) if self.in_place else found + attended
        return found.add_(states) if self.in_place else found + states


class _ClampsAndActivates(_AddsIntoMlp):
    """As OLMo clips values, and as a network with activations in place: the output of a product is changed."""

    def _mlp(self, states: Tensor) -> Tensor:
        gate, up = self.mlp.gate(states), self.mlp.up(states)
        if self.in_place:
            gate.relu_()
            up.clamp_(-0.3, 0.3).mul_(gate)
        else:
            up = up.clamp(-0.3, 0.3) * gate.relu()
        found: Tensor = self.mlp.down(up)
        return found


class _ChangesInputs(_AddsIntoMlp):
    """One tensor enters two modules and is scaled in between; the states that enter the block are changed as well."""

    def forward(self, states: Tensor) -> Tensor:
        states = states.mul_(1.5) if self.in_place else states * 1.5
        return super().forward(states)

    def _mlp(self, states: Tensor) -> Tensor:
        normed = states * 0.5
        gate = self.mlp.gate(normed)
        normed = normed.mul_(-2) if self.in_place else normed * -2
        found: Tensor = self.mlp.down(gate * self.mlp.up(normed))
        return found


class _ChangesViews(_AddsIntoMlp):
    """Half of an output is changed through its view."""

    def _mlp(self, states: Tensor) -> Tensor:
        gate = self.mlp.gate(states)
        if self.in_place:
            gate[..., :HIDDEN].sigmoid_()
        else:
            gate = torch.cat([gate[..., :HIDDEN].sigmoid(), gate[..., HIDDEN:]], dim=-1)
        found: Tensor = self.mlp.down(gate * self.mlp.up(states))
        return found


BLOCKS = [_AddsIntoMlp, _ClampsAndActivates, _ChangesInputs, _ChangesViews]
PARTS = {
    "attention.value": "attn_in",
    "attention.out": "attn_out",
    "mlp.gate": "mlp_gate",
    "mlp.up": "mlp_gate",
    "mlp.down": "mlp_down",
}
INPUTS = BlockInputs((), {}, torch.device("cpu"), torch.float32)


def _twins(kind: type[_AddsIntoMlp]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    plain = kind(in_place=False).requires_grad_(False)
    changing = kind(in_place=True).requires_grad_(False)
    changing.load_state_dict(copy.deepcopy(plain.state_dict()))
    return plain, changing


def _states(draws: int = 1) -> Tensor:
    return torch.randn(draws * SEQUENCES, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(draws))


def _modules(block: nn.Module) -> list[ModuleInfo]:
    linear = {kind: block.get_submodule(kind) for kind in PARTS}
    return [ModuleInfo(ModuleId(0, kind), *linear[kind].get_parameter("weight").shape, PARTS[kind]) for kind in linear]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BLOCKS)
def test_sensitivities(kind: type[_AddsIntoMlp], dtype: torch.dtype) -> None:
    tables, hidden = [], _states()
    for block in _twins(kind):
        quantized = {
            scale: lambda name, block=block, scale=scale: block.get_parameter(f"{name}.weight") * scale
            for scale in (1.01, 0.9)
        }
        tables.append(part_sensitivity_table(block, INPUTS, hidden, _modules(block), quantized, dtype))
    assert tables[0] == tables[1]
    assert torch.equal(hidden, _states())


@pytest.mark.parametrize("kind", BLOCKS)
def test_traces_and_gradients(kind: type[_AddsIntoMlp]) -> None:
    """Inputs and output gradients of every module, in float32, where nothing is converted and so copied anyway."""
    hidden, gradient = _states(), _states(2)
    plain, changing = (
        trace_modules(block, INPUTS, hidden, gradient, list(PARTS), torch.float32) for block in _twins(kind)
    )
    for name in PARTS:
        assert torch.equal(plain[name].inputs, changing[name].inputs), name
        assert torch.allclose(plain[name].gradients, changing[name].gradients, rtol=1e-6, atol=1e-7), name
    entering = [backward_block(block, INPUTS, hidden, gradient, layer=0) for block in _twins(kind)]
    assert torch.allclose(*entering, rtol=1e-6, atol=1e-6)
    leaving = [forward_block(block, INPUTS, hidden, layer=0) for block in _twins(kind)]
    assert torch.equal(*leaving)
    assert torch.equal(hidden, _states())


@pytest.mark.parametrize("kind", BLOCKS)
def test_moments_and_spikes(kind: type[_AddsIntoMlp]) -> None:
    plain, changing = _twins(kind)
    hidden = _states()
    expected, found = (capture_second_moments(block, INPUTS, hidden, list(PARTS)) for block in (plain, changing))
    for name in PARTS:
        assert torch.equal(expected[name].matrix, found[name].matrix), name
    modules = [ModuleId(0, kind) for kind in PARTS]
    assert capture_spikes(plain, INPUTS, hidden, modules) == capture_spikes(changing, INPUTS, hidden, modules)


def test_products_may_be_changed_in_place() -> None:
    """What our own products return has the gradient of torch's, also where it is changed in place afterwards."""
    states, weight = _states(), torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(5))
    spec = QuantSpec(4, 32)
    grid = encode(weight, *quantizer("rtn").fit(weight, spec), spec, 1)
    codes = grid.codes(weight)
    packed = PackedWeight(codes=pack(codes.flatten(), 4), spec=spec, shape=(64, HIDDEN), axis=1, **grid.to_tensors())
    rounded = grid.dequantize(codes)
    products = {
        "packed": lambda inputs: packed_linear(inputs, packed),
        "packed, one token": lambda inputs: packed_linear(inputs[:1, :1], packed),
        "oneDNN": lambda inputs: _by_onednn(inputs, rounded),
    }
    for name, product in products.items():
        inputs = states.clone().requires_grad_(True)
        output = product(inputs)
        output.clamp_(-1, 1)
        (found,) = torch.autograd.grad(output.square().sum(), inputs)
        taken = states[:1, :1] if "one" in name else states
        expected = taken.clone().requires_grad_(True)
        nn.functional.linear(expected, rounded).clamp(-1, 1).square().sum().backward()
        assert expected.grad is not None
        assert torch.allclose(found[: len(taken), : taken.shape[1]], expected.grad, rtol=1e-4, atol=1e-4), name


def _by_onednn(inputs: Tensor, weight: Tensor) -> Tensor:
    with OneDnnProducts():
        return nn.functional.linear(inputs, weight)
