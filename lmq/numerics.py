"""Matrix products by oneDNN or in bfloat16 where these are fast, and refusal of tensors that hold NaN or infinity.

torch leaves float32 products to MKL, which on AMD's AVX-512 processors runs at less than half the speed of oneDNN
(measured: benchmarks/products.py). Both round in float32 alike; sums are taken in another order, so last bits differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmq.errors import NotFiniteError

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_CHUNK_ELEMENTS = 1 << 16


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`inputs` [..., in_features] times `weight` [out_features, in_features] transposed, plus `bias`; differentiable.

    By oneDNN for float32 on a processor outside of autocast, else as torch does it.
    """
    if not _by_onednn(inputs, weight):
        return nn.functional.linear(inputs, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (inputs, weight, bias)):
        product: Tensor = _Linear.apply(inputs, weight)
        return product if bias is None else product + bias
    return _onednn(inputs, weight, bias)


class OneDnnProducts(TorchFunctionMode):
    """Within it, in this thread, linear layers multiply by `linear`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (linear if func is nn.functional.linear else func)(*args, **(kwargs or {}))


def without_base(product: Tensor) -> Tensor:
    """The same values as a tensor of its own, no view of another: what a model may change in place.

    autograd refuses in-place operations on views that a custom function returns.
    """
    owned: Tensor = torch.ops.aten._unsafe_view(product, product.shape) if product._is_view() else product
    return owned


def finite_sum(tensor: torch.Tensor, name: str) -> float:
    """Sum of all elements in float64. Raises NotFiniteError naming the tensor and its count of NaN and infinities."""
    chunks = tensor.detach().reshape(-1).split(_CHUNK_ELEMENTS)
    total = math.fsum(float(chunk.sum(dtype=torch.float64)) for chunk in chunks) if tensor.numel() else 0.0
    if not math.isfinite(total):
        count = int((~torch.isfinite(tensor)).sum())
        raise NotFiniteError(
            f"{name} holds {count:,} elements of {tensor.numel():,} that are NaN or infinite; "
            "repair or download the model again before quantizing it"
        )
    return total


def require_finite(tensor: torch.Tensor, name: str) -> None:
    """Raise NotFiniteError naming the tensor and its count of NaN and infinite elements, if there are any."""
    finite_sum(tensor, name)


def fast_products(device: torch.device, dtype: torch.dtype | None = None) -> torch.autocast:
    """Context in which matrix products are taken in `dtype`; unless given, in `fast_matmul_dtype`."""
    dtype = dtype or fast_matmul_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def fast_matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively (several times faster), else float32.

    The cost is a sum over thousands of tokens; bfloat16 changes it by about 0.1 %.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    flags: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch cannot tell
    return torch.bfloat16 if flags.get("avx512_bf16") or flags.get("amx_bf16") else torch.float32


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _onednn(inputs, weight, None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        inputs, weight = ctx.saved_tensors
        of_inputs = None if weight is None else _onednn(gradient, weight.t(), None)
        of_weight = None
        if inputs is not None:
            of_weight = _onednn(gradient.flatten(0, -2).t(), inputs.flatten(0, -2).t(), None)
        return of_inputs, of_weight


def _by_onednn(inputs: Tensor, weight: Tensor) -> bool:
    return (
        inputs.device.type == weight.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.numel() > 0
        and _HAS_ONEDNN
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # its strides would be ignored
    product = torch.ops.mkldnn._linear_pointwise(inputs.contiguous(), weight.contiguous(), bias, "none", [], "")
    return without_base(product)
