import json
import math
import shutil
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lmq.errors import InputError, NotFiniteError, UnsupportedModel
from lmq.layers.prune import (
    check_prunable,
    choose_contiguous_layers,
    choose_layers,
    choose_random_layers,
    layers_to_remove,
    write_pruned,
)
from lmq.model.discovery import discover
from lmq.model.tensors import INDEX_FILE


@pytest.fixture(scope="session")
def token_ids() -> Tensor:
    return torch.randint(2, 500, (2, 24), generator=torch.Generator().manual_seed(1))


def open_plain(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    return model(token_ids, use_cache=False).logits


def logits_without(path: Path, removed: Collection[int], token_ids: Tensor) -> Tensor:
    """Logits of the model with layers deleted in memory."""
    model = open_plain(path)
    for layer in sorted(removed, reverse=True):
        del model.model.layers[layer]
        if hasattr(model.config, "layer_types"):
            model.config.layer_types = [kind for i, kind in enumerate(model.config.layer_types) if i != layer]
    model.config.num_hidden_layers = len(model.model.layers)
    return logits(model, token_ids)


def prune(path: Path, removed: Collection[int], target: Path) -> None:
    write_pruned(path, discover(path, weights_sha256="0"), removed, target)


@pytest.mark.parametrize(
    ("fraction", "layers", "count"), [(0.25, 4, 1), (0.25, 30, 7), (0.3, 10, 3), (0.29, 100, 29), (0.999, 4, 3)]
)
def test_a_fraction_is_rounded_down(fraction: float, layers: int, count: int) -> None:
    assert layers_to_remove(layers, fraction) == count


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0, math.nan])
def test_fractions_outside_0_and_1_are_refused(fraction: float) -> None:
    with pytest.raises(InputError, match=r"fraction = .* give a number between 0 and 1"):
        layers_to_remove(4, fraction)


@given(layers=st.integers(2, 500))
def test_the_smallest_fraction_that_is_named_removes_one_layer(layers: int) -> None:
    with pytest.raises(
        InputError, match=f"of {layers} layers removes none; the smallest that removes one is"
    ) as caught:
        layers_to_remove(layers, 0.5 / layers)
    assert layers_to_remove(layers, float(str(caught.value).rpartition(" ")[2])) == 1


def test_the_lowest_layers_are_chosen_wherever_they_are() -> None:
    assert choose_layers([0.1, 0.9, 0.5, 0.2, 0.8, 0.05, 0.7, 0.6], 0.4) == [0, 3, 5]


def test_equal_scores_are_taken_from_the_front() -> None:
    assert choose_layers([1.0, 0.0, 0.0, 0.0], 0.5) == [1, 2]


def test_layers_without_a_usable_score_are_named() -> None:
    with pytest.raises(InputError, match="layer 1 has no score"):
        choose_layers([1.0, None, 2.0, 3.0], 0.25)
    with pytest.raises(NotFiniteError, match="score of layer 2 is inf"):
        choose_layers([1.0, 2.0, math.inf, 3.0], 0.25)


