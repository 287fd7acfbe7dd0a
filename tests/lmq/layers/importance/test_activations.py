import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lmq.errors import InputError, NotFiniteError
from lmq.layers.importance.avss import avss_scores
from lmq.layers.importance.cosine import angular_distance, angular_distances
from lmq.measurement.layer_activity import activation_statistics, block_influence, last_token_states

SHAPE = (3, 7, 16)


@pytest.fixture
def entering() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) + 0.3


@pytest.fixture
def leaving() -> Tensor:
    return 2 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)) - 0.1


def test_statistics_by_hand() -> None:
    states = torch.tensor([[[0.0, 4.0], [2.0, 2.0]], [[0.01, 0.0], [1.0, -1.0]]])
    found = activation_statistics(states, layer=0, absolute_epsilon=1e-5, relative_epsilon=0.01)
    values = [0, 4, 2, 2, 0.01, 0, 1, -1]
    mean = sum(values) / 8
    assert found.variance == pytest.approx(sum((value - mean) ** 2 for value in values) / 8)
    first, second = [1.0, 3.0], [0.505, -0.5]  # means over the tokens
    pooled = [(a - b) ** 2 / 2 for a, b in (first, second)]  # two channels, divided by one
    assert found.pooled_variance == pytest.approx(sum(pooled) / 2)
    assert (found.sparsity, found.relative_sparsity, found.elements) == (2 / 8, 3 / 8, 8)


def test_statistics_equal_those_of_the_whole_tensor(leaving: Tensor) -> None:
    found = activation_statistics(leaving, layer=0, absolute_epsilon=0.2, relative_epsilon=0.1)
    whole = leaving.double().numpy()
    assert found.variance == pytest.approx(whole.var(), rel=1e-12)
    assert found.pooled_variance == pytest.approx(leaving.double().mean(dim=1).var(dim=1).mean().item(), rel=1e-12)
    assert found.sparsity == (np.abs(whole) < 0.2).mean()
    assert found.relative_sparsity == (np.abs(whole) < 0.1 * np.sqrt((whole**2).mean())).mean()


def test_scores_are_variance_over_sparsity_and_sum_to_one() -> None:
    scores = avss_scores([1.0, 2.0, 3.0], [0.5, 0.25, 0.5], elements=100)
    assert scores == pytest.approx([2 / 16, 8 / 16, 6 / 16])


def test_a_sparsity_of_zero_counts_as_half_an_activation() -> None:
    scores = avss_scores([1.0, 2.0, 1.0], [0.0, 0.0, 0.01], elements=100)
    raw = [1 / 0.005, 2 / 0.005, 1 / 0.01]
    assert scores == pytest.approx([value / sum(raw) for value in raw])
    assert all(map(math.isfinite, scores))


def test_layers_that_never_vary_cannot_be_ranked() -> None:
    with pytest.raises(InputError, match="all 2 layers have variance 0"):
        avss_scores([0.0, 0.0], [1.0, 1.0], elements=10)


def test_block_influence_equals_the_formula(entering: Tensor, leaving: Tensor) -> None:
    cosines = torch.nn.functional.cosine_similarity(entering.double(), leaving.double(), dim=-1, eps=0)
    assert block_influence(entering, leaving, layer=0) == pytest.approx(1 - cosines.mean().item(), abs=1e-12)
    assert block_influence(entering, 3 * entering, layer=0) == pytest.approx(0, abs=1e-12)
    assert block_influence(entering, -entering, layer=0) == pytest.approx(2)


def test_angular_distance_is_of_the_last_token() -> None:
    entering, leaving = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    entering[:, -1] = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    leaving[:, -1] = torch.tensor([[0.0, 5.0], [1.0, 1.0]])
    found = angular_distance(last_token_states(entering), last_token_states(leaving), layer=0)
    assert found == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_angular_distances_over_blocks_of_layers() -> None:
    turns = [0.0, 0.1, 0.4, 0.5, 0.55]  # in units of π, by layer
    states = [torch.tensor([[math.cos(math.pi * turn), math.sin(math.pi * turn)]]).double() for turn in turns]
    assert angular_distances(states, block_layers=1) == pytest.approx([0.1, 0.3, 0.1, 0.05])
    assert angular_distances(states, block_layers=3) == pytest.approx([0.5, 0.45])
    for length in (0, 5):
        with pytest.raises(InputError, match=f"block_layers = {length} is not allowed; give 1 to 4"):
            angular_distances(states, block_layers=length)


def test_the_same_state_is_at_distance_zero(entering: Tensor) -> None:
    last = last_token_states(entering)
    assert angular_distance(last, last, layer=0) == pytest.approx(0, abs=1e-7)


def test_states_that_are_not_finite_are_named_by_layer(entering: Tensor, leaving: Tensor) -> None:
    broken = leaving.clone()
    broken[0, -1, 0] = math.nan
    with pytest.raises(NotFiniteError, match="states that leave layer 5 holds 1 elements"):
        activation_statistics(broken, layer=5)
    with pytest.raises(NotFiniteError, match="states that leave layer 5"):
        block_influence(entering, broken, layer=5)
    with pytest.raises(NotFiniteError, match="states that enter layer 5"):
        angular_distance(last_token_states(broken), last_token_states(entering), layer=5)


def test_a_state_of_length_zero_has_no_cosine(entering: Tensor) -> None:
    zero = entering.clone()
    zero[1, 2] = 0
    with pytest.raises(NotFiniteError, match="1 of 7 states around layer 3 have length 0"):
        block_influence(zero, entering, layer=3)
