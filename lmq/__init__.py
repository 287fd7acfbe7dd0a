"""Make language models smaller with the least loss, under a byte budget.

`import lmq` teaches transformers to open lmq checkpoints; `lmq.load` opens one and checks it first.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmq.checkpoint.registration import register_with_transformers

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
    verify: bool = False,
) -> PreTrainedModel:
    """Open a checkpoint written by lmq as a transformers model in evaluation mode.

    `dtype` is that of the unquantized tensors and of the computation (None: as stored). With `dense` the weights
    are unpacked once: full memory, faster calls. `verify` reads all of it once more and compares it with the
    checksums that lie beside the weights. Tensors that the model's class does not have are left aside, as transformers
    leaves them. Raises DamagedFile or InputError naming what is wrong.
    """
    from transformers import AutoModelForCausalLM

    from lmq.checkpoint.verify import verify_checkpoint
    from lmq.errors import DamagedFile
    from lmq.model.transformers_lock import TRANSFORMERS_LOCK

    verify_checkpoint(Path(path), checksums=verify)
    precision = "auto" if dtype is None else dtype
    with TRANSFORMERS_LOCK:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=precision, trust_remote_code=False, output_loading_info=True
        )
    model, report = opened
    for problem, names in report.items():  # transformers would warn, and make missing tensors up
        if names and problem != "unexpected_keys":  # a model may store more than its class has
            raise DamagedFile(f"{path} does not fit its model: {problem} {sorted(map(str, names))[0]}")
    if dense:
        model.dequantize()
    return model.to(device).eval()
