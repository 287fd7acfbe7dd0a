"""Whether a model can do what is asked of it, tried on a few arbitrary states before anything is measured.

Everything that lmq measures rests on five properties: blocks run one by one on hidden states alone, return states of
the same shape, let a gradient through, read the text one way, and the model's class opens with other layers in the
place of its linear ones.
Blocks run here without weights, on the meta device, so that a model of any size takes seconds.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lmq.checkpoint.config import LmqConfig
from lmq.errors import UnsupportedModel
from lmq.formats.packed_layer import QuantizedLinear
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model.block_inputs import BlockInputs
from lmq.model.causality import require_causal
from lmq.model.experts import split_experts
from lmq.model.skeleton import build_skeleton
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure, ModuleId, ModuleInfo

_log = logging.getLogger(__name__)

_TOKENS = 4
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, NotImplementedError)
"""What code of models raises for states and layers that it was not made for."""


def dry_run(model_dir: Path, structure: ModelStructure) -> tuple[ModuleId, ...]:
    """Raise UnsupportedModel naming the property that the model lacks.

    Blocks beside a language model are tried by `lmq.model.beside`, on an image, where they are measured.

    Returns the modules that their blocks never call, using the weight themselves (`dt_proj` of Mamba): nothing can be
    measured of them, so they are to be kept as they are.
    """
    try:
        model = StreamedModel.open(model_dir, structure)
        inputs = model.block_inputs(_TOKENS)
    except _FAILURES as error:
        raise UnsupportedModel(
            f"{structure.architecture} cannot be run block by block: what lies around its blocks does not work on "
            f"hidden states alone ({_around(error)})"
        ) from error
    calls: Counter[ModuleId] = Counter()
    for layer in range(structure.layers_beside.start):
        block = model.bare_block(layer)
        for info in structure.in_layer(layer):
            _count_calls(block.get_submodule(info.id.kind), info.id, calls)
        _try_block(block, inputs[layer], structure, layer)
    for module, count in calls.items():
        if count > 1:
            raise UnsupportedModel(
                f"block {module.layer} of {structure.architecture} calls {module.kind} {count} times for the same "
                "states; lmq measures modules that are called once"
            )
    called = [info for info in structure.in_layer(0) if calls[info.id]]
    if model.loss.per_token:
        _try_reading(model.bare_block(0), inputs[0], structure, called)
    _try_opening(build_skeleton(model_dir), structure)
    tried = (info for info in structure.modules if info.id.layer not in structure.layers_beside)
    return tuple(info.id for info in tried if not calls[info.id])


def _count_calls(module: nn.Module, name: ModuleId, calls: Counter[ModuleId]) -> None:
    module.register_forward_hook(lambda *_: calls.update([name]))


def _try_block(block: nn.Module, inputs: BlockInputs, structure: ModelStructure, layer: int) -> None:
    """Forward and backward through a block, without numbers."""
    width = structure.towers[structure.tower_of(layer)].hidden_size
    hidden = torch.empty(1, _TOKENS, width, device="meta", requires_grad=True)
    given: Any = (inputs.args, inputs.kwargs)
    args, kwargs = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, given)
    meta_inputs = BlockInputs(args, kwargs, torch.device("meta"), torch.float32)
    name = f"block {layer} of {structure.architecture}"
    try:
        leaving = meta_inputs.run(block.to("meta"), hidden)
    except _FAILURES as error:
        raise UnsupportedModel(f"{name} cannot be run by itself on hidden states ({_brief(error)})") from error
    if leaving.shape != hidden.shape:
        raise UnsupportedModel(f"{name} makes states of shape {list(leaving.shape)} of {list(hidden.shape)}")
    try:
        torch.autograd.grad(leaving.sum(), hidden)
    except _FAILURES as error:
        raise UnsupportedModel(
            f"{name} lets no gradient through to the states that enter it, which measurements need ({_brief(error)})"
        ) from error


class _Tiled(nn.Linear):
    """Stands in for a projection of any size: its outputs are its inputs, repeated, whatever its weight."""

    def forward(self, states: Tensor) -> Tensor:
        return states.repeat_interleave(-(-self.out_features // self.in_features), -1)[..., : self.out_features]


def _try_reading(block: nn.Module, inputs: BlockInputs, structure: ModelStructure, called: list[ModuleInfo]) -> None:
    """Raise InputError where the first block reads the text both ways, by its attention alone: no weight is read."""
    generator = torch.Generator().manual_seed(0)
    for info in called:
        block.set_submodule(info.id.kind, _Tiled(info.in_features, info.out_features, bias=False, device="meta"))
    for module in block.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_meta and not isinstance(module, _Tiled):
                value = torch.randn(tensor.shape, generator=generator)
                setattr(module, name, nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value)
    states = torch.randn(1, _TOKENS, structure.hidden_size, generator=generator)
    changed = torch.cat([states[:, :-1], -states[:, -1:]], dim=1)
    try:
        require_causal(lambda hidden: inputs.run(block, hidden), states, changed, structure.architecture)
    except _FAILURES as error:  # a block that asks more of its projections than their outputs is not judged by them
        _log.debug("block 0 of %s does not run on stand-ins: %s", structure.architecture, error)


def _put_embeddings(model: Any, structure: ModelStructure) -> None:
    from lmq.checkpoint.hf import put_quantized_layers  # imports the quantizers of transformers

    modules = {
        module.id.kind: {"shape": [module.out_features, module.in_features], **asdict(spec)}
        for module in structure.embeddings
        if (spec := _fitting(module)) is not None
    }
    put_quantized_layers(model, LmqConfig(modules=modules, axis=1, quantizer={}))


def _fitting(module: ModuleInfo) -> QuantSpec | None:
    return next((spec for spec in STOPS if module.parameters % spec.group_size == 0), None)


def _try_opening(model: Any, structure: ModelStructure) -> None:
    """Put quantized layers in place of the dense ones and let the model's class set its weights, as on opening."""
    split_experts(model)
    if structure.embeddings:
        _put_embeddings(model, structure)
    for module in structure.modules:
        path = structure.path(module.id)
        spec = _fitting(module)
        if spec is not None:
            has_bias = model.get_submodule(path).bias is not None
            layer = QuantizedLinear(module.in_features, module.out_features, spec, bias=has_bias, device="meta")
            model.set_submodule(path, layer)
    for part in model.modules():
        vars(part).pop("_is_hf_initialized", None)  # set when the skeleton was built
    try:
        model.initialize_weights()
    except _FAILURES as error:
        raise UnsupportedModel(
            f"{structure.architecture} does not open with quantized layers: its class works on the weights of its "
            f"linear layers itself ({_brief(error)})"
        ) from error


def _around(error: Exception) -> str:
    """Why what lies around the blocks failed; of it only the tables of embedding and head are on the meta device."""
    if "device meta" in str(error):
        return "it looks into its table of embeddings once more: its blocks take inputs that depend on the tokens"
    return _brief(error)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
