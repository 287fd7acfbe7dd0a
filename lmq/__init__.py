"""Make language models smaller with the least loss, under a byte budget.

`import lmq` teaches transformers to open lmq checkpoints; `lmq.load` opens one and checks it first.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmq.registration import register_with_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["__version__", "load"]

try:
    __version__ = version("lmq")
except PackageNotFoundError:
    __version__ = "unknown"

register_with_transformers()


def load(
    path: str | PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    dense: bool = False,
) -> PreTrainedModel:
    """Open a checkpoint written by lmq as a transformers model in evaluation mode.

    `dtype` is that of the unquantized tensors and of the computation (None: as stored). With `dense` the weights
    are unpacked once: full memory, faster calls. Raises DamagedFile or InputError naming what is wrong.
    """
    from transformers import AutoModelForCausalLM

    from lmq.checkpoint import verify_checkpoint

    verify_checkpoint(Path(path))
    precision = "auto" if dtype is None else dtype
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=precision, trust_remote_code=False)
    if dense:
        model.dequantize()
    return model.to(device).eval()
