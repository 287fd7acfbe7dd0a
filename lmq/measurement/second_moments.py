"""Second moments of a module's inputs: what an error of its weights does to its outputs, without another forward.

With H = XᵀX / tokens [in_features, in_features], a weight error E = Ŵ − W changes output o by (E H Eᵀ)_oo in the mean
square. One H serves every configuration and quantizer, and all modules that share an input. From it come

- e = tr(E H Eᵀ) / out_features, the mean squared output error (activation sensitivity of a single module), and
- S ≈ tokens · Σ_o G_oo (E H Eᵀ)_oo with G_oo the mean of g_o², a cheap form of the Fisher sum Σ_t (g_t · E x_t)².

That form takes gradients and inputs as independent over tokens, and fails where a few tokens (the attention sink) have
huge inputs and no gradient. With H̃ = Σ_t ‖g_t‖² x_t x_tᵀ / Σ_t ‖g_t‖² for H only the direction of the gradient is
taken as independent; the formula stays. `ModuleStatistics` holds both moments of a module and gives all its costs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor, nn

from lmq.errors import InputError
from lmq.measurement.base import Cost, CostColumn, LayerReplay, Need, Row, cost_row, cost_schema
from lmq.measurement.pooling import pooled_moments
from lmq.measurement.traces import ModuleTrace
from lmq.model.block_inputs import BlockInputs
from lmq.model.structure import ModuleInfo

MODULE_ERRORS_SCHEMA = cost_schema(
    "module-errors",
    1,
    pa.field("tokens", pa.int64(), nullable=False),
    pa.field("in_features", pa.int32(), nullable=False),
    pa.field("input_error", pa.float64()),
    pa.field("fisher_diagonal", pa.float64()),
    pa.field("fisher_weighted", pa.float64()),
    pa.field("delta_loss", pa.float64()),
)
"""One row per module and configuration: e(m, c), S from H, S from H̃, and the delta loss."""

_log = logging.getLogger(__name__)

_TOKENS_AT_ONCE = 2048
_ROWS_AT_ONCE = 4096
_GRADIENT_ROWS_AT_ONCE = 1024
_COLUMNS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """H float32 [in_features, in_features], symmetric, from `tokens` inputs."""

    matrix: Tensor
    tokens: int

    @property
    def in_features(self) -> int:
        """Inputs of the module."""
        return len(self.matrix)

    @property
    def rank_deficient(self) -> bool:
        """Fewer tokens than inputs: H is singular, and blind to errors in the directions that no token has."""
        return self.tokens < self.in_features


def second_moments(inputs: Tensor, token_weights: Tensor | None = None) -> SecondMoments:
    """H of `inputs` [tokens, in_features]; with `token_weights` [tokens] the mean is weighted by them.

    Accumulated in float32. Raises InputError for weights that are negative or all 0, or that are not one per token.
    """
    matrix = torch.zeros(inputs.shape[1], inputs.shape[1], device=inputs.device)
    roots = None if token_weights is None else _root_weights(token_weights, len(inputs))
    for start in range(0, len(inputs), _TOKENS_AT_ONCE):
        piece = inputs[start : start + _TOKENS_AT_ONCE].detach().float()
        if roots is not None:
            piece = piece * roots[start : start + _TOKENS_AT_ONCE, None]
        _add_upper_products(matrix, piece)
    return SecondMoments(_mirrored(matrix).div_(max(1, len(inputs))), len(inputs))


@torch.no_grad()
def capture_second_moments(
    block: nn.Module, block_inputs: BlockInputs, hidden: Tensor, kinds: Sequence[str]
) -> dict[str, SecondMoments]:
    """Replay one block on `hidden` [sequences, sequence_length, hidden] and take H of every module's inputs.

    No inputs are kept: memory is one H per distinct input, shared by the modules that have it (q, k and v; gate and
    up). H of an expert is that of the tokens routed to it, or of all experts where these are few
    (`lmq.measurement.pooling`). The block is left as it was.
    """
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(kinds, 0)
    first_with: dict[tuple[int, int], tuple[Tensor, str]] = {}

    def keep(kind: str, inputs: Tensor) -> None:
        # by identity and version: a tensor that the block changes in place is another input afterwards
        _, first = first_with.setdefault((id(inputs), inputs._version), (inputs, kind))
        tokens[kind] += inputs.numel() // inputs.shape[-1]
        if first != kind:
            sums[kind] = sums[first]
            return
        states = inputs.flatten(0, -2).float()
        if kind not in sums:
            sums[kind] = torch.zeros(states.shape[1], states.shape[1], device=states.device)
        _add_upper_products(sums[kind], states)

    handles = [
        block.get_submodule(kind).register_forward_pre_hook(lambda _, args, kind=kind: keep(kind, args[0]))
        for kind in kinds
    ]
    try:
        for sequence in range(len(hidden)):
            block_inputs.run(block, hidden[sequence : sequence + 1])
            first_with.clear()
    finally:
        for handle in handles:
            handle.remove()
    for kind in kinds:
        if kind not in sums:  # an expert that no token was routed to
            weight = block.get_submodule(kind).get_parameter("weight")
            sums[kind] = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    moments = {
        total: SecondMoments(_mirrored(total) / max(1, tokens[kind]), tokens[kind]) for kind, total in sums.items()
    }
    return pooled_moments({kind: moments[sums[kind]] for kind in kinds}, tokens, _joined)


def _joined(moments: Sequence[SecondMoments]) -> SecondMoments:
    """H of all experts' tokens together, as if each had an equal share of them."""
    tokens = sum(each.tokens for each in moments)
    total = torch.stack([each.matrix * each.tokens for each in moments]).sum(0)
    return SecondMoments(total / max(1, tokens), tokens // len(moments))


@torch.no_grad()
def row_errors(moments: SecondMoments, error: Tensor) -> Tensor:
    """(E H Eᵀ)_oo for E = `error` [out_features, in_features]: mean squared error of each output, float64.

    H being symmetric, only the blocks on and right of its diagonal are multiplied, in float32. Raises InputError for
    an error of another width than H.
    """
    if error.shape[1] != moments.in_features:
        raise InputError(
            f"an error {list(error.shape)} does not fit second moments of {moments.in_features} inputs; "
            "pass those of the same module"
        )
    total = torch.zeros(len(error), dtype=torch.float64, device=error.device)
    for top in range(0, len(error), _ROWS_AT_ONCE):
        rows = slice(top, top + _ROWS_AT_ONCE)
        piece = error[rows].to(moments.matrix.dtype)
        for left in range(0, moments.in_features, _COLUMNS_AT_ONCE):
            columns = slice(left, left + _COLUMNS_AT_ONCE)
            products = piece[:, columns] @ moments.matrix[columns, columns]
            if left:
                products.add_(piece[:, :left] @ moments.matrix[:left, columns], alpha=2)
            total[rows] += torch.linalg.vecdot(products, piece[:, columns]).double()
    return total.clamp_(min=0)  # negative by rounding alone


def module_errors(moments: SecondMoments, errors: Iterable[Tensor]) -> list[float]:
    """e = ‖E X‖² / (tokens · out_features) = tr(E H Eᵀ) / out_features of each weight error E.

    Each error is [out_features, in_features]. Errors are taken one after the other and so may be made on the fly.
    """
    return [row_errors(moments, error).mean().item() for error in errors]


def fisher_estimate(moments: SecondMoments, error_by_row: Tensor, squared_gradient: Tensor) -> float:
    """S ≈ tokens · Σ_o G_oo (E H Eᵀ)_oo, from `row_errors` of H or of H̃ and `mean_squared_gradient`.

    It estimates `lmq.measurement.token_fisher.token_fisher`.
    """
    return moments.tokens * float(squared_gradient.double() @ error_by_row)


def mean_squared_gradient(gradients: Tensor) -> Tensor:
    """G_oo: mean over tokens of `gradients` [tokens, out_features] squared; float64 [out_features]."""
    pieces = gradients.detach().split(_TOKENS_AT_ONCE)
    return torch.stack([piece.double().square().sum(0) for piece in pieces]).sum(0) / max(1, len(gradients))


def gradient_token_weights(gradients: Tensor) -> Tensor:
    """‖g_t‖² of `gradients` [tokens, out_features]: the weights of H̃, float64 [tokens]."""
    return torch.cat([piece.double().square().sum(1) for piece in gradients.detach().split(_TOKENS_AT_ONCE)])


def delta_loss(weight_gradient: Tensor, error: Tensor) -> float:
    """|Σ ∂L/∂Ŵ ⊙ E|, the gradient taken at the quantized point (Intel AutoRound); summed in float64.

    `weight_gradient` and `error` are [out_features, in_features]. Raises InputError where they differ in shape.
    """
    if weight_gradient.shape != error.shape:
        raise InputError(
            f"a gradient {list(weight_gradient.shape)} does not fit an error {list(error.shape)}; "
            "pass both of the same module"
        )
    pieces = (tensor.detach().split(_GRADIENT_ROWS_AT_ONCE) for tensor in (weight_gradient, error))
    return abs(sum((gradient.double() * piece.double()).sum().item() for gradient, piece in zip(*pieces, strict=True)))


@dataclass(frozen=True, eq=False, kw_only=True)
class GradientStatistics:
    """What the gradients at a module's outputs add to the second moments of its inputs.

    `weighted` is H̃, `mean_squared` G_oo float64 [out_features], `weight_gradient` ∂L/∂W float32
    [out_features, in_features], summed over the tokens.
    """

    weighted: SecondMoments
    mean_squared: Tensor
    weight_gradient: Tensor


@dataclass(frozen=True, eq=False)
class ModuleStatistics:
    """Second moments of a module's inputs, and statistics of its gradients where these were measured."""

    moments: SecondMoments
    gradients: GradientStatistics | None = None

    def costs(self, error: Tensor) -> dict[str, float | None]:
        """Cost columns of `lmq.measurement.second_moments.MODULE_ERRORS_SCHEMA` for E = Ŵ − W [out_features,
        in_features].

        `delta_loss` takes the gradient at the point where the statistics were measured: at full precision it is a
        first-order stand-in for the gradient at the quantized point.
        """
        by_row = row_errors(self.moments, error)
        input_error = by_row.mean().item()
        if self.gradients is None:
            return {"input_error": input_error, "fisher_diagonal": None, "fisher_weighted": None, "delta_loss": None}
        weighted, mean_squared = self.gradients.weighted, self.gradients.mean_squared
        return {
            "input_error": input_error,
            "fisher_diagonal": fisher_estimate(self.moments, by_row, mean_squared),
            "fisher_weighted": fisher_estimate(weighted, row_errors(weighted, error), mean_squared),
            "delta_loss": delta_loss(self.gradients.weight_gradient, error),
        }


def traced_statistics(traces: Mapping[str, ModuleTrace]) -> Iterator[tuple[str, ModuleStatistics]]:
    """Statistics of every module, kind by kind, from the traces of the text's own loss (one draw).

    Made one after the other, so that one module's gradients are held at a time; modules that share their inputs
    share the second moments. Where all gradients are 0 (behind a matrix of zeros) no token outweighs another, and every
    cost by gradients is 0.
    """
    shared: dict[Tensor, SecondMoments] = {}
    for kind, trace in traces.items():
        if trace.inputs not in shared:
            shared = {trace.inputs: second_moments(trace.inputs)}
        token_weights = gradient_token_weights(trace.gradients)
        weighted = second_moments(trace.inputs, token_weights) if token_weights.any() else shared[trace.inputs]
        gradients = GradientStatistics(
            weighted=weighted,
            mean_squared=mean_squared_gradient(trace.gradients),
            weight_gradient=trace.gradients.float().t() @ trace.inputs.float(),
        )
        yield kind, ModuleStatistics(shared[trace.inputs], gradients)


def _add_upper_products(matrix: Tensor, inputs: Tensor) -> None:
    """Add `inputs`ᵀ · `inputs` [in_features, in_features]: only the blocks on and right of the diagonal."""
    for left in range(0, len(matrix), _COLUMNS_AT_ONCE):
        columns = slice(left, left + _COLUMNS_AT_ONCE)
        matrix[: columns.stop, columns].addmm_(inputs[:, : columns.stop].t(), inputs[:, columns])


def _mirrored(matrix: Tensor) -> Tensor:
    """The matrix itself, with what is right of its diagonal copied to the left."""
    for left in range(0, len(matrix), _COLUMNS_AT_ONCE):
        rows = slice(left, left + _COLUMNS_AT_ONCE)
        matrix[rows, :left] = matrix[:left, rows].t()
    return matrix


def _root_weights(token_weights: Tensor, tokens: int) -> Tensor:
    """Square roots of the weights scaled to a mean of 1, float32 [tokens]."""
    weights = token_weights.detach().double()
    if weights.shape != (tokens,) or bool((weights < 0).any()) or not float(weights.sum()) > 0:
        raise InputError(
            f"token weights {list(weights.shape)} with sum {float(weights.sum()):g} do not fit {tokens} tokens; "
            "give one weight per token, none negative and not all 0"
        )
    return (weights / weights.mean()).sqrt_().float()


def measure_module_errors(layer: LayerReplay) -> Iterator[Row]:
    """Mean squared output error of every module of one layer under every configuration of the menu.

    With the loss gradient of the text also two estimates of the token-wise Fisher cost and the delta loss, whose
    gradient is the one at full precision: a first-order stand-in for the gradient at the quantized point.
    """
    tokens = layer.hidden.shape[0] * layer.hidden.shape[1]
    _warn_of_few_tokens(layer.modules, tokens)
    for module, statistics in _layer_statistics(layer):
        for spec, error in layer.errors(module):
            costs = statistics.costs(error)
            seen = statistics.moments.tokens
            yield cost_row(module, spec, tokens=seen, in_features=module.in_features, **costs)


def _layer_statistics(layer: LayerReplay) -> Iterator[tuple[ModuleInfo, ModuleStatistics]]:
    modules = {module.id.kind: module for module in layer.modules}
    if layer.has(Need.TEXT_GRADIENTS):
        traces = {module.id.kind: trace for module, trace in layer.traces(torch.float32)}
        yield from ((modules[kind], statistics) for kind, statistics in traced_statistics(traces))
        return
    moments = capture_second_moments(layer.block, layer.block_inputs, layer.hidden, list(modules))
    yield from ((modules[kind], ModuleStatistics(of_kind)) for kind, of_kind in moments.items())


def _warn_of_few_tokens(modules: Sequence[ModuleInfo], tokens: int) -> None:
    wide = max(modules, key=lambda module: module.in_features)
    if tokens < wide.in_features:
        _log.warning(
            "%s: %d tokens are fewer than its %d inputs; errors in the directions that no token has count as 0. "
            "Measure on more calibration tokens",
            wide.id,
            tokens,
            wide.in_features,
        )


MODULE_ERRORS = Cost(
    name="module_errors",
    title="Errors of single modules",
    schema=MODULE_ERRORS_SCHEMA,
    needs=frozenset({Need.GRIDS, Need.STATES, Need.TEXT_GRADIENTS}),
    settings=("menu",),
    version=3,
    measure=measure_module_errors,
    columns=(
        CostColumn(
            name="first_order_loss",
            label="delta loss, gradient at full precision",
            column="delta_loss",
            title="Delta loss at full precision",
            meaning="First-order change of the summed loss, with the unquantized model's gradient.",
        ),
        CostColumn(
            name="fisher_weighted",
            label="Fisher from gradient-weighted H",
            column="fisher_weighted",
            title="Fisher cost from weighted second moments",
            meaning="The token-wise cost, had gradients no direction in common.",
        ),
        CostColumn(
            name="fisher_diagonal",
            label="Fisher from H, G diagonal",
            column="fisher_diagonal",
            title="Fisher cost from plain second moments",
            meaning="The token-wise cost, were gradients and inputs independent.",
        ),
        CostColumn(
            name="input_error",
            label="output error e(m, c)",
            column="input_error",
            title="Output error",
            meaning="Mean squared error of the module's own outputs.",
        ),
    ),
)
