"""Opening of a model directory as it is served: plain, of lmq, or quantized by another program.

`open_model_directory` opens the whole model. `QuantizedBlocks` opens a checkpoint of lmq one block at a time.
`open_dense` opens the dense weights that `lmq.checkpoint.dense_state` makes of checkpoints of other programs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lmq import load
from lmq.checkpoint.config import QUANT_METHOD
from lmq.checkpoint.dense_state import DENSE_STATES, SELF_READ, has_float4
from lmq.checkpoint.verify import read_quantization_config, verify_checkpoint
from lmq.errors import DamagedFile, InputError, LmqError
from lmq.formats.packed_layer import QuantizedMatrix
from lmq.model.auto_class import auto_class_of
from lmq.model.skeleton import read_model_config, skeleton_of
from lmq.model.source import nearest_sibling
from lmq.model.stored import StoredModel, match_tensors, read_stored_model
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure, ModuleInfo
from lmq.model.tensors import read_headers, read_tensors
from lmq.model.transformers_lock import TRANSFORMERS_LOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DOES_NOT_OPEN = (
    SafetensorError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)
"""What transformers and the packages it calls raise for files and versions that do not go together."""


def open_model_directory(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", dense: bool = False
) -> PreTrainedModel:
    """The model in evaluation mode, by plain `from_pretrained`, in `dtype` (None: as stored).

    With `dense` a checkpoint of lmq is unpacked once: full memory, faster calls; those of GPTQ, AutoRound and AWQ are
    dequantized, and no package of theirs is needed; compressed-tensors with 4-bit floats are so by its package. Raises
    InputError where there is no model directory or a package that opens it is missing, DamagedFile for a damaged
    checkpoint, and LmqError where it does not open for another reason, or not completely.
    """
    fields = _quantization_config(path)
    method = _method(fields)
    if method == QUANT_METHOD:
        return load(path, device=device, dtype=dtype, dense=dense)
    if dense and (method in SELF_READ or (method == "compressed-tensors" and has_float4(fields or {}))):
        return _open_dense(path, method, dtype, device)
    if method is not None and method not in (known := _quantization_methods()):
        raise InputError(
            f"{path} is quantized by {method}, which this transformers does not open; it opens: {', '.join(known)}"
        )
    try:
        return _open_completely(path, dtype, device)
    except ImportError as error:
        raise InputError(
            f"{path} is quantized by {method}, and a package that opens it is missing: {_first_line(error)}"
        ) from error
    except DOES_NOT_OPEN as error:
        if method == "compressed-tensors":
            return _open_dense(path, method, dtype, device)
        raise LmqError(f"{path} ({method or 'not quantized'}) does not open: {_first_line(error)}") from error


def quantization_method(path: Path) -> str | None:
    """`quant_method` of a model directory's configuration, None for a plain model. Raises InputError."""
    return _method(_quantization_config(path))


def _method(fields: Mapping[str, Any] | None) -> str | None:
    return None if fields is None else str(fields.get("quant_method", "an unnamed method"))


def _quantization_config(path: Path) -> dict[str, Any] | None:
    if not path.is_dir():
        raise InputError(f"there is no model directory {path}{nearest_sibling(path)}")
    try:
        return json.loads((path / "config.json").read_text("utf-8")).get("quantization_config")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} has no config.json that can be read ({error}); is it a model directory?") from error


def _quantization_methods() -> list[str]:
    """Methods whose models this transformers opens, by the names that a configuration gives them."""
    with TRANSFORMERS_LOCK:
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    return sorted({name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING})


