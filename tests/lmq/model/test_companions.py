import shutil
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from lmq.checkpoint.write import write_checkpoint
from lmq.formats.spec import QuantSpec
from lmq.layers.prune import write_pruned
from lmq.model.companions import companion_files, is_companion
from lmq.model.discovery import discover
from lmq.model.source import ModelSource, _download, locate, source_digest
from lmq.quantizers import quantizer

COMPANIONS = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "additional_chat_templates/rag.jinja",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.bpe",
    "vocab.txt",
    "merges.txt",
    "qwen.tiktoken",
    "source.spm",
    "LICENSE",
    "LICENSE.md",
    "LICENCE.txt",
    "license.txt",
    "Gemma-License.md",
    "NOTICE",
    "USE_POLICY.md",
]
OTHERS = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "model.Q4_K_M.gguf",
    "tf_model.h5",
    "tokenizer.onnx",
    "checksums.json",
    "README.md",
    ".gitattributes",
    "original/tokenizer.model",
    "original/params.json",
    "onnx/config.json",
    "logs/additional_chat_templates/x.jinja",
]


@pytest.mark.parametrize("name", COMPANIONS)
def test_what_comes_with_the_weights(name: str) -> None:
    assert is_companion(name)


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not(name: str) -> None:
    assert not is_companion(name)


def fill(path: Path, names: list[str]) -> None:
    for name in names:
        file = path / name
        if not file.exists():
            file.parent.mkdir(exist_ok=True, parents=True)
            file.write_text(f"content of {name}")


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    fill(path, [name for name in COMPANIONS if not name.endswith("config.json")])
    return path


def test_checkpoints_and_pruned_models_have_all_of_it(model: Path, tmp_path: Path) -> None:
    structure = discover(model, weights_sha256="0")
    choice = {info.id: QuantSpec(4, 64) for info in structure.modules}
    write_checkpoint(tmp_path / "quantized", model, structure, choice, quantizer("rtn"))
    write_pruned(model, structure, [1], tmp_path / "pruned")
    expected = {file.relative_to(model).as_posix() for file in companion_files(model)}
    assert {name for name in COMPANIONS if not name.endswith("config.json")} < expected
    for written in ("quantized", "pruned"):
        names = {file.relative_to(tmp_path / written).as_posix() for file in companion_files(tmp_path / written)}
        assert names == expected
        for name in expected - {"config.json"}:
            assert (tmp_path / written / name).read_bytes() == (model / name).read_bytes()


def test_they_are_part_of_the_models_identity(model: Path) -> None:
    def digest() -> str:
        return source_digest(locate(ModelSource.parse(str(model))))

    before = digest()
    (model / "additional_chat_templates/rag.jinja").write_text("another template")
    with_template = digest()
    (model / "README.md").write_text("no companion")
    assert before != with_template == digest()


def test_two_links_to_one_blob_are_two_files(model: Path, tmp_path: Path) -> None:
    """As in the hub's cache, where blobs are named by their content, and in its shared store by a second link."""
    (model / "added_tokens.json").write_text("{}")
    (model / "special_tokens_map.json").write_text("{}")
    links, blobs = tmp_path / "links", tmp_path / "blobs"
    links.mkdir()
    blobs.mkdir()
    for number, file in enumerate(file for file in sorted(model.iterdir()) if file.is_file()):
        blob = blobs / ("braces" if file.read_text("latin-1") == "{}" else str(number))
        blob.write_bytes(file.read_bytes())
        (tmp_path / f"hop-{number}").symlink_to(blob)
        (links / file.name).symlink_to(tmp_path / f"hop-{number}")
    (links / "additional_chat_templates").symlink_to(model / "additional_chat_templates")
    plain, linked = (locate(ModelSource.parse(str(path))) for path in (model, links))
    assert source_digest(plain) == source_digest(linked)
    assert source_digest(linked, tmp_path / "digests.json") == source_digest(linked, tmp_path / "digests.json")


def test_downloads_are_what_comes_with_the_weights_and_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by the hub client's own filter."""
    asked: set[str] = set()
    files = [*COMPANIONS, *OTHERS, "model-00001-of-00002.safetensors", "consolidated.safetensors"]

    def snapshot_download(repository: str, *, revision=None, allow_patterns, ignore_patterns=None) -> str:
        found = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        asked.update(found)
        return "/cache/snapshots/commit"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert _download(ModelSource.parse("org/name")).name == "commit"
    assert set(COMPANIONS) < asked
    weights = {"model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"}
    small = {"pytorch_model.bin.index.json", "checksums.json"}
    assert weights < asked <= set(COMPANIONS) | weights | small
