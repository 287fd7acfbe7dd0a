from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmq.errors import NotFiniteError
from lmq.formats.groups import Grid
from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import Allocation, fit_grids
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.model.discovery import discover
from lmq.model.stored_matrices import load_layer_weights
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure, ModuleId
from lmq.quantizers.rtn import RoundToNearest

SEQUENCES, LENGTH = 2, 12
MENU = (QuantSpec(2, 64), QuantSpec(3, 32), QuantSpec(4, 64))
TOKEN_IDS = torch.randint(2, 500, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


class Bench:
    """A tiny model, streamed and whole, with the grids of every module."""

    def __init__(self, model_dir: Path, matmul_dtype: torch.dtype = torch.float32):
        self.structure: ModelStructure = discover(model_dir, weights_sha256="0")
        self.weights: dict[ModuleId, Tensor] = {}
        for layer in range(self.structure.layers):
            by_kind = load_layer_weights(model_dir, self.structure, layer)
            self.weights |= {module.id: by_kind[module.id.kind] for module in self.structure.in_layer(layer)}
        self.grids: dict[ModuleId, dict[QuantSpec, Grid]] = {
            module: fit_grids(weight, MENU, RoundToNearest()) for module, weight in self.weights.items()
        }
        streamed = StreamedModel.open(model_dir, self.structure)
        self.point = QuantizedPoint(streamed, self.of_layer, matmul_dtype=matmul_dtype)
        self.whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def of_layer(self, layer: int) -> dict[ModuleId, dict[QuantSpec, Grid]]:
        return {module: grids for module, grids in self.grids.items() if module.layer == layer}

    def quantize_whole(self, allocation: Allocation) -> None:
        for module, spec in allocation.items():
            linear = self.whole.get_submodule(self.structure.path(module))
            linear.weight = nn.Parameter(self.grids[module][spec].round_trip(self.weights[module]))

    def divergence(self, reference: Tensor) -> Tensor:
        """Summed KL of the whole model as it is now from logits [sequences, sequence_length, vocabulary]."""
        expected = reference.log_softmax(-1)[:, :-1]
        found = self.whole(TOKEN_IDS).logits.log_softmax(-1)[:, :-1]
        return (expected.exp() * (expected - found)).sum()

    def mixed_choice(self) -> dict[ModuleId, QuantSpec]:
        return {module: MENU[index % len(MENU)] for index, module in enumerate(self.weights)}


def test_divergence_and_slopes_are_those_of_the_whole_model(tiny_model: Path) -> None:
    bench = Bench(tiny_model)
    allocation = bench.mixed_choice()
    logits = bench.whole(TOKEN_IDS).logits.detach()
    bench.quantize_whole(allocation)
    divergence = bench.divergence(logits)
    divergence.backward()
    predicted = SEQUENCES * (LENGTH - 1)

    reference = bench.point.last_states(TOKEN_IDS)
    assert float(bench.point.divergences(TOKEN_IDS, reference, allocation).mean()) == pytest.approx(
        divergence.item() / predicted, rel=1e-3
    )

    found = torch.log_softmax(bench.whole(TOKEN_IDS).logits.detach()[:, :-1], dim=-1)
    losses = -found.gather(2, TOKEN_IDS[:, 1:, None])[:, :, 0].mean(dim=1)
    torch.testing.assert_close(bench.point.losses(TOKEN_IDS, allocation), losses.double(), rtol=1e-4, atol=1e-5)

    slopes = bench.point.slopes(TOKEN_IDS, reference, allocation, MENU)
    expected = np.zeros_like(slopes)
    for row, (module, spec) in enumerate(allocation.items()):
        gradient = bench.whole.get_submodule(bench.structure.path(module)).get_parameter("weight").grad
        assert gradient is not None
        current = bench.grids[module][spec].round_trip(bench.weights[module])
        for column, other in enumerate(MENU):
            change = bench.grids[module][other].round_trip(bench.weights[module]) - current
            expected[row, column] = float((gradient * change).double().sum()) / predicted
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(slopes, expected, rtol=1e-2, atol=1e-3 * float(np.abs(expected).max()))
    assert not slopes[np.arange(len(slopes)), [MENU.index(spec) for spec in allocation.values()]].any()


def test_delta_losses_are_those_of_the_whole_model(tiny_model: Path) -> None:
    bench = Bench(tiny_model)
    allocation = bench.mixed_choice()
    bench.quantize_whole(allocation)
    logits = bench.whole(TOKEN_IDS).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), TOKEN_IDS[:, 1:].flatten()).backward()
    expected = []
    for module, spec in allocation.items():
        gradient = bench.whole.get_submodule(bench.structure.path(module)).get_parameter("weight").grad
        assert gradient is not None
        change = bench.weights[module] - bench.grids[module][spec].round_trip(bench.weights[module])
        expected.append(abs(float((gradient * change).double().sum())))
    assert max(expected) > 1e-4
    np.testing.assert_allclose(
        bench.point.delta_losses(TOKEN_IDS, allocation), expected, rtol=1e-2, atol=1e-3 * max(expected)
    )


