"""Loss-aware cost of quantizing one module: the sequence-wise true Fisher.

For small weight errors E = Ŵ − W the divergence of the changed model from the model itself is, to second order,

    Σ_tokens KL(p ‖ p_E) = ½ E_labels [ ⟨∇_W L, E⟩² ],

L being the summed next-token loss of a sequence for labels drawn from the model's own predictions p (the true
Fisher, which is the Gauss-Newton matrix of the divergence). The square is taken of the sum over the whole
sequence: an error acts on all tokens at once, and where tokens mix (values, and what reads them) its effects
add up. A sum of squares over single tokens misses half and more of what errors of values cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import torch
from torch import Tensor

from lmq.errors import InputError
from lmq.formats.spec import QuantSpec
from lmq.measurement.base import Cost, CostColumn, LayerReplay, Need, Row, cost_row, cost_schema
from lmq.measurement.traces import ModuleTrace
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModuleInfo
from lmq.numerics import fast_matmul_dtype

SEQUENCE_FISHER_SCHEMA = cost_schema(
    "sequence-fisher",
    1,
    pa.field("fisher", pa.float64()),
    pa.field("loss_changes", pa.list_(pa.float64()), nullable=False),
)
"""`fisher` in nats per token; `loss_changes` one per draw of labels and sequence, sequences fastest."""

_ERROR_BYTES_AT_ONCE = 5 << 28
"""Bytes of the errors of one module that are held together: a gradient of its weight serves them all."""

_ELEMENTS_AT_ONCE = 1 << 22
"""Weights whose errors are held in the trace's dtype at a time, for every configuration."""

_GRADIENTS_AT_ONCE = 8
"""Weight gradients that go through these errors together: reading the errors takes longer than multiplying them."""