def test_random_layers_follow_the_seed() -> None:
    first, again, other = (choose_random_layers(30, 0.25, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 7
    assert first == sorted(first)
    assert set(first) <= set(range(30))
    with pytest.raises(InputError, match="seed = -1"):
        choose_random_layers(30, 0.25, seed=-1)


def test_the_block_at_the_smallest_distance_is_chosen() -> None:
    assert choose_contiguous_layers([0.4, 0.1, 0.1, 0.3], 3) == [1, 2, 3]
    for distances, block_layers in (([], 2), ([math.nan, 0.1], 2), ([0.1], 0)):
        with pytest.raises(InputError, match=f"no block of {block_layers} layers"):
            choose_contiguous_layers(distances, block_layers)


@pytest.mark.parametrize("removed", [[1], [0, 2], [1, 2, 3]])
def test_a_pruned_checkpoint_is_the_model_without_its_layers(
    tiny_model: Path, removed: list[int], token_ids: Tensor, tmp_path: Path
) -> None:
    prune(tiny_model, removed, tmp_path / "pruned")
    model = open_plain(tmp_path / "pruned")
    assert model.config.num_hidden_layers == len(model.model.layers) == 4 - len(removed)
    assert torch.equal(logits(model, token_ids), logits_without(tiny_model, removed, token_ids))
    assert AutoTokenizer.from_pretrained(tmp_path / "pruned")("some text").input_ids
    structure = discover(tmp_path / "pruned", weights_sha256="0")
    assert structure.layers == 4 - len(removed)


def test_the_kinds_of_layers_stay_with_their_layers(tiny_gemma: Path, tmp_path: Path) -> None:
    prune(tiny_gemma, [0, 1, 2], tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned/config.json").read_text())
    assert config["layer_types"] == ["full_attention"]
    assert config["num_hidden_layers"] == 1


def test_kinds_that_follow_from_the_layers_number_are_written_out(
    tiny_gemma: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    path = shutil.copytree(tiny_gemma, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    del config["layer_types"]
    (path / "config.json").write_text(json.dumps({**config, "sliding_window_pattern": 2}))
    prune(path, [1], tmp_path / "pruned")
    pruned = open_plain(tmp_path / "pruned")
    assert pruned.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert torch.equal(logits(pruned, token_ids), logits_without(tiny_gemma, [1], token_ids))


def test_lists_of_token_ids_are_not_cut(tiny_llama: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 2, 3, 4]}))
    prune(path, [1], tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned/config.json").read_text())["eos_token_id"] == [1, 2, 3, 4]


def test_lists_of_layer_numbers_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "special_layers": [0, 3]}))
    with pytest.raises(UnsupportedModel, match=r"special_layers = \[0, 3\]"):
        prune(path, [1], tmp_path / "pruned")
    with pytest.raises(UnsupportedModel, match="lmq cannot renumber them"):
        check_prunable(path, discover(path, weights_sha256="0"))
    check_prunable(tiny_llama, discover(tiny_llama, weights_sha256="0"))
    assert not (tmp_path / "pruned").exists()


def test_shards_stay_shards_and_tensors_keep_their_type(tiny_qwen: Path, token_ids: Tensor, tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    shutil.copytree(tiny_qwen, source, ignore=shutil.ignore_patterns("*.safetensors"))
    open_plain(tiny_qwen).to(torch.bfloat16).save_pretrained(source, max_shard_size="150KB")
    assert (source / INDEX_FILE).is_file()
    prune(source, [0, 3], tmp_path / "pruned")
    index = json.loads((tmp_path / "pruned" / INDEX_FILE).read_text())
    found_bytes = 0
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "pruned" / file, "pt") as handle:
            tensor = handle.get_tensor(name)
        assert tensor.dtype == torch.bfloat16
        found_bytes += tensor.nbytes
    assert index["metadata"]["total_size"] == found_bytes
    assert {path.name for path in (tmp_path / "pruned").glob("*.safetensors")} == set(index["weight_map"].values())
    assert torch.equal(logits(open_plain(tmp_path / "pruned"), token_ids), logits_without(source, [0, 3], token_ids))


def test_names_of_base_models_are_renumbered(tiny_qwen: Path, token_ids: Tensor, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_qwen, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    open_plain(tiny_qwen).model.save_pretrained(source)
    shutil.copyfile(tiny_qwen / "config.json", source / "config.json")
    prune(source, [1], tmp_path / "pruned")
    assert torch.equal(logits(open_plain(tmp_path / "pruned"), token_ids), logits_without(tiny_qwen, [1], token_ids))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([], "0 of 4 layers cannot be removed"),
        ([0, 1, 2, 3], "4 of 4 layers cannot be removed"),
        ([4], "there is no layer 4 to remove; the model has layers 0 to 3"),
    ],
)
def test_what_cannot_be_removed_is_refused(tiny_llama: Path, removed: list[int], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        prune(tiny_llama, removed, tmp_path / "pruned")


def test_an_existing_target_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        prune(tiny_llama, [0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_leaves_nothing_behind(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lmq.layers.prune.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        prune(tiny_llama, [0], tmp_path / "pruned")
    assert not list(tmp_path.iterdir())