def test_divergence_of_one_module_alone_is_that_of_the_whole_model(tiny_model: Path) -> None:
    bench = Bench(tiny_model)
    logits = bench.whole(TOKEN_IDS).logits.detach()
    entering = bench.whole(TOKEN_IDS, output_hidden_states=True).hidden_states[1].detach()
    pairs = [(module, spec) for module in bench.of_layer(1) for spec in MENU[:2]]
    kept = entering.clone()
    found = bench.point.divergences_alone(1, entering, bench.point.last_states(TOKEN_IDS), pairs)
    assert torch.equal(entering, kept)
    assert found.shape == (len(pairs), SEQUENCES)
    for row, (module, spec) in enumerate(pairs):
        bench.quantize_whole({module: spec})
        expected = float(bench.divergence(logits).detach()) / (SEQUENCES * (LENGTH - 1))
        assert float(found[row].mean()) == pytest.approx(expected, rel=2e-3, abs=1e-7)
        bench.whole.get_submodule(bench.structure.path(module)).weight = nn.Parameter(bench.weights[module])


def test_slopes_do_not_depend_on_how_many_sequences_are_held_at_once(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tiny_llama)
    allocation = bench.mixed_choice()
    reference = bench.point.last_states(TOKEN_IDS)
    together = bench.point.slopes(TOKEN_IDS, reference, allocation, MENU)
    losses_together = bench.point.delta_losses(TOKEN_IDS, allocation)
    monkeypatch.setattr("lmq.measurement.quantized_model._STATES_AT_ONCE", 1)
    one_by_one = bench.point.slopes(TOKEN_IDS, reference, allocation, MENU)
    losses = bench.point.delta_losses(TOKEN_IDS, allocation)
    np.testing.assert_allclose(losses, losses_together, rtol=1e-4, atol=1e-6 * float(losses_together.max()))
    np.testing.assert_allclose(one_by_one, together, rtol=1e-4, atol=1e-6 * float(np.abs(together).max()))


def test_bfloat16_products_find_nearly_the_same_divergence(tiny_llama: Path) -> None:
    exact, fast = Bench(tiny_llama), Bench(tiny_llama, torch.bfloat16)
    allocation = exact.mixed_choice()
    points = (exact.point, fast.point)
    found = [float(point.divergences(TOKEN_IDS, point.last_states(TOKEN_IDS), allocation).mean()) for point in points]
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert found[1] != found[0]


def test_weights_that_are_not_finite_are_named_by_layer(tiny_llama: Path) -> None:
    class Broken(Grid):
        def round_trip(self, weight: Tensor) -> Tensor:
            return torch.full_like(weight, torch.nan)

        def to(self, device: torch.device | str) -> Grid:
            return self

    bench = Bench(tiny_llama)
    module = ModuleId(2, "mlp.down_proj")
    grid = bench.grids[module][MENU[0]]
    bench.grids[module][MENU[0]] = Broken(**{name: getattr(grid, name) for name in grid.__dataclass_fields__})
    with pytest.raises(NotFiniteError, match="layer 2"):
        bench.point.last_states(TOKEN_IDS, dict.fromkeys(bench.weights, MENU[0]))