def sampled_loss_gradient(
    model: StreamedModel,
    hidden: Tensor,
    *,
    draws: int,
    seed: int,
    tower: int = 0,
    inputs: Tensor | None = None,
    is_text: Tensor | None = None,
) -> Tensor:
    """Gradient of the summed loss, for labels the model draws itself, at the states that leave the last block.

    `hidden` [sequences, sequence_length, hidden]; `draws` labels are drawn per prediction: of a text at every position
    but each last one, whose gradient is 0 (nothing follows it), of images one for each. Float32 [draws · sequences,
    sequence_length, hidden], sequences fastest, on the device of `hidden`. Equal seeds draw equal labels. Of a model of
    several towers `hidden` leaves one `tower`; one of texts looks at its `inputs` again, the token ids.

    Where images stand among the tokens, `is_text` bool [sequences, sequence_length] says which are text: these alone
    are predicted, gradients are 0 at what precedes others, and the rest is scaled so that half its mean square over
    all predictions is that over those of text.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    pieces: list[Tensor] = []
    first = 0
    predicting = model.loss.predicting(hidden)
    chosen = None if is_text is None else is_text[:, 1:].flatten().to(hidden.device)
    for piece in model.split(predicting if chosen is None else predicting[chosen]):
        given = None if inputs is None else inputs[first : first + len(piece)]
        first += len(piece)
        leaving = piece.detach().to(model.device, model.dtype).requires_grad_(True)
        with torch.enable_grad():
            outputs = model.head_logits(leaving, tower, given).float()
            drawn = model.loss.draw(outputs.detach(), draws, generator)
            losses = [model.loss.summed(outputs, targets) for targets in drawn]
            found = [torch.autograd.grad(loss, leaving, retain_graph=True)[0].float() for loss in losses]
        pieces.append(torch.stack(found))
    gradients = torch.cat(pieces, dim=1)
    if chosen is not None:
        of_all = gradients.new_zeros(draws, *predicting.shape)
        of_all[:, chosen.to(gradients.device)] = gradients * math.sqrt(len(chosen) / int(chosen.sum()))
        gradients = of_all
    return model.loss.at_states(gradients, hidden).flatten(0, 1)


def sequence_loss_changes(
    trace: ModuleTrace, errors: Mapping[QuantSpec, Tensor], *, sequence_length: int
) -> dict[QuantSpec, Tensor]:
    """⟨∇_W L, E⟩ of every draw and sequence, float64 [draws · sequences], for weight errors E = Ŵ − W.

    Errors are [out_features, in_features]. The tokens of the trace are sequences of `sequence_length`, one after the
    other, or those of their tokens that were routed to an expert; its gradients come from `sampled_loss_gradient`. One
    weight gradient per draw and sequence serves every configuration. Products are taken in the trace's dtype. Raises
    InputError where the trace is not made of whole sequences.
    """
    if trace.lengths is None and len(trace.inputs) % sequence_length:
        raise InputError(
            f"a trace of {len(trace.inputs)} tokens is not made of sequences of {sequence_length}; "
            "pass the sequence length that was captured"
        )
    inputs: Sequence[Tensor] = trace.inputs.split(sequence_length)
    gradients: Sequence[Tensor] = trace.gradients.split(sequence_length)
    if trace.lengths is not None:
        inputs = trace.inputs.split(list(trace.lengths))
        gradients = trace.gradients.split(list(trace.lengths) * trace.draws)
    changes = torch.zeros(len(errors), len(gradients), dtype=torch.float64)
    out_features, in_features = trace.gradients.shape[1], trace.inputs.shape[1]
    for rows in torch.arange(out_features).split(max(1, _ELEMENTS_AT_ONCE // in_features)):
        piece = slice(int(rows[0]), int(rows[-1]) + 1)
        stacked = torch.stack([error[piece].to(trace.inputs).flatten() for error in errors.values()])
        for start in range(0, len(gradients), _GRADIENTS_AT_ONCE):
            numbers = range(start, min(start + _GRADIENTS_AT_ONCE, len(gradients)))
            found = stacked.new_empty(len(numbers), len(rows), in_features)
            for weight_gradient, number in zip(found, numbers, strict=True):
                torch.mm(gradients[number][:, piece].t(), inputs[number % len(inputs)], out=weight_gradient)
            changes[:, numbers.start : numbers.stop] += (found.flatten(1) @ stacked.t()).t().double().cpu()
    return dict(zip(errors, changes, strict=True))


def sequence_fisher(loss_changes: Tensor, *, tokens_per_sequence: int, around: Tensor | None = None) -> float:
    """½ E[(⟨∇_W L, E⟩ − ⟨∇_W L, E₀⟩)²] per token: the divergence in nats that replacing E₀ by E costs.

    `loss_changes` [draws · sequences] are those of E, `around` those of E₀ (none: full precision).
    """
    change = loss_changes if around is None else loss_changes - around
    return 0.5 * change.square().mean().item() / tokens_per_sequence


def pooled_costs(by_sequence: Mapping[QuantSpec, float], by_token: Mapping[QuantSpec, float]) -> dict[QuantSpec, float]:
    """Costs of a module that differ between configurations as `by_token` do, at the level of `by_sequence`.

    Few sequences make `by_sequence` vary by a fifth and more from one configuration to the next, and a program that
    looks for the least of them takes what is small by chance. How much more than its tokens a sequence costs is mostly
    a matter of the module: it is the geometric mean of the ratio over all configurations.
    """
    logs = [math.log(cost / by_token[spec]) for spec, cost in by_sequence.items() if cost > 0 and by_token[spec] > 0]
    if not logs:
        return dict(by_sequence)
    level = math.exp(math.fsum(logs) / len(logs))
    return {spec: level * by_token[spec] for spec in by_sequence}


def measure_sequence_fisher(layer: LayerReplay) -> Iterator[Row]:
    """Sequence-wise Fisher cost of every module of one layer, pooled over the configurations of the menu.

    Matrix products are taken in bfloat16 where the processor is fast at it: the draws vary far more than its rounding.
    """
    length = layer.hidden.shape[1]
    predictions = length - 1 if layer.model.loss.per_token else 1
    for module, trace in layer.traces(fast_matmul_dtype(layer.device), fast_block=True):
        changes, by_token = _module_costs(layer, module, trace, length)
        by_sequence = {spec: sequence_fisher(of, tokens_per_sequence=predictions) for spec, of in changes.items()}
        for spec, fisher in pooled_costs(by_sequence, by_token).items():
            yield cost_row(module, spec, fisher=fisher, loss_changes=changes[spec].tolist())


def _module_costs(
    layer: LayerReplay, module: ModuleInfo, trace: ModuleTrace, sequence_length: int
) -> tuple[dict[QuantSpec, Tensor], dict[QuantSpec, float]]:
    """`sequence_loss_changes` and `token_cost` of the whole menu, as many errors at a time as fit into memory."""
    changes: dict[QuantSpec, Tensor] = {}
    by_token: dict[QuantSpec, float] = {}
    moments = layer.moments[module.id.kind].matrix().to(trace.inputs)
    for specs in _batches(layer.menu, module.parameters * trace.inputs.element_size()):
        errors = {spec: error.to(trace.inputs.dtype) for spec, error in layer.errors(module, specs)}
        changes |= sequence_loss_changes(trace, errors, sequence_length=sequence_length)
        by_token |= {spec: token_cost(error, moments) for spec, error in errors.items()}
        del errors  # before the next are made
    return changes, by_token


def token_cost(error: Tensor, moments: Tensor) -> float:
    """½ tr(E H Eᵀ) in nats per token, for E [out_features, in_features] and H [in_features, in_features]."""
    return 0.5 * float(((error @ moments.to(error)) * error).sum(dtype=torch.float64))


def _batches(menu: Sequence[QuantSpec], error_bytes: int) -> Iterator[Sequence[QuantSpec]]:
    """The menu in pieces whose errors fit into memory together."""
    step = max(1, _ERROR_BYTES_AT_ONCE // error_bytes)
    return (menu[start : start + step] for start in range(0, len(menu), step))


SEQUENCE_FISHER = Cost(
    name="sequence_fisher",
    title="Sequence-wise Fisher",
    schema=SEQUENCE_FISHER_SCHEMA,
    needs=frozenset({Need.GRIDS, Need.STATES, Need.DRAWN_GRADIENTS, Need.MOMENTS}),
    settings=("menu",),
    version=6,
    measure=measure_sequence_fisher,
    columns=(
        CostColumn(
            name="sequence_fisher",
            label="sequence-wise Fisher",
            column="fisher",
            title="Loss-aware cost",
            meaning="Expected growth of the loss when one module is quantized, in nats per token: "
            "true Fisher, whole sequences.",
        ),
    ),
)
