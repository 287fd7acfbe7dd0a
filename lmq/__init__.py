"""Make language models smaller with the least loss, under a byte budget.

`import lmq` teaches transformers to open lmq checkpoints; `lmq.load` opens one and checks it first.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmq.checkpoint.registration import register_with_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["__version__", "load", "quantize"]

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
    """Open a checkpoint written by lmq as a transformers model in evaluation mode, one with a tower for images whole.

    `dtype` is that of the unquantized tensors and of the computation (None: as stored). With `dense` the weights
    are unpacked once: full memory, faster calls. `verify` reads all of it once more and compares it with the
    checksums that lie beside the weights. Tensors that the model's class does not have are left aside, as transformers
    leaves them.

    What GPTQ, AutoRound, AWQ or compressed-tensors quantized, and a .gguf file, is dequantized (None: to float32), and
    other methods are left to transformers; they have no checksums to `verify`. Raises DamagedFile or InputError naming
    what is wrong.
    """
    from lmq.checkpoint.config import QUANT_METHOD
    from lmq.checkpoint.open import open_gguf, open_model_directory, quantization_method
    from lmq.checkpoint.verify import verify_checkpoint
    from lmq.errors import DamagedFile, InputError
    from lmq.model.auto_class import auto_class_of
    from lmq.model.skeleton import read_model_config
    from lmq.model.transformers_lock import TRANSFORMERS_LOCK

    is_gguf = Path(path).suffix == ".gguf"
    if is_gguf or quantization_method(Path(path)) not in (None, QUANT_METHOD):
        if verify:
            raise InputError(f"{path} is not a checkpoint of lmq and has no checksums; leave out verify")
        if is_gguf:
            return open_gguf(Path(path), dtype=dtype, device=device)
        return open_model_directory(Path(path), dtype=dtype, device=device, dense=True)
    verify_checkpoint(Path(path), checksums=verify)
    precision = "auto" if dtype is None else dtype
    auto_class = auto_class_of(read_model_config(Path(path)))
    with TRANSFORMERS_LOCK:
        opened: Any = auto_class.from_pretrained(
            path, dtype=precision, trust_remote_code=False, output_loading_info=True
        )
    model, report = opened
    for problem, names in report.items():  # transformers would warn, and make missing tensors up
        if names and problem != "unexpected_keys":  # a model may store more than its class has
            raise DamagedFile(f"{path} does not fit its model: {problem} {sorted(map(str, names))[0]}")
    if dense:
        model.dequantize()
    return model.to(device).eval()


def quantize(
    model: str | PathLike[str],
    *,
    size: str | None = None,
    bits: float | None = None,
    plan: str | PathLike[str] | None = None,
    fit_gpu: str | None = None,
    context: str | None = None,
    output: str | PathLike[str] | None = None,
    effort: str = "normal",
    equalize: bool | None = None,
    target: str | None = None,
    store: str = "store",
) -> Path:
    """Make a smaller checkpoint of a model, and return its path: what `lmq quantize` does, as a run that can go on.

    A notebook shows the path with the report of the run.

    `model` is a hub id, a directory, a .gguf file or package:NAME/FILE; `size` that of the whole checkpoint, as in
    "400MB", with embedding and head quantized, or `bits` per weight of the matrices in its blocks, or the `plan` of a
    run (its directory, name or allocation-*.csv) of a model of the same structure, or `fit_gpu` the memory of a GPU, as
    in "24GB", that is to hold it beside the cache of `context` tokens, as in "32k"; `effort` quick, normal or best;
    `equalize` rescales channels between matrices first, which computes the same (`lmq.checkpoint.equalized`); None:
    with the effort best. With a `target` (llama.cpp, vllm, gptq, gptq-symmetric, auto-round, awq) plans are over what
    it holds, and the path is an export for it. `output` is named after model and size where it is not given. What is
    measured is kept in `store`, and the report in `runs/`. Raises InputError for what cannot be made, such as a size
    below the smallest, which it names.
    """
    one_model = import_module("lmq_flows.run.one_model")  # flows are built on this library, which knows nothing of them
    where = None if output is None else Path(output)
    given = None if plan is None else str(plan)
    goal = one_model.Goal(
        model=str(model),
        size=size,
        bits=bits,
        plan=given,
        fit_gpu=fit_gpu,
        context=context,
        output=where,
        effort=effort,
        equalize=equalize,
        target=target,
        store=store,
    )
    made: Path = one_model.reach_in_notebook(goal)
    return made
