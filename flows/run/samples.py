"""A few words that models write, to be read side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from lmq.text.calibration import load_tokenizer

PROMPT = "The easiest way to learn a new language is"
_NEW_TOKENS = 24


def samples(model_dirs: Sequence[Path]) -> list[str] | None:
    """What each model writes on from the prompt, its likeliest word every time; None where memory may not do."""
    from lmq.checkpoint.open import open_model_directory

    if any(2 * _weights_bytes(path) > psutil.virtual_memory().available for path in model_dirs):
        return None
    written = []
    for path in model_dirs:
        tokenizer = load_tokenizer(path)
        model: Any = open_model_directory(path)
        prompt = tokenizer(PROMPT, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(**prompt, max_new_tokens=_NEW_TOKENS, do_sample=False)[0]
        text = tokenizer.decode(tokens[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        written.append(str(text).strip())
    return written


def _weights_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
