from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmq.errors import DamagedFile
from lmq.measurement.quantizer_moments import (
    backward_with_moments,
    input_moments,
    load_moments,
    save_moments,
)
from lmq.measurement.upper_triangle import UpperTriangle, triangle_bytes
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel

DRAWS, SEQUENCES, LENGTH = 2, 3, 8


def _states(hidden_size: int) -> tuple[Tensor, Tensor]:
    """States that enter a block, and gradients of every draw at what leaves it."""
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(SEQUENCES, LENGTH, hidden_size, generator=generator)
    return hidden, torch.randn(DRAWS * SEQUENCES, LENGTH, hidden_size, generator=generator) * 0.01


def _symmetric(size: int) -> Tensor:
    inputs = torch.randn(40, size, generator=torch.Generator().manual_seed(size))
    return inputs.t() @ inputs


def test_moments_are_those_of_autograd_token_by_token(tiny_model: Path) -> None:
    """Against hooks on the whole block, in float64, one sequence and draw at a time."""
    model = StreamedModel.open(tiny_model, discover(tiny_model))
    hidden, gradient = _states(model.structure.hidden_size)
    kinds = [module.id.kind for module in model.structure.in_layer(1)]
    inputs = model.block_inputs(LENGTH)[1]
    sums: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    with model.block(1) as block:
        at_entering, found = backward_with_moments(block, inputs, hidden, gradient, kinds, layer=1)
        for kind in kinds:

            def keep(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor, kind: str = kind) -> None:
                seen[kind] = args[0].detach().clone()
                output.register_hook(lambda slope, kind=kind: add(kind, slope))

            block.get_submodule(kind).register_forward_hook(keep)

        def add(kind: str, slope: Tensor) -> None:
            for state, by_output in zip(seen[kind].double().flatten(0, -2), slope.double().flatten(0, -2), strict=True):
                product = by_output.square().mean() * torch.outer(state, state)
                sums[kind] = sums.get(kind, torch.zeros_like(product)) + product / (DRAWS * SEQUENCES * LENGTH)

        for number, slope in enumerate(gradient):
            entering = hidden[number % SEQUENCES][None].clone().requires_grad_(True)
            inputs.run(block, entering).backward(slope[None])
            assert torch.allclose(at_entering[number], entering.grad[0], rtol=1e-4, atol=1e-7)
    for kind in kinds:
        assert torch.allclose(found[kind].matrix().double(), sums[kind], rtol=1e-4, atol=1e-6 * sums[kind].abs().max())


def test_plain_moments_are_shared_by_modules_with_the_same_inputs(tiny_llama: Path) -> None:
    model = StreamedModel.open(tiny_llama, discover(tiny_llama))
    hidden, _ = _states(model.structure.hidden_size)
    kinds = [module.id.kind for module in model.structure.in_layer(0)]
    with model.block(0) as block:
        found = input_moments(block, model.block_inputs(LENGTH)[0], hidden, kinds)
        normed = block.get_submodule("input_layernorm")(hidden).flatten(0, 1).double()
    assert found["self_attn.q_proj"] is found["self_attn.v_proj"]
    assert found["self_attn.q_proj"] is not found["self_attn.o_proj"]
    expected = normed.t() @ normed / len(normed)
    assert torch.allclose(found["self_attn.k_proj"].matrix().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 40, 256, 257, 600])
def test_a_triangle_is_the_whole_matrix_in_about_half_of_its_bytes(size: int) -> None:
    matrix = _symmetric(size)
    triangle = UpperTriangle.of(matrix)
    assert torch.allclose(triangle.matrix(), matrix)
    assert torch.equal(triangle.matrix(), triangle.matrix().t())
    stored = sum(block.nbytes for block in triangle.blocks)
    assert stored == triangle_bytes(size)
    assert stored <= 2 * size * (size + 256)
    weights = torch.rand(30, generator=torch.Generator().manual_seed(1))
    inputs = torch.randn(30, size, generator=torch.Generator().manual_seed(2))
    sums = UpperTriangle.zeros(size)
    for piece in (slice(0, 7), slice(7, 30)):
        sums.add_products(inputs[piece], weights[piece])
    sums.divide(30)
    expected = inputs.double().t() @ (weights.double()[:, None] * inputs.double()) / 30
    assert torch.allclose(sums.matrix().double(), expected, atol=1e-5)


def test_a_file_holds_shared_moments_once(tmp_path: Path) -> None:
    shared, own = UpperTriangle.of(_symmetric(300)), UpperTriangle.of(_symmetric(70))
    save_moments(tmp_path / "moments", {"q": shared, "k": shared, "down": own})
    found = load_moments(tmp_path / "moments")
    assert list(found) == ["q", "k", "down"]
    assert found["q"] is found["k"]
    for kind, expected in (("q", shared), ("down", own)):
        assert torch.equal(found[kind].matrix(), expected.matrix())
    assert (tmp_path / "moments").stat().st_size < triangle_bytes(300) + triangle_bytes(70) + 2000
    (tmp_path / "moments").write_bytes(b"damaged")
    with pytest.raises(DamagedFile, match="is not a readable file of second moments"):
        load_moments(tmp_path / "moments")
