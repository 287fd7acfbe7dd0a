"""The tensors of a GGUF file: which type each takes, and its bytes, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import PreTrainedConfig

from lmq.allocation.targets import list_modules
from lmq.export.gguf_blocks import GRID_BLOCKS, Bytes, Floats, decode, encode
from lmq.export.gguf_model import ROPE_FACTORS, gguf_name, head_rows, norm_offset, rope_factors
from lmq.export.report import ModuleStep
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.gguf_types import LLAMA_CPP_TYPES
from lmq.formats.spec import QuantSpec
from lmq.model.tensors import StoredTensor, read_tensors

Fidelity = Literal["exact", "size"]

STORED_TYPES = {"F32": GGMLQuantizationType.F32, "F16": GGMLQuantizationType.F16, "BF16": GGMLQuantizationType.BF16}
"""Types of tensors that lmq left alone, by the name that safetensors gives them."""

K_TYPES = {2: GGMLQuantizationType.Q2_K, 3: GGMLQuantizationType.Q3_K, 4: GGMLQuantizationType.Q4_K}
"""Types nearest in size, by bits, for rows made of `gguf.QK_K` weights."""

_SMALL_BLOCK = 32
_CHUNK_WEIGHTS = 2**22
_RECOMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file: its GGUF name, its shape in weights, its type.

    `source` is the dotted path of a quantized matrix, a tensor that lmq left alone, or None for a tensor made
    from the configuration.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    source: str | StoredTensor | None

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape of its bytes: [rows, bytes per row]."""
        return gguf.quant_shape_to_byte_shape(self.shape, self.kind)


def tensor_problems(checkpoint: QuantizedCheckpoint, config: PreTrainedConfig) -> Iterator[str]:
    """Tensors of a checkpoint that the architecture has no place or no type for."""
    unquantized = _unquantized(checkpoint)
    for name in [f"{path}.weight" for path in checkpoint.specs] + list(unquantized):
        if gguf_name(config, name) is None and not _RECOMPUTED.search(name):
            yield f"the tensor {name} has no place in GGUF's {config.model_type}"
    yield from (f"the tensor {name} is not stored as it is used" for name in checkpoint.model_tensors.conversions)
    for name, stored in unquantized.items():
        if stored.dtype not in STORED_TYPES:
            yield f"the tensor {name} is {stored.dtype}; {', '.join(STORED_TYPES)} are exported"
    if unwritten := [path for path, spec in checkpoint.specs.items() if spec.gguf and spec.name not in LLAMA_CPP_TYPES]:
        names = ", ".join(sorted({checkpoint.specs[path].name for path in unwritten}))
        yield f"{names}, which is not written to GGUF files: {list_modules(unwritten)}"
    converted = {path: spec for path, spec in checkpoint.specs.items() if spec.gguf is None}
    for bits in sorted({spec.bits for spec in converted.values()} - {*K_TYPES, 8}):
        paths = [path for path, spec in converted.items() if spec.bits == bits]
        yield f"{bits}-bit codes; {', '.join(map(str, K_TYPES))} and 8 bits are exported: {list_modules(paths)}"


def plan_tensors(checkpoint: QuantizedCheckpoint, config: PreTrainedConfig, fidelity: Fidelity) -> list[GgufTensor]:
    """The tensors of the file, layer by layer, of a checkpoint without `tensor_problems`."""
    tensors = []
    for path, spec in checkpoint.specs.items():
        shape = checkpoint.shapes[path]
        kind = matrix_kind(spec, shape[1], axis=checkpoint.config.axis, fidelity=fidelity)
        tensors.append(GgufTensor(str(gguf_name(config, f"{path}.weight")), shape, kind, path))
    for own_name, stored in _unquantized(checkpoint).items():
        name = gguf_name(config, own_name)
        if name is None:
            continue
        kind = STORED_TYPES[stored.dtype] if len(stored.shape) > 1 else GGMLQuantizationType.F32
        tensors.append(GgufTensor(name, stored.shape, kind, stored))
    if (factors := rope_factors(config)) is not None:
        tensors.append(GgufTensor(ROPE_FACTORS, factors.shape, GGMLQuantizationType.F32, None))
    return sorted(tensors, key=lambda tensor: (_layer(tensor.name), tensor.name))


def _unquantized(checkpoint: QuantizedCheckpoint) -> dict[str, StoredTensor]:
    """The unquantized tensors by the model's names; of tied ones that share their values the first.

    A head with values of its own is kept whatever the configuration says of ties, as transformers keeps it.
    """
    model = checkpoint.model_tensors
    tied = {
        name
        for name, source in model.model.all_tied_weights_keys.items()
        if model.tensors.get(name) == model.tensors.get(source)
    }
    return {name: tensor for name, tensor in model.tensors.items() if name not in checkpoint.quantized_names | tied}


