from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lmq.discovery import discover
from lmq.errors import NotFiniteError
from lmq.evaluation import last_states
from lmq.quantized_point import divergence_gradient, divergence_slopes
from lmq.streaming import StreamedModel

SEQUENCES, LENGTH, CONFIGURATIONS = 2, 12, 3


def random_errors(weights: dict[tuple[int, str], Tensor]) -> dict[tuple[int, str], Tensor]:
    """Errors [configurations, out_features, in_features] of every module, by layer and kind."""
    generator = torch.Generator().manual_seed(4)
    return {
        key: 0.02 * torch.randn(CONFIGURATIONS, *weight.shape, generator=generator) for key, weight in weights.items()
    }


def test_slopes_are_those_of_automatic_differentiation_through_the_whole_model(tiny_model: Path) -> None:
    token_ids = torch.randint(2, 500, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    streamed = StreamedModel.open(tiny_model, discover(tiny_model, weights_sha256="0"))
    structure = streamed.structure
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    linears = {(m.id.layer, m.id.kind): plain.get_submodule(structure.path(m.id)) for m in structure.modules}
    weights = {key: linear.get_parameter("weight").detach().clone() for key, linear in linears.items()}
    errors = random_errors(weights)

    def of_layer(values: dict[tuple[int, str], Tensor], layer: int) -> dict[str, Tensor]:
        return {kind: value for (found, kind), value in values.items() if found == layer}

    quantized = {key: weight + errors[key][0] for key, weight in weights.items()}
    reference = plain(token_ids).logits.detach().log_softmax(-1)[:, :-1]
    for key, linear in linears.items():
        linear.weight = nn.Parameter(quantized[key])
    found = plain(token_ids).logits.log_softmax(-1)[:, :-1]
    (reference.exp() * (reference - found)).sum().backward()

    slopes = divergence_slopes(
        streamed,
        token_ids,
        last_states(streamed, token_ids),
        lambda layer: of_layer(quantized, layer),
        lambda layer: of_layer(errors, layer),
    )
    assert len(slopes) == structure.layers
    for (layer, kind), linear in linears.items():
        gradient = linear.get_parameter("weight").grad
        assert gradient is not None
        expected = (errors[layer, kind] * gradient).sum(dim=(1, 2)).double() / (SEQUENCES * (LENGTH - 1))
        torch.testing.assert_close(slopes[layer][kind], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_no_divergence_has_no_gradient(tiny_llama: Path) -> None:
    streamed = StreamedModel.open(tiny_llama, discover(tiny_llama, weights_sha256="0"))
    states = torch.randn(SEQUENCES, LENGTH, 64, generator=torch.Generator().manual_seed(2))
    kept = states.clone()
    gradient = divergence_gradient(streamed, states, states)
    assert gradient.abs().max() < 1e-5
    assert torch.equal(states, kept)
    other = divergence_gradient(streamed, states, 1.5 * states.flip(-1))
    assert other[:, :-1].abs().max() > 1e-3
    assert not other[:, -1].any()


def test_weights_that_are_not_finite_are_named_by_layer(tiny_llama: Path) -> None:
    streamed = StreamedModel.open(tiny_llama, discover(tiny_llama, weights_sha256="0"))
    token_ids = torch.full((1, LENGTH), 7)
    broken = {"mlp.down_proj": torch.full((64, 128), torch.nan)}
    with pytest.raises(NotFiniteError, match="layer 0"):
        divergence_slopes(streamed, token_ids, last_states(streamed, token_ids), lambda _: broken, lambda _: {})
