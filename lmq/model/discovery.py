"""What a model is made of, found in the model itself: no table of architectures, and no weight is read.

The model is built from its configuration without memory for its weights. The decoder blocks are the ModuleList
with the most parameters; every nn.Linear inside a block is a module that can be quantized.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from lmq.errors import InputError, UnsupportedModel
from lmq.model.source import ModelSource, locate, source_digest
from lmq.model.structure import ModelStructure, ModuleId, ModuleInfo
from lmq.model.tensors import StoredTensor, find_tensor, read_headers, read_tensors

_FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def discover(model_dir: Path, *, weights_sha256: str | None = None) -> ModelStructure:
    """Discover the structure of a safetensors checkpoint from its configuration and headers.

    `weights_sha256` is the digest of the model, computed here when it is not given. Raises UnsupportedModel
    naming what cannot be quantized (weights of a block outside nn.Linear, such as Conv1D or fused experts; a
    checkpoint that is quantized already; tensors that are missing), InputError for damaged files.
    """
    model = build_skeleton(model_dir)
    layers_path = find_layers(model)
    hidden_size = model.config.get_text_config().hidden_size
    modules = tuple(_modules(model.get_submodule(layers_path), layers_path, hidden_size))
    stored = match_tensors(model, read_headers(model_dir))
    quantized = {f"{layers_path}.{info.id.layer}.{info.id.kind}.weight" for info in modules}
    dtype = _common_dtype([(name, stored[name]) for name in sorted(quantized)])
    tied = {name for name, source in model.all_tied_weights_keys.items() if stored[name] == stored[source]}
    other_parameters = sum(tensor.elements for name, tensor in stored.items() if name not in quantized | tied)
    if weights_sha256 is None:
        weights_sha256 = source_digest(locate(ModelSource(kind="directory", place=str(model_dir))))
    return ModelStructure(
        architecture=type(model).__name__,
        dtype=dtype,
        layers_path=layers_path,
        layers=modules[-1].id.layer + 1,
        hidden_size=hidden_size,
        vocabulary_size=embedding_shape(model)[0],
        tied_embeddings=bool(tied),
        modules=modules,
        other_parameters=other_parameters,
        other_bytes=other_parameters * getattr(torch, dtype).itemsize,
        weights_sha256=weights_sha256,
    )


class _EmptyWithoutMemory(TorchFunctionMode):
    """Inside it, in this thread, torch.empty (what layers make their weights with) takes no memory.

    Tensors that are computed, such as the frequencies of rotary embeddings, stay real: they are in no checkpoint.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "device": "meta"} if func is torch.empty else kwargs)


def build_skeleton(model_dir: Path) -> PreTrainedModel:
    """The model of a directory's config.json with its weights on the meta device, for evaluation in float32.

    Raises UnsupportedModel when transformers knows no such language model, or when it is quantized already.
    """
    if not (model_dir / "config.json").is_file():
        raise InputError(f"{model_dir} has no config.json; is it a model directory?")
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, LookupError) as error:
        raise UnsupportedModel(
            f"{model_dir}/config.json describes no model that transformers has: {_without_advice(error)}"
        ) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        settings = quantization if isinstance(quantization, Mapping) else vars(quantization)
        raise UnsupportedModel(
            f"{model_dir} is quantized already ({settings.get('quant_method', 'unknown method')}); "
            "pass the full-precision model it was made from"
        )
    try:
        with _EmptyWithoutMemory():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedModel(
            f"{model_dir} ({config.model_type}) cannot be built as a language model: {error}"
        ) from error
    lost = [
        name for name in set(dict(model.named_buffers())) - set(model.state_dict()) if model.get_buffer(name).is_meta
    ]
    if lost:
        raise UnsupportedModel(
            f"{type(model).__name__} has a buffer {lost[0]} that is in no checkpoint; cannot rebuild it"
        )
    return model.eval().requires_grad_(False)


def _without_advice(error: Exception) -> str:
    """What transformers says, but for its advice to run the code that came with the model: lmq never does."""
    if "trust_remote_code" in str(error):
        return "it needs Python code that came with it, which lmq does not run; pass a model that transformers knows"
    return str(error)


def embedding_shape(model: PreTrainedModel) -> torch.Size:
    """Shape [vocabulary, embedding] of the table of token embeddings."""
    return model.get_input_embeddings().get_parameter("weight").shape