def matrix_kind(spec: QuantSpec, in_features: int, *, axis: int, fidelity: Fidelity) -> GGMLQuantizationType:
    """The GGUF type of a matrix of rows of `in_features` weights, grouped along `axis`."""
    if spec.gguf is not None:
        return GGMLQuantizationType(spec.gguf.of_rows(in_features).number)
    if in_features % _SMALL_BLOCK:
        return GGMLQuantizationType.F16
    if spec.bits == 8:
        return GGMLQuantizationType.Q8_0
    if fidelity == "size" and spec != QuantSpec(4, 32):
        return GGMLQuantizationType.Q4_1 if in_features % gguf.QK_K else K_TYPES[spec.bits]
    return GGMLQuantizationType.Q4_1 if _whole_blocks(spec, axis, _SMALL_BLOCK) else GGMLQuantizationType.Q8_0


def tensor_rows(
    checkpoint: QuantizedCheckpoint, config: PreTrainedConfig, tensor: GgufTensor
) -> tuple[Bytes, ModuleStep | None]:
    """The bytes of a tensor, uint8 of its `byte_shape`, and the step of a quantized matrix."""
    step = None
    if isinstance(tensor.source, str):
        rows, error = _matrix_rows(checkpoint, tensor.source, tensor.kind)
        step = ModuleStep(target=tensor.kind.name, relative_error=error)
    elif tensor.source is None:
        rows = np.asarray(rope_factors(config)).view(np.uint8)
    else:
        rows = _stored_rows(tensor.source, tensor.kind, norm_offset(config, tensor.name))
    order = head_rows(config, tensor.name)
    if order is not None:
        rows = rows.reshape(len(order), -1)[order].reshape(rows.shape)
    return rows, step


def _stored_rows(stored: StoredTensor, kind: GGMLQuantizationType, offset: float) -> Bytes:
    values = read_tensors([stored])[stored.name]
    if kind == GGMLQuantizationType.F32:
        values = values.to(torch.float32) + offset if offset else values.to(torch.float32)
    return values.contiguous().view(torch.uint8).numpy()


def _matrix_rows(checkpoint: QuantizedCheckpoint, path: str, kind: GGMLQuantizationType) -> tuple[Bytes, float]:
    """The bytes of a quantized matrix and ||W_written - W_checkpoint||_F / ||W_checkpoint||_F.

    One whose configuration is a type of GGUF is written byte for byte.
    """
    if checkpoint.specs[path].gguf is not None:
        return checkpoint.blocks(path).blocks.numpy(), 0.0
    weight = checkpoint.weight(path).numpy()
    scale, minimum = _block_grid(checkpoint, path, weight, kind)
    levels = 2 ** checkpoint.specs[path].bits
    rows_per_chunk = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    written, square_error = [], 0.0
    for start in range(0, weight.shape[0], rows_per_chunk):
        chunk = slice(start, start + rows_per_chunk)
        written.append(encode(weight[chunk], scale[chunk], minimum[chunk], levels, kind))
        square_error += float(np.square(decode(written[-1], kind) - weight[chunk]).sum(dtype=np.float64))
    square_norm = float(np.square(weight).sum(dtype=np.float64))
    return np.concatenate(written), (square_error / square_norm) ** 0.5 if square_norm else 0.0


def _block_grid(
    checkpoint: QuantizedCheckpoint, path: str, weight: Floats, kind: GGMLQuantizationType
) -> tuple[Floats, Floats]:
    """Scale and minimum of every block, float32 [out_features, blocks] each.

    The checkpoint's own where its groups are made of whole blocks, otherwise those of the block's range.
    """
    spec, block = checkpoint.specs[path], GRID_BLOCKS.get(kind, int(weight.shape[1]))
    if not _whole_blocks(spec, checkpoint.config.axis, block):
        blocks = weight.reshape(weight.shape[0], -1, block)
        minimum = blocks.min(-1)
        return (blocks.max(-1) - minimum) / (2**spec.bits - 1), minimum
    scale, zero = checkpoint.grid(path).decode()
    repeats = spec.group_size // block
    grid = torch.stack([scale, -zero * scale]).repeat_interleave(repeats, dim=1)
    scales, minima = grid.view(2, weight.shape[0], -1).numpy()
    return scales, minima


def _whole_blocks(spec: QuantSpec, axis: int, block: int) -> bool:
    """Whether every block of neighbouring weights of a row lies in one group."""
    return axis == 1 and spec.group_size % block == 0


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1
