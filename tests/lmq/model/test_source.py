import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from lmq.errors import InputError
from lmq.model.discovery import discover
from lmq.model.source import ModelSource, convert_gguf, locate, needs_conversion, source_digest
from lmq.model.stored_matrices import load_layer_weights

VOCABULARY, HIDDEN, INTERMEDIATE = 259, 32, 64


def write_gguf(path: Path, dtype: type) -> dict[str, np.ndarray]:
    """A tiny Llama with a byte-level tokenizer, and its tensors by GGUF name."""
    generator = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output.weight": (VOCABULARY, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        **{f"blk.0.attn_{name}.weight": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")},
        "blk.0.ffn_down.weight": (HIDDEN, INTERMEDIATE),
        **{f"blk.0.{name}_norm.weight": (HIDDEN,) for name in ("attn", "ffn")},
    }
    tensors = {name: generator.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<bos>", "<eos>", *sorted(ByteLevel.alphabet()), "ab"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, *[1] * 257])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", np.float32)
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ModelSource(kind="hub", place="org/name")),
        ("org/name@v1.0", ModelSource(kind="hub", place="org/name", revision="v1.0")),
        ("./somewhere", ModelSource(kind="directory", place="./somewhere")),
        ("a/b.gguf", ModelSource(kind="gguf", place="a/b.gguf")),
        ("package:name/data/model.gguf", ModelSource(kind="package", place="name/data/model.gguf")),
    ],
)
def test_parse(text: str, expected: ModelSource) -> None:
    assert ModelSource.parse(text) == expected


def test_a_directory_that_exists_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert ModelSource.parse("org/name").kind == "directory"


@pytest.mark.parametrize(
    ("text", "sha256", "message"),
    [
        ("no model at all", None, "give a hub id"),
        ("package:name", None, "write package:NAME/FILE"),
        ("org/name", "0" * 64, "is not a single file; remove it"),
    ],
)
def test_parse_refuses(text: str, sha256: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelSource.parse(text, sha256)


def test_paths_that_do_not_exist_suggest_a_sibling(gguf_file: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*tiney\.gguf; did you mean .*tiny\.gguf\?"):
        locate(ModelSource.parse(str(gguf_file.with_name("tiney.gguf"))))
    (gguf_file.parent / "models").mkdir()
    with pytest.raises(InputError, match=r"there is no model directory .*; did you mean .*models\?"):
        locate(ModelSource.parse(str(gguf_file.parent / "model")))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"has no config\.json"),
        (["config.json"], r"holds no model\.safetensors and no .*index\.json; is this a model directory"),
        (["config.json", "weights.safetensors"], r"only weights\.safetensors, which transformers does not look for"),
        (["config.json", "pytorch_model.bin"], r"only pytorch_model\.bin: pickled weights can run code"),
        (["config.json", "model.Q4.gguf"], r"to use its GGUF file, pass .*model\.Q4\.gguf"),
    ],
)
def test_directories_without_safetensors_are_refused(files: list[str], message: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=message):
        locate(ModelSource.parse(str(tmp_path)))


def test_a_hub_model_that_cannot_be_fetched_says_what_to_pass_instead() -> None:
    with pytest.raises(InputError, match=r"'no-such/model@main' .*pass the path of a local model directory"):
        locate(ModelSource.parse("no-such/model@main"))


def test_a_file_inside_a_package_is_found_without_importing_it(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "weights_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copy(gguf_file, package / "model.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    located = locate(ModelSource.parse("package:weights_package/model.gguf"))
    assert located.path == package / "model.gguf"
    assert needs_conversion(located)
    assert "weights_package" not in sys.modules
    with pytest.raises(InputError, match="there is no Python package 'no_such_package'"):
        locate(ModelSource.parse("package:no_such_package/model.gguf"))


def test_the_expected_sha256_is_checked(gguf_file: Path) -> None:
    right = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert locate(ModelSource.parse(str(gguf_file), right.upper())).files == (gguf_file,)
    with pytest.raises(InputError, match=f"has sha256 {right}, not {'0' * 64} as expected"):
        locate(ModelSource.parse(str(gguf_file), "0" * 64))


def test_identity_is_the_content_not_the_place(tiny_llama: Path, gguf_file: Path, tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return source_digest(locate(ModelSource.parse(str(path))))

    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    assert digest(copy) == digest(tiny_llama)
    (copy / "README.md").write_text("not part of a model")
    assert digest(copy) == digest(tiny_llama)
    (copy / "tokenizer_config.json").write_text("{}")
    assert digest(copy) != digest(tiny_llama)
    renamed = shutil.copy(gguf_file, tmp_path / "renamed.gguf")
    assert digest(renamed) == digest(gguf_file)


def test_the_digest_cache_is_used_renewed_and_mended(tiny_llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    located, cache = locate(ModelSource.parse(str(copy))), tmp_path / "cache" / "digests.json"
    digest = source_digest(located, cache)
    entries = json.loads(cache.read_text())
    config = str((copy / "config.json").resolve())
    entries[config]["sha256"] = "0" * 64
    cache.write_text(json.dumps(entries))
    assert source_digest(located, cache) != digest  # taken from the cache without reading the file
    os.utime(config, ns=(1, 1))
    assert source_digest(located, cache) == digest  # another time: read again
    cache.write_text("{ damaged")
    assert source_digest(located, cache) == digest
    assert [path.name for path in cache.parent.iterdir()] == ["digests.json"]


@pytest.mark.parametrize(("dtype", "expected"), [(np.float16, "float16"), (np.float32, "float32")])
def test_gguf_values_are_kept_exactly_in_the_smallest_type(dtype: type, expected: str, tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf", dtype)
    out_dir = tmp_path / "converted"
    convert_gguf(tmp_path / "tiny.gguf", out_dir)
    structure = discover(out_dir)
    assert structure.dtype == expected
    weights = load_layer_weights(out_dir, structure, 0)
    for kind, name in {"mlp.down_proj": "blk.0.ffn_down.weight", "self_attn.v_proj": "blk.0.attn_v.weight"}.items():
        assert torch.equal(weights[kind], torch.from_numpy(tensors[name]).float())
    assert AutoTokenizer.from_pretrained(out_dir).decode([2, 3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "tiny.gguf"]


def test_a_gguf_file_that_cannot_be_read_leaves_nothing_behind(gguf_file: Path, tmp_path: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:20_000])
    with pytest.raises(InputError, match=r"tiny\.gguf cannot be read as a GGUF model"):
        convert_gguf(gguf_file, tmp_path / "converted")
    assert list(tmp_path.iterdir()) == [gguf_file]
    gguf_file.write_bytes(b"something else")
    with pytest.raises(InputError, match="does not begin with 'GGUF'"):
        locate(ModelSource.parse(str(gguf_file)))


def test_a_directory_with_files_is_not_overwritten(gguf_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        convert_gguf(gguf_file, tmp_path)