def find_layers(model: PreTrainedModel) -> str:
    """Path of the list of decoder blocks: the ModuleList of the decoder that holds the most parameters."""
    decoder = model.get_decoder()
    sizes = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(module is inner for inner in decoder.modules())
    }
    if not any(sizes.values()):
        raise UnsupportedModel(f"{type(model).__name__} has no list of decoder blocks, which lmq works through")
    return max(sizes, key=lambda path: sizes[path])


def match_tensors(model: PreTrainedModel, headers: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored tensor of every tensor of the model; tied tensors that hold the same values share one.

    Raises UnsupportedModel naming tensors that are missing, or whose shape is not what the configuration says.
    """
    stored: dict[str, StoredTensor] = {}
    expected = model.state_dict()
    renamed = _by_own_names(model, headers)
    for name, tensor in expected.items():
        found = find_tensor(headers, name) or renamed.get(name)
        if found is not None and found.shape != tuple(tensor.shape):
            raise UnsupportedModel(
                f"{found.file} holds {found.name} of shape {list(found.shape)} where config.json means "
                f"{list(tensor.shape)}; the checkpoint does not belong to its configuration"
            )
        if found is not None:
            stored[name] = found
    for name, source in model.all_tied_weights_keys.items():
        if name in stored and source in stored and not _same_values(stored[name], stored[source]):
            continue
        either = stored.get(source) or stored.get(name)
        if either is not None:
            stored[name] = stored[source] = either
    missing = [name for name in expected if name not in stored]
    if missing:
        raise UnsupportedModel(
            f"the checkpoint lacks {len(missing)} of the {len(expected)} tensors of {type(model).__name__}: "
            f"{_first_of(missing)}; it holds {_first_of(list(headers))}"
        )
    return stored


def _by_own_names(model: PreTrainedModel, headers: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Stored tensors by the names of the model's own: transformers renames some of those that are saved."""
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    found = {}
    for stored_name, tensor in headers.items():
        name = stored_name
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        found[name] = tensor
    return found


def _first_of(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _same_values(first: StoredTensor, second: StoredTensor) -> bool:
    values = [read_tensors([tensor])[tensor.name] for tensor in (first, second)]
    return torch.equal(*values)


def _modules(blocks: nn.Module, layers_path: str, hidden_size: int) -> Iterator[ModuleInfo]:
    for layer, block in enumerate(blocks.children()):
        linear = {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear)}
        for path, module in block.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1 and path not in linear:
                    raise UnsupportedModel(
                        f"{layers_path}.{layer}.{path} is a {type(module).__name__} with {name} of shape "
                        f"{list(parameter.shape)}; lmq quantizes nn.Linear only (no Conv1D, no fused experts)"
                    )
        if not linear:
            raise UnsupportedModel(f"{layers_path}.{layer} ({type(block).__name__}) holds no nn.Linear to quantize")
        parts = _parts(linear, hidden_size, block_path=f"{layers_path}.{layer}")
        for kind, module in linear.items():
            yield ModuleInfo(ModuleId(layer, kind), module.out_features, module.in_features, parts[kind])


def _parts(linear: Mapping[str, nn.Linear], hidden_size: int, block_path: str) -> dict[str, str]:
    """The part of each module kind of one block.

    Modules below a submodule named for attention are attention, the others MLP. The way out of either is the
    module registered last of those with `hidden_size` outputs; all others are the way in.
    """
    attention = [kind for kind in linear if re.search("attn|attention", kind.rpartition(".")[0])]
    feed_forward = [kind for kind in linear if kind not in attention]
    parts: dict[str, str] = {}
    for kinds, way_in, way_out in ((attention, "attn_in", "attn_out"), (feed_forward, "mlp_gate", "mlp_down")):
        outputs = [kind for kind in kinds if linear[kind].out_features == hidden_size]
        if kinds and not outputs:
            raise UnsupportedModel(
                f"{block_path}: none of {', '.join(kinds)} leads back to the hidden size {hidden_size}"
            )
        parts.update({kind: way_out if kind == outputs[-1] else way_in for kind in kinds})
    return parts


def _common_dtype(tensors: Iterable[tuple[str, StoredTensor]]) -> str:
    counts: Counter[str] = Counter()
    for name, tensor in tensors:
        if tensor.dtype not in _FLOAT_TYPES:
            raise UnsupportedModel(
                f"{name} is stored as {tensor.dtype}; lmq reads {', '.join(_FLOAT_TYPES)}; "
                "pass the full-precision model"
            )
        counts[_FLOAT_TYPES[tensor.dtype]] += 1
    return counts.most_common(1)[0][0]
