"""Layers on quantized weights: packed codes and 8-bit metadata in memory, weights only while in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lmq.formats.coded_grid import EncodedMatrix
from lmq.formats.gguf_types import BLOCKS_TENSOR, GgufMatrix
from lmq.formats.groups import GRID_TENSORS, Grid, grid_tensor_shapes
from lmq.formats.packed_product import GgufWeight, PackedWeight, packed_linear
from lmq.formats.packing import pack
from lmq.formats.spec import QuantSpec

QUANTIZED_TENSORS = ("codes", *GRID_TENSORS)
"""Names of the stored tensors of a matrix on a grid; a bias keeps its own name."""

_INTEGER_VIEWS = {torch.float16: torch.int16, torch.float32: torch.int32}


def quantized_tensor_shapes(
    spec: QuantSpec, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each stored tensor of a matrix `[out_features, in_features]`; their bytes are its size."""
    parameters = out_features * in_features
    if spec.gguf is not None:
        kind = spec.gguf.of_rows(in_features)
        return {BLOCKS_TENSOR: ((out_features, in_features // kind.block_size * kind.block_bytes), torch.uint8)}
    return {"codes": ((parameters * spec.bits // 8,), torch.uint8), **grid_tensor_shapes(spec, parameters)}


def quantize_weight(weight: torch.Tensor, grid: EncodedMatrix) -> dict[str, torch.Tensor]:
    """The stored tensors of `weight` [out_features, in_features] on its grid, by name."""
    if isinstance(grid, GgufMatrix):
        return {BLOCKS_TENSOR: grid.blocks}
    return {"codes": pack(grid.codes(weight), grid.spec.bits), **grid.to_tensors()}


class QuantizedMatrix(nn.Module):
    """A quantized weight Ŵ [out_features, in_features] as a checkpoint stores it: what quantized layers share.

    The buffers are the stored tensors of the checkpoint (`quantized_tensor_shapes`). They keep their dtypes when the
    module is cast.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        axis: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.spec = spec
        self.axis = axis
        self._weight_dtype = dtype or torch.float32
        shapes = quantized_tensor_shapes(spec, out_features, in_features)
        self._stored = tuple(shapes)
        for name, (shape, tensor_dtype) in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=tensor_dtype, device=device))

    @property
    def qweight(self) -> torch.Tensor:
        """The codes, by the name under which PEFT looks for the device of a quantized layer."""
        return self.get_buffer(self._stored[0])

    @property
    def grid(self) -> Grid:
        """The grid of the weight; its tensors are the buffers themselves."""
        tensors = {name: self.get_buffer(name) for name in GRID_TENSORS}
        return Grid.from_tensors(tensors, self.spec, (self.out_features, self.in_features), self.axis)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight Ŵ [out_features, in_features], made in float32 and rounded to `dtype`."""
        return self.packed_weight.dequantize(dtype)

    @property
    def weight(self) -> torch.Tensor:
        """Ŵ made anew, for code outside the layer that looks at its weight; what is written to it is lost."""
        if self.qweight.is_meta:
            weight = torch.empty(self.out_features, self.in_features, dtype=self._weight_dtype, device="meta")
        else:
            weight = self.dequantize(self._weight_dtype)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves it alone when it opens a model
        return weight

    @property
    def packed_weight(self) -> PackedWeight | GgufWeight:
        """The stored tensors as what products are taken with."""
        if self.spec.gguf is not None:
            kind = self.spec.gguf.of_rows(self.in_features)
            return GgufWeight(GgufMatrix(kind, (self.out_features, self.in_features), self.qweight))
        tensors = {name: self._buffers[name] for name in self._stored}
        return PackedWeight(**tensors, spec=self.spec, shape=(self.out_features, self.in_features), axis=self.axis)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # a cast touches floating-point buffers only: let it see integers
        dtypes = {name: self.get_buffer(name).dtype for name in self._stored}
        for name, dtype in dtypes.items():
            self._buffers[name] = self.get_buffer(name).view(_INTEGER_VIEWS.get(dtype, dtype))
        try:
            return super()._apply(fn, recurse)
        finally:
            for name, dtype in dtypes.items():
                self._buffers[name] = self.get_buffer(name).view(dtype)


class QuantizedLinear(QuantizedMatrix):
    """`y = x Ŵᵀ + bias` with Ŵ made from the codes in every call, in float32, and used in the dtype of `x`.

    `.to(torch.bfloat16)` changes the bias alone.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        axis: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, spec, axis=axis, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, grid: Grid) -> QuantizedLinear:
        """Quantize a dense layer on a grid of its weight; its bias is copied."""
        has_bias, device = linear.bias is not None, linear.weight.device
        layer = cls(
            linear.in_features,
            linear.out_features,
            grid.spec,
            axis=grid.axis,
            bias=has_bias,
            device=device,
            dtype=linear.weight.dtype,
        )
        state = quantize_weight(linear.weight, grid)
        layer.load_state_dict(state | ({"bias": linear.bias.detach()} if has_bias else {}))
        return layer

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs [..., out_features] of `inputs` [..., in_features], in their dtype or that of autocast."""
        return _product(inputs, self, self.bias)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A dense layer with the dequantized weight: no unpacking in its calls, full memory."""
        weight = self.dequantize(dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {self.spec}, axis={self.axis}, bias={self.bias is not None}"


class QuantizedEmbedding(QuantizedMatrix):
    """A table of embeddings Ŵ [num_embeddings, embedding_dim]: a row is made from its codes when it is looked up.

    Rows are multiplied by `embed_scale`, as Gemma does. They come in the dtype that the model is cast to.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        spec: QuantSpec,
        *,
        embed_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(embedding_dim, num_embeddings, spec, device=device, dtype=dtype)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.embed_scale = embed_scale

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., embedding_dim] of `token_ids` [...]; a padding token has the row that is stored for it."""
        dtype = self._weight_dtype
        if token_ids.is_meta or self.qweight.is_meta:  # only the shape is asked for
            return torch.empty(*token_ids.shape, self.embedding_dim, dtype=dtype, device="meta")
        rows = self.packed_weight.rows(token_ids.reshape(-1)).to(dtype)
        if self.embed_scale != 1.0:
            rows = rows * torch.tensor(self.embed_scale, dtype=dtype)
        return rows.view(*token_ids.shape, self.embedding_dim)

    def to_embedding(self, dtype: torch.dtype) -> nn.Embedding:
        """A dense table of the dequantized rows, times their scale: full memory."""
        weight = self.dequantize(dtype)
        table = _ScaledEmbedding(self.num_embeddings, self.embedding_dim, device="meta")
        table.weight = nn.Parameter(weight, requires_grad=False)
        table.embed_scale = self.embed_scale
        return table

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.spec}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._weight_dtype = fn(torch.empty(0, dtype=self._weight_dtype)).dtype
        return super()._apply(fn, recurse)


class _ScaledEmbedding(nn.Embedding):
    embed_scale = 1.0

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows = super().forward(token_ids)
        return rows if self.embed_scale == 1.0 else rows * torch.tensor(self.embed_scale, dtype=rows.dtype)


class TiedHead(nn.Module):
    """An output head whose weight is that of a quantized table of embeddings, which holds it."""

    table: QuantizedEmbedding

    def __init__(self, table: QuantizedEmbedding, bias: nn.Parameter | None = None):
        super().__init__()
        object.__setattr__(self, "table", table)  # not as a submodule: its tensors are stored once
        self.in_features = table.embedding_dim
        self.out_features = table.num_embeddings
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the table, made anew."""
        return self.table.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs [..., out_features] of `inputs` [..., in_features], as `QuantizedLinear` gives them."""
        return _product(inputs, self.table, self.bias)

    def to_linear(self, weight: nn.Parameter) -> nn.Linear:
        """A dense head that shares the weight of a dense table."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = weight  # the parameter of the dense table
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype), requires_grad=False)
        return linear


def _product(inputs: torch.Tensor, matrix: QuantizedMatrix, bias: torch.Tensor | None) -> torch.Tensor:
    device_type = inputs.device.type
    if device_type == "meta":  # only the shape is asked for
        return inputs.new_empty(*inputs.shape[:-1], matrix.out_features)
    if torch.is_autocast_enabled(device_type) and inputs.dtype != torch.float64:
        inputs = inputs.to(torch.get_autocast_dtype(device_type))
    return packed_linear(inputs, matrix.packed_weight, None if bias is None else bias.to(inputs.dtype))
