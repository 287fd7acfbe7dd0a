import pytest
import torch

from lmq.errors import InputError
from lmq.layers.importance.estimates import ShapleyOptions
from lmq.layers.importance.layers import layer_importance_rows, layer_scores
from lmq.measurement.layer_activity import layer_activity

HIDDEN = [torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
ACTIVITIES = [layer_activity(*HIDDEN[layer : layer + 2], layer=layer) for layer in range(3)]
LAST_TOKENS = [hidden[:, -1] for hidden in HIDDEN]


def test_each_avss_variant_is_its_variance_over_its_sparsity() -> None:
    scores = layer_scores(ACTIVITIES)
    smallest = 1 / (2 * HIDDEN[0].numel())
    for name, (variance, sparsity) in {
        "avss": ("variance", "sparsity"),
        "avss_pooled": ("pooled_variance", "sparsity"),
        "avss_relative": ("variance", "relative_sparsity"),
        "avss_pooled_relative": ("pooled_variance", "relative_sparsity"),
    }.items():
        raw = [row[variance] / max(row[sparsity], smallest) for row in ACTIVITIES]
        assert scores[name] == pytest.approx([score / sum(raw) for score in raw])
    assert scores["block_influence"] == [row["block_influence"] for row in ACTIVITIES]


def test_removal_is_joined_by_layer_and_null_without() -> None:
    removal = [{"leave_one_out": float(layer), "shapley": -float(layer)} for layer in range(3)]
    rows = layer_importance_rows(ACTIVITIES, LAST_TOKENS, removal)
    assert [(row["layer"], row["leave_one_out"], row["shapley"]) for row in rows] == [(0, 0, 0), (1, 1, -1), (2, 2, -2)]
    rows = layer_importance_rows(ACTIVITIES, LAST_TOKENS, None)
    assert [(row["leave_one_out"], row["shapley"]) for row in rows] == [(None, None)] * 3


def test_options_are_checked_without_playing_the_game() -> None:
    ShapleyOptions(level=6).check(6)
    with pytest.raises(InputError, match="level = 7 is not a window length; allowed: 1 to 6"):
        ShapleyOptions(level=7).check(6)
    with pytest.raises(InputError, match="permutations = 0"):
        ShapleyOptions(permutations=0).check(6)
