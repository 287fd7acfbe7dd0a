"""What comes with a model's weights: the one list, for downloads, checkpoints, exports and pruned models.

Configuration, generation and processor settings, tokenizers under any of the names in use, chat templates (one in
`chat_template.jinja`, further ones by name in `additional_chat_templates/`), code, and the terms of the licence.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

TEMPLATES_FOLDER = "additional_chat_templates"

COMPANION_PATTERNS = (
    "*.json",
    "*.jinja",
    f"{TEMPLATES_FOLDER}/*.jinja",
    "*.txt",
    "*.py",
    "*.model",
    "*.tiktoken",
    "*.vocab",
    "*.bpe",
    "*.spm",
    "*tokenizer*",
    "*vocab*",
    "*merges*",
    "*LICEN[CS]E*",
    "*[Ll]icen[cs]e*",
    "COPYING*",
    "NOTICE*",
    "*USE_POLICY*",
)
"""Patterns of `fnmatch`, as the hub's client takes them."""

OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.npz", "*.ot", "*.tflite")
"""Weights in the forms that are not read, which repositories hold beside safetensors."""

_NOT_COMPANIONS = ("*.index.json", "checksums.json", "*.safetensors", *OTHER_WEIGHTS, ".*")
"""Weights, and what describes the source's own: its index and its checksums."""


def companion_files(model_dir: Path) -> list[Path]:
    """The files of a model directory that come with its weights, sorted by their path; links are followed."""
    folders = (model_dir, model_dir / TEMPLATES_FOLDER)
    files = (file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir()))
    return [file for file in files if file.is_file() and is_companion(file.relative_to(model_dir).as_posix())]


def is_companion(name: str) -> bool:
    """Whether a file of a model, by its path in the model's directory, comes with the weights."""
    if "/" in name and not fnmatchcase(name, f"{TEMPLATES_FOLDER}/*.jinja"):
        return False
    return any(fnmatchcase(name, pattern) for pattern in COMPANION_PATTERNS) and not any(
        fnmatchcase(name, pattern) for pattern in _NOT_COMPANIONS
    )
