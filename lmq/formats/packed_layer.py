"""Linear layer on quantized weights: packed codes and 8-bit metadata in memory, weights only while in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lmq.formats.groups import GRID_TENSORS, Grid, grid_tensor_shapes
from lmq.formats.packed_product import PackedWeight, packed_linear
from lmq.formats.packing import pack
from lmq.formats.spec import QuantSpec

QUANTIZED_TENSORS = ("codes", *GRID_TENSORS)
"""Names of the stored tensors of a quantized matrix; a bias keeps its own name."""

_INTEGER_VIEWS = {torch.float16: torch.int16, torch.float32: torch.int32}


def quantized_tensor_shapes(
    spec: QuantSpec, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each stored tensor of a matrix `[out_features, in_features]`; their bytes are its size."""
    parameters = out_features * in_features
    return {"codes": ((parameters * spec.bits // 8,), torch.uint8), **grid_tensor_shapes(spec, parameters)}


def quantize_weight(weight: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
    """The stored tensors of `weight` [out_features, in_features] on its grid, by name."""
    return {"codes": pack(grid.codes(weight), grid.spec.bits), **grid.to_tensors()}


class QuantizedLinear(nn.Module):
    """`y = x Ŵᵀ + bias` with Ŵ made from the codes in every call, in float32, and used in the dtype of `x`.

    The buffers are the stored tensors of the checkpoint (`QUANTIZED_TENSORS`). They keep their dtypes when the
    module is cast: `.to(torch.bfloat16)` changes the bias alone.
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
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.spec = spec
        self.axis = axis
        self._weight_dtype = dtype or torch.float32
        for name, (shape, tensor_dtype) in quantized_tensor_shapes(spec, out_features, in_features).items():
            self.register_buffer(name, torch.zeros(shape, dtype=tensor_dtype, device=device))
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

    @property
    def grid(self) -> Grid:
        """The grid of the weight; its tensors are the buffers themselves."""
        tensors = {name: self.get_buffer(name) for name in GRID_TENSORS}
        return Grid.from_tensors(tensors, self.spec, (self.out_features, self.in_features), self.axis)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight Ŵ [out_features, in_features], made in float32 and rounded to `dtype`."""
        return self._packed_weight.dequantize(dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs [..., out_features] of `inputs` [..., in_features], in their dtype or that of autocast."""
        device_type = inputs.device.type
        if device_type == "meta":  # only the shape is asked for
            return inputs.new_empty(*inputs.shape[:-1], self.out_features)
        if torch.is_autocast_enabled(device_type) and inputs.dtype != torch.float64:
            inputs = inputs.to(torch.get_autocast_dtype(device_type))
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return packed_linear(inputs, self._packed_weight, bias)

    @property
    def weight(self) -> torch.Tensor:
        """Ŵ made anew, for code outside the layer that looks at its weight; what is written to it is lost."""
        codes = self.get_buffer("codes")
        if codes.is_meta:
            weight = torch.empty(self.out_features, self.in_features, dtype=self._weight_dtype, device="meta")
        else:
            weight = self.dequantize(self._weight_dtype)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves it alone when it opens a model
        return weight

    @property
    def qweight(self) -> torch.Tensor:
        """The codes, by the name under which PEFT looks for the device of a quantized layer."""
        return self.get_buffer("codes")

    @property
    def _packed_weight(self) -> PackedWeight:
        tensors = {name: self._buffers[name] for name in QUANTIZED_TENSORS}
        return PackedWeight(**tensors, spec=self.spec, shape=(self.out_features, self.in_features), axis=self.axis)  # type: ignore[arg-type]

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

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # a cast touches floating-point buffers only: let it see integers
        dtypes = {name: self.get_buffer(name).dtype for name in GRID_TENSORS}
        for name, dtype in dtypes.items():
            self._buffers[name] = self.get_buffer(name).view(_INTEGER_VIEWS.get(dtype, dtype))
        try:
            return super()._apply(fn, recurse)
        finally:
            for name, dtype in dtypes.items():
                self._buffers[name] = self.get_buffer(name).view(dtype)
