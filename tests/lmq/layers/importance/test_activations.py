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


@pytest.mark.parametrize("place", ["entering", "leaving"])
def test_a_state_of_length_zero_is_left_out_and_counted(
    place: str, entering: Tensor, leaving: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """It points nowhere: the mean is that of the others, by a plain loop over tokens."""
    states = {"entering": entering.clone(), "leaving": leaving.clone()}
    states[place][1, 2] = 0
    states[place][0, -1] = 0
    rest = [
        torch.nn.functional.cosine_similarity(entering[s, t].double(), leaving[s, t].double(), dim=0).item()
        for s in range(3)
        for t in range(7)
        if (s, t) not in ((1, 2), (0, 6))
    ]
    assert block_influence(**states, layer=3) == pytest.approx(1 - sum(rest) / 19, abs=1e-12)
    assert "2 of 21 states around layer 3 have length 0" in caplog.text
    last = {name: last_token_states(value) for name, value in states.items()}
    angles = [math.acos(rest[index]) / math.pi for index in (11, 18)]  # the last tokens of the other sequences
    assert angular_distance(**last, layer=3) == pytest.approx(sum(angles) / 2, abs=1e-12)
    assert "1 of 3 states around layer 3 have length 0" in caplog.text


def test_a_state_that_stays_at_length_zero_is_not_turned(entering: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    entering[0] = 0
    leaving = -entering
    assert block_influence(entering, leaving, layer=0) == pytest.approx(2 * 14 / 21)
    last = [last_token_states(states) for states in (entering, leaving)]
    assert angular_distance(*last, layer=0) == pytest.approx(2 / 3)
    assert block_influence(0 * entering, 0 * entering, layer=0) == 0
    assert caplog.text == ""


def test_a_layer_whose_states_all_have_length_zero_cannot_be_judged(entering: Tensor) -> None:
    with pytest.raises(NotFiniteError, match="none of the 21 states around layer 3 has a cosine"):
        block_influence(entering, 0 * entering, layer=3)
    with pytest.raises(NotFiniteError, match="none of the 3 states around layer 4 has a cosine"):
        angular_distance(last_token_states(0 * entering), last_token_states(entering), layer=4)
