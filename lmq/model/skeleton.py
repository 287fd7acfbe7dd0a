"""A model built from its configuration without memory for its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from lmq.errors import InputError, UnsupportedModel
from lmq.model.auto_class import auto_class_of
from lmq.model.transformers_lock import TRANSFORMERS_LOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_FIRST_VALUES = {"normal_", "uniform_", "kaiming_uniform_"}
"""Names of the functions, of `torch.nn.init` as of transformers, that draw a tensor's values."""

_OF_THE_CLASS = (AttributeError, TypeError, LookupError, RuntimeError, AssertionError)
"""What a class of transformers raises of a configuration that it does not suit."""


class _EmptyWithoutMemory(TorchFunctionMode):
    """Inside it, in this thread, torch.empty (what layers make their weights with) takes no memory.

    Nor do such weights take time: their first random values, which come to nothing, are not drawn.
    Tensors that are computed, such as the frequencies of rotary embeddings, stay real: they are in no checkpoint.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FIRST_VALUES:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **{**kwargs, "device": "meta"} if func is torch.empty else kwargs)


def read_model_config(model_dir: Path) -> Any:
    """The configuration of a model directory, as transformers completes it.

    Raises InputError without a config.json, UnsupportedModel when transformers does not know it.
    """
    if not (model_dir / "config.json").is_file():
        raise InputError(f"{model_dir} has no config.json; is it a model directory?")
    try:
        with TRANSFORMERS_LOCK:
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, LookupError) as error:
        raise UnsupportedModel(
            f"{model_dir}/config.json describes no model that transformers has: {_without_advice(error)}"
        ) from error


def build_skeleton(model_dir: Path) -> PreTrainedModel:
    """The model of a directory's config.json with its weights on the meta device, for evaluation in float32.

    Raises UnsupportedModel when transformers knows no such language model, or when it is quantized already.
    """
    config = read_model_config(model_dir)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        settings = quantization if isinstance(quantization, Mapping) else vars(quantization)
        raise UnsupportedModel(
            f"{model_dir} is quantized already ({settings.get('quant_method', 'unknown method')}); "
            "pass the full-precision model it was made from"
        )
    return skeleton_of(config, str(model_dir))


def skeleton_of(config: Any, name: str) -> PreTrainedModel:
    """The model of a configuration as `build_skeleton` makes it; `name` is what errors call it."""
    auto_class = auto_class_of(config)
    try:
        with TRANSFORMERS_LOCK, _EmptyWithoutMemory():
            model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, ImportError, *_OF_THE_CLASS) as error:
        raise UnsupportedModel(_cannot_be_built(config, name, error)) from error
    lost = [
        buffer
        for buffer in set(dict(model.named_buffers())) - set(model.state_dict())
        if model.get_buffer(buffer).is_meta
    ]
    if lost:
        raise UnsupportedModel(
            f"{type(model).__name__} has a buffer {lost[0]} that is in no checkpoint; cannot rebuild it"
        )
    return model.eval().requires_grad_(False)


def _cannot_be_built(config: Any, name: str, error: Exception) -> str:
    if "Unrecognized configuration class" in str(error):  # goes on with every class that transformers has
        saved_as = ", ".join(getattr(config, "architectures", None) or ()) or "a class that it does not name"
        return (
            f"{name} cannot be built as a language model: transformers has no model of type {config.model_type} that "
            f"predicts the next token (it was saved as {saved_as}); pass a causal language model or an "
            "image classifier"
        )
    cause = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"{name} ({config.model_type}) cannot be built as a language model: {cause}"


def _without_advice(error: Exception) -> str:
    """What transformers says, but for its advice to run the code that came with the model: lmq never does."""
    if "trust_remote_code" in str(error):
        return "it needs Python code that came with it, which lmq does not run; pass a model that transformers knows"
    return str(error)
