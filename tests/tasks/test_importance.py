"""Stages of layer importance against the library on the same states, and against evaluation of a pruned directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmq.evaluation.perplexity import full_windows
from lmq.evaluation.windows import WINDOWS_SCHEMA, last_states, score_windows, window_tokens
from lmq.layers.importance.avss import avss_scores
from lmq.layers.importance.cosine import angular_distances
from lmq.layers.importance.estimates import ShapleyOptions
from lmq.layers.importance.leave_one_out import leave_one_out
from lmq.layers.importance.removal import RemovalValue
from lmq.layers.importance.shapley import permutation_shapley, window_shapley
from lmq.layers.importance.tables import ANGULAR_DISTANCE_SCHEMA, LAYER_IMPORTANCE_SCHEMA, SUBLAYER_IMPORTANCE_SCHEMA
from lmq.layers.prune import write_pruned
from lmq.measurement.layer_activity import activation_statistics, block_influence
from lmq.measurement.replay import read_hidden_states
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.numerics import fast_matmul_dtype
from lmq.tables import read_rows
from lmq.text.calibration import write_tokens
from lmq_storage import ArtifactRef
from lmq_tasks.evaluate import WINDOWS_FILE, evaluate_without_layers
from lmq_tasks.importance import (
    ANGULAR_FILE,
    LAYERS_FILE,
    REMOVAL_FILE,
    SUBLAYERS_FILE,
    join_layer_importance,
    measure_removal_importance,
)
from lmq_tasks.inputs import TOKENS_FILE
from lmq_tasks.measure import MEASUREMENT_STAGES
from lmq_tasks.sources import PREFIX_FILE
from lmq_tasks.states import HIDDEN_STATES_FILE
from tests.tasks.conftest import LAYERS, LENGTH, SEQUENCES, Captured

PLAYERS = 2 * LAYERS


@pytest.fixture(scope="module")
def token_ids() -> Tensor:
    return torch.randint(2, 500, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokens(captured: Captured, token_ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    """Tokens of calibration, and as a stream to evaluate on."""
    place = tmp_path_factory.mktemp("tokens")
    write_tokens(place / TOKENS_FILE, token_ids)
    (place / PREFIX_FILE).write_text("[]")
    return captured.store.publish(
        stage="calibration",
        key="f" * 64,
        schema="tokens/1",
        files={name: place / name for name in (TOKENS_FILE, PREFIX_FILE)},
        algorithm_version=1,
    )


@pytest.fixture(scope="module")
def activity(captured: Captured) -> list[ArtifactRef]:
    return [
        captured.run(
            MEASUREMENT_STAGES["layer_activity"],
            {"layer": layer},
            hidden=captured.hidden[layer],
            leaving=captured.hidden[layer + 1],
        )
        for layer in range(LAYERS)
    ]


@pytest.fixture(scope="module")
def removal(captured: Captured, tokens: ArtifactRef) -> ArtifactRef:
    return captured.run(measure_removal_importance, {"level": 2}, tokens=tokens)


@pytest.fixture(scope="module")
def value(tiny_qwen: Path, token_ids: Tensor) -> RemovalValue:
    model = StreamedModel.open(tiny_qwen, discover(tiny_qwen, weights_sha256="0"))
    return RemovalValue(model, token_ids, matmul_dtype=fast_matmul_dtype(torch.device("cpu")))


def test_layers_have_every_metric(captured: Captured, activity: list[ArtifactRef], removal: ArtifactRef) -> None:
    found = captured.run(join_layer_importance, {"angular_layers": 2}, layer_activity=activity, removal=removal)
    rows = read_rows(captured.path(found, LAYERS_FILE), LAYER_IMPORTANCE_SCHEMA)
    states = [read_hidden_states(captured.path(ref, HIDDEN_STATES_FILE)) for ref in captured.hidden]
    statistics = [activation_statistics(leaving, layer=layer) for layer, leaving in enumerate(states[1:])]
    elements = states[0].numel()
    paper, authors = [s.variance for s in statistics], [s.pooled_variance for s in statistics]
    absolute, relative = [s.sparsity for s in statistics], [s.relative_sparsity for s in statistics]
    expected = {
        "activation_variance": paper,
        "avss": avss_scores(paper, absolute, elements=elements),
        "avss_pooled": avss_scores(authors, absolute, elements=elements),
        "avss_relative": avss_scores(paper, relative, elements=elements),
        "avss_pooled_relative": avss_scores(authors, relative, elements=elements),
        "block_influence": [block_influence(states[i], states[i + 1], layer=i) for i in range(LAYERS)],
        "angular_distance": angular_distances([state[:, -1] for state in states], block_layers=1),
    }
    for name, column in expected.items():
        assert [row[name] for row in rows] == pytest.approx(column, rel=1e-12), name
    for row, alone in zip(rows, read_rows(captured.path(removal, LAYERS_FILE), LAYER_IMPORTANCE_SCHEMA), strict=True):
        assert (row["shapley"], row["leave_one_out"]) == (alone["shapley"], alone["leave_one_out"])
    blocks = read_rows(captured.path(found, ANGULAR_FILE), ANGULAR_DISTANCE_SCHEMA)
    assert [(row["first_layer"], row["block_layers"]) for row in blocks] == [(0, 2), (1, 2), (2, 2)]
    distances = angular_distances([state[:, -1] for state in states], block_layers=2)
    assert [row["angular_distance"] for row in blocks] == pytest.approx(distances, rel=1e-12)


def test_what_was_not_removed_is_null(captured: Captured, activity: list[ArtifactRef]) -> None:
    found = captured.run(join_layer_importance, {"angular_layers": 1}, layer_activity=activity)
    rows = read_rows(captured.path(found, LAYERS_FILE), LAYER_IMPORTANCE_SCHEMA)
    assert {row[name] for row in rows for name in ("shapley", "leave_one_out")} == {None}


def test_removal_is_what_the_estimators_say_one_by_one(
    captured: Captured, removal: ArtifactRef, value: RemovalValue
) -> None:
    rows = read_rows(captured.path(removal, SUBLAYERS_FILE), SUBLAYER_IMPORTANCE_SCHEMA)
    assert [(row["layer"], row["sublayer"]) for row in rows[:3]] == [(0, "attention"), (0, "mlp"), (1, "attention")]
    shapley = window_shapley(value, PLAYERS, level=2)
    assert [row["shapley"] for row in rows] == pytest.approx(shapley, rel=1e-9)
    assert {row["shapley_stderr"] for row in rows} == {None}
    alone = leave_one_out(value, PLAYERS, [[player] for player in range(PLAYERS)])
    assert [row["leave_one_out"] for row in rows] == pytest.approx(alone, rel=1e-9)
    layers = read_rows(captured.path(removal, LAYERS_FILE), LAYER_IMPORTANCE_SCHEMA)
    whole = leave_one_out(value, PLAYERS, [(2 * layer, 2 * layer + 1) for layer in range(LAYERS)])
    assert [row["leave_one_out"] for row in layers] == pytest.approx(whole, rel=1e-9)
    sums = [shapley[2 * layer] + shapley[2 * layer + 1] for layer in range(LAYERS)]
    assert [row["shapley"] for row in layers] == pytest.approx(sums, rel=1e-9)


def test_the_work_and_the_type_of_products_are_recorded(captured: Captured, removal: ArtifactRef) -> None:
    found = json.loads(captured.path(removal, REMOVAL_FILE).read_text())
    assert found["matmul_dtype"] in ("bfloat16", "float32")
    # the full model, 8 sub-layers and 7 windows of two; all of leave-one-out is among them
    assert found["evaluations"] == 1 + 8 + 7
    assert found["evaluations_unshared"] == (1 + 8 + 7) + (1 + 8) + (1 + 4)
    assert found["block_runs"] < found["block_runs_without_reuse"] == 16 * LAYERS


def test_permutations_give_standard_errors(captured: Captured, tokens: ArtifactRef, value: RemovalValue) -> None:
    config = {"permutations": 3, "seed": 7}
    found = captured.run(measure_removal_importance, config, tokens=tokens)
    rows = read_rows(captured.path(found, SUBLAYERS_FILE), SUBLAYER_IMPORTANCE_SCHEMA)
    for row, estimate in zip(rows, permutation_shapley(value, PLAYERS, **config), strict=True):
        assert row["shapley"] == pytest.approx(estimate.value, rel=1e-9, abs=1e-9)
        assert row["shapley_stderr"] == pytest.approx(estimate.stderr, rel=1e-9)
    assert len(ShapleyOptions(**config).estimate(value, PLAYERS)) == PLAYERS


def test_layers_left_out_are_as_a_pruned_checkpoint(
    captured: Captured, tiny_qwen: Path, tmp_path: Path, token_ids: Tensor
) -> None:
    stream = token_ids.flatten()
    write_tokens(tmp_path / TOKENS_FILE, stream[None])
    (tmp_path / PREFIX_FILE).write_text("[]")
    files = {name: tmp_path / name for name in (TOKENS_FILE, PREFIX_FILE)}
    tokens = captured.store.publish(
        stage="evaluation-tokens", key="e" * 64, schema="tokens/1", files=files, algorithm_version=1
    )
    found = captured.run(evaluate_without_layers, {"removed": [0, 2], "window": 8, "stride": 4}, tokens=tokens)
    write_pruned(tiny_qwen, discover(tiny_qwen, weights_sha256="0"), [0, 2], tmp_path / "pruned")
    model = StreamedModel.open(tmp_path / "pruned", discover(tmp_path / "pruned", weights_sha256="0"))
    windows = full_windows(len(stream), 8, 4)
    seen = window_tokens(stream, windows, [])
    expected = score_windows(model, windows, seen, last_states(model, seen), None)
    assert read_rows(captured.path(found, WINDOWS_FILE), WINDOWS_SCHEMA) == expected
