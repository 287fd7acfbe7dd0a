"""Nothing that comes with a model is run, unpickled, or followed out of the model's directory."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest

import lmq
from lmq.errors import InputError, LmqError
from lmq.model.skeleton import build_skeleton
from lmq.model.source import ModelSource, locate
from lmq.model.tensors import INDEX_FILE, weight_files
from lmq.text.calibration import load_tokenizer

HARM = "from pathlib import Path\nPath({path!r}).touch()\n"


@pytest.fixture
def model(tiny_llama, tmp_path) -> Path:
    """A model that brings code for its configuration, its model and its tokenizer."""
    path = tmp_path / "model"
    shutil.copytree(tiny_llama, path)
    harm = HARM.format(path=str(tmp_path / "harm"))
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (path / f"{name}.py").write_text(harm)
    edit(
        path / "config.json", auto_map={"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    )
    edit(path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.T", None]})
    return path


def edit(file: Path, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def no_harm(model: Path) -> bool:
    return not (model.parent / "harm").exists()


def test_code_beside_a_known_model_is_not_run(model):
    assert build_skeleton(model).config.model_type == "llama"
    assert load_tokenizer(model)("a").input_ids
    assert no_harm(model)


def test_a_model_that_needs_its_own_code_is_refused(model):
    edit(model / "config.json", model_type="evil")
    with pytest.raises(LmqError, match="needs Python code that came with it, which lmq does not run"):
        build_skeleton(model)
    assert no_harm(model)


def test_a_tokenizer_that_needs_its_own_code_is_not_run(model):
    edit(model / "config.json", model_type="evil")
    edit(model / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    with contextlib.suppress(InputError):
        load_tokenizer(model)
    assert no_harm(model)


def test_a_checkpoint_with_code_is_not_run(model):
    with pytest.raises(LmqError):
        lmq.load(model)
    assert no_harm(model)


def test_no_source_unpickles():
    """torch.load and pickle are nowhere; the one torch.save writes hqq's own format."""
    root = Path(lmq.__file__).resolve().parent.parent
    words = (
        "torch.load",
        "import pickle",
        "pickle.load",
        "cloudpickle",
        "joblib",
        "allow_pickle=True",
        "trust_remote_code=True",
    )
    texts = {
        path: path.read_text() for room in ("lmq", "storage", "tasks", "flows") for path in (root / room).rglob("*.py")
    }
    assert len(texts) > 100
    assert [(path.name, word) for path, text in texts.items() for word in words if word in text] == []


def test_every_call_of_transformers_says_that_foreign_code_is_not_run():
    """Where nothing is said, transformers asks on the terminal."""
    root = Path(lmq.__file__).resolve().parent.parent
    calls = [
        (path.name, node)
        for room in ("lmq", "storage", "tasks", "flows")
        for path in (root / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and re.match(r"Auto\w+\.from_(pretrained|config)$", ast.unparse(node.func))
    ]
    assert len(calls) > 10
    silent = [
        f"{name}:{call.lineno}"
        for name, call in calls
        if not any(ast.unparse(option) == "trust_remote_code=False" for option in call.keywords)
    ]
    assert silent == []


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..\\b", "", 3, None])
def test_an_index_of_shards_cannot_point_out_of_the_model(model, shard):
    (model / "model.safetensors").unlink()
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(InputError, match="which is not a file of the model"):
        weight_files(model)


def test_shards_may_be_links_as_in_the_hubs_cache(model, tmp_path):
    (model / "model.safetensors").rename(tmp_path / "blob")
    (model / "shard.safetensors").symlink_to(tmp_path / "blob")
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": "shard.safetensors"}}))
    assert [path.name for path in weight_files(model)] == ["shard.safetensors"]


@pytest.mark.parametrize("file", ["../outside.gguf", "a/../../outside.gguf", "/etc/passwd"])
def test_a_file_of_a_package_lies_inside_it(file):
    with pytest.raises(InputError, match="leads out of the package"):
        locate(ModelSource.parse(f"package:json/{file}"))


def test_only_pickled_weights_are_refused(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights can run code"):
        weight_files(model)