def open_dense(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of another program's checkpoint with dense weights in `dtype`, all of it in memory.

    Raises InputError for another directory and without a package that it takes, LmqError where tensors are missing.
    """
    with TRANSFORMERS_LOCK:
        from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    fields = getattr(config, "quantization_config", None)
    if not isinstance(fields, dict) or fields.get("quant_method") not in DENSE_STATES:
        raise InputError(
            f"{path} is not a checkpoint of {', '.join(DENSE_STATES)}: see quantization_config in its config.json"
        )
    del config.quantization_config
    state = DENSE_STATES[fields["quant_method"]](path, fields, dtype)
    auto_class = auto_class_of(config)
    with TRANSFORMERS_LOCK:
        with torch.device("meta"):
            architecture = type(auto_class.from_config(config, trust_remote_code=False))
        model, found = architecture.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    amiss = {what: sorted(map(str, names)) for what, names in found.items() if names and what != "unexpected_keys"}
    if amiss:
        raise LmqError(f"{path} does not hold the tensors of its model: {amiss}; write it again")
    return model.eval()


def open_gguf(path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model of a GGUF file with dense weights in `dtype` (None: float32), as transformers reads it.

    Raises InputError where there is no such file, LmqError where it does not open.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}{nearest_sibling(path)}")
    with TRANSFORMERS_LOCK:
        from transformers import AutoModelForCausalLM

        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype or torch.float32, trust_remote_code=False
            )
        except (*DOES_NOT_OPEN, NotImplementedError, struct.error) as error:
            raise LmqError(f"{path} does not open as a GGUF model: {_first_line(error)}") from error
    return model.to(device).eval()


class QuantizedBlocks:
    """Reads the quantized modules of a checkpoint layer by layer, so that it is evaluated without being loaded.

    Raises DamagedFile or InputError, as `verify_checkpoint` does, when it is opened.
    """

    def __init__(self, path: Path, structure: ModelStructure):
        verify_checkpoint(path)
        self._structure = structure
        config = read_quantization_config(path)
        self.specs, self._axis = config.specs, config.axis
        self._headers = read_headers(path)

    @property
    def embeddings(self) -> tuple[ModuleInfo, ...]:
        """The input embedding and the head where they are quantized."""
        return tuple(info for info in self._structure.embeddings if self._structure.path(info.id) in self.specs)

    def put_around(self, model: StreamedModel) -> None:
        """Give a streamed source model the checkpoint's embeddings, dequantized."""
        for module in self.embeddings:
            model.put_embedding(module, self._weight(module))

    def put_in(self, block: nn.Module, layer: int) -> None:
        """Replace the weights of a source block by the checkpoint's, dequantized to the block's dtype.

        Modules that the checkpoint keeps unquantized stay as they are.
        """
        for module in self._structure.in_layer(layer):
            if self._structure.path(module.id) not in self.specs:
                continue
            linear = block.get_submodule(module.id.kind)
            weight = self._weight(module).to(linear.get_parameter("weight"))
            linear.weight = nn.Parameter(weight, requires_grad=False)

    def _weight(self, module: ModuleInfo) -> Tensor:
        path = self._structure.path(module.id)
        quantized = QuantizedMatrix(module.in_features, module.out_features, self.specs[path], axis=self._axis)
        stored = read_tensors(self._headers[f"{path}.{name}"] for name in quantized.state_dict())
        quantized.load_state_dict({name: stored[f"{path}.{name}"] for name in quantized.state_dict()})
        return quantized.dequantize()


def read_stored_directory(path: Path) -> StoredModel:
    """The tensors of a plain directory or of a checkpoint of lmq, by the names of the model they are opened with.

    Raises as `lmq.model.stored.read_stored_model`, and InputError for a quantization other than lmq's.
    """
    from lmq.checkpoint.hf import put_quantized_layers

    if quantization_method(path) is None:
        return read_stored_model(path)
    quantization = read_quantization_config(path)
    config = read_model_config(path)
    del config.quantization_config
    model = skeleton_of(config, str(path))
    put_quantized_layers(model, quantization)
    return match_tensors(model, read_headers(path))


def _open_completely(path: Path, dtype: torch.dtype | None, device: torch.device | str) -> PreTrainedModel:
    """A model whose tensors all come from the files: transformers makes up what is missing."""
    auto_class = auto_class_of(read_model_config(path))
    with TRANSFORMERS_LOCK:
        opened: Any = auto_class.from_pretrained(
            path,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    model, info = opened
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise DamagedFile(f"{path} lacks the tensor {missing[0]} and {len(missing) - 1} more; download it again")
    return model.to(device).eval()


def _open_dense(path: Path, method: str, dtype: torch.dtype | None, device: torch.device | str) -> PreTrainedModel:
    try:
        model: Any = open_dense(path, dtype or torch.float32)
    except DOES_NOT_OPEN as error:
        raise LmqError(f"{path} ({method}) does not open: {_first_line(error)}") from error
    return model.to(device)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
