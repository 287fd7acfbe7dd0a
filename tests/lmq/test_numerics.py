from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lmq import numerics as products
from lmq.numerics import OneDnnProducts, linear

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN: products are torch's own"
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(
    leading=st.lists(st.integers(1, 5), max_size=3),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 70),
    has_bias=st.booleans(),
)
def test_products_are_those_of_float64(leading: list[int], in_features: int, out_features: int, has_bias: bool) -> None:
    inputs, weight = random(*leading, in_features), random(out_features, in_features, seed=1)
    bias = random(out_features, seed=2) if has_bias else None
    expected = nn.functional.linear(inputs.double(), weight.double(), None if bias is None else bias.double())
    found = linear(inputs, weight, bias)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_contiguous_is_multiplied_right() -> None:
    inputs, weight = random(40, 30).t(), random(40, 20).t()
    torch.testing.assert_close(linear(inputs, weight), inputs @ weight.t())


@pytest.mark.parametrize("trained", ["inputs", "weight", "both"])
def test_gradients_are_those_of_torch(trained: str) -> None:
    given_inputs, given_weight, bias = random(2, 7, 16), random(12, 16, seed=1), random(12, seed=2)
    gradients = []
    for multiply in (linear, nn.functional.linear):
        inputs = given_inputs.clone().requires_grad_(trained != "weight")
        weight = given_weight.clone().requires_grad_(trained != "inputs")
        multiply(inputs, weight, bias).square().sum().backward()
        gradients.append((inputs.grad, weight.grad))
    for found, expected in zip(*gradients, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_linear_layers_are_multiplied_by_onednn_within_the_mode_alone() -> None:
    layer, inputs = nn.Linear(8, 4), random(3, 8)
    with patch.object(products, "_onednn", wraps=products._onednn) as onednn, torch.no_grad():
        layer(inputs)
        assert onednn.call_count == 0
        with OneDnnProducts():
            found = layer(inputs).softmax(-1)
        assert onednn.call_count == 1
        torch.testing.assert_close(found, layer(inputs).softmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_and_autocast_are_left_to_torch(dtype: torch.dtype) -> None:
    inputs, weight = random(3, 8), random(4, 8, seed=1)
    with patch.object(products, "_onednn") as onednn:
        torch.testing.assert_close(linear(inputs.to(dtype), weight.to(dtype)), inputs.to(dtype) @ weight.to(dtype).t())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(inputs, weight).dtype == torch.bfloat16
    onednn.assert_not_called()


def test_no_tokens_give_no_outputs() -> None:
    assert linear(torch.empty(0, 8), random(4, 8)).shape == (0, 4)
