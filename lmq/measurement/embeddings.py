"""Input embedding and output head: their grids and what these cost, some rows at a time.

Both are matrices [vocabulary, hidden], which may be too large to be held in float32 more than once; groups run along
the hidden dimension. Costs are those of `lmq.measurement.sequence_fisher`, in nats per token, so that one program
divides the bytes over them and the matrices of the blocks:

- Head. With E = Ŵ − W and x_t its input, the logits change by z = E x_t. Labels are drawn independently at every
  position, so that the expectation over them is exact without a draw: ½ mean_t Var_{v ~ p_t}(z_v), that is ½ zᵀ H z
  for the Hessian H = diag(p) − p pᵀ of the loss by the logits. The mean is taken over positions spread over the text.
- Embedding. Row v is looked up where the text has token v: the loss changes by Σ_t ⟨g_t, E[v_t]⟩, g_t being the
  gradient at the row that position t looked up. It is squared sequence by sequence, for every draw of labels.
  A row that the text does not have adds nothing: the text stands for how often tokens occur.
- Tied. One matrix is both and pays for both; that the two changes may go together is left out.

Scales and zeros of calibrated quantizers are fitted to column weights, the diagonal of the Fisher matrix summed over
the rows: mean_t w_t x_t² of a head, w_t = Σ_v p_v (1 − p_v), mean_t g_t² of an embedding, the sum of both where tied.
So rows that the text does not have are fitted as the mean of those that it has. Codes are the nearest ones, without
error feedback: with it the codes of every configuration would have to be kept, a gigabyte each for large vocabularies.
Quantizers that look at weights alone fit blocks of rows as they do whole matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmq.errors import InputError
from lmq.formats.coded_grid import EncodedMatrix
from lmq.formats.gguf_types import BLOCKS_TENSOR, GgufMatrix
from lmq.formats.groups import nearest_codes, reachable, store_grid, to_groups
from lmq.formats.packing import pack
from lmq.formats.spec import QuantSpec
from lmq.measurement.base import Row, cost_row
from lmq.measurement.sequence_fisher import sequence_fisher
from lmq.model.stored_matrices import StoredMatrix
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModuleInfo
from lmq.quantizers import CALIBRATED, CalibratedQuantizer, Quantizer
from lmq.quantizers.calibrated import fitted_values, gguf_types_of
from lmq.quantizers.gguf_fit import nearest_matrix
from lmq.quantizers.integer_zeros import IntegerZeros

_HEAD_TOKENS = 1024
"""Positions that the head is judged at, at most."""
_PROBABILITIES = 1 << 27
"""Predicted probabilities that are kept at most: with a large vocabulary those of fewer positions."""


@dataclass(frozen=True, eq=False)
class HeadSample:
    """What the model predicts at some positions of the text, by which the head is judged.

    `inputs` float32 [tokens, hidden], `probabilities` bfloat16 [tokens, vocabulary], `slopes` of the logits by the
    outputs of the head, float32 [tokens, 1] where all of a token are the same, else bfloat16 [tokens, vocabulary].
    """

    inputs: Tensor
    probabilities: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, model: StreamedModel, last: Tensor) -> HeadSample:
        """A sample for states that leave the last block, [sequences, sequence_length, hidden].

        Last positions, which predict nothing, are left out.
        """
        states = last[:, :-1].flatten(0, 1)
        count = min(len(states), _HEAD_TOKENS, max(1, _PROBABILITIES // model.structure.vocabulary_size))
        chosen = states[torch.linspace(0, len(states) - 1, count).round().long()]
        inputs: list[Tensor] = []
        probabilities: list[Tensor] = []
        slopes: list[Tensor] = []
        for piece in chosen.split(model.tokens_at_once):
            trace = model.head_trace(piece)
            same = bool((trace.slopes == trace.slopes[:, :1]).all())
            inputs.append(trace.inputs.float())
            probabilities.append(trace.probabilities.bfloat16())
            slopes.append(trace.slopes[:, :1] if same else trace.slopes.bfloat16())
        if len({part.shape[1] for part in slopes}) > 1:
            slopes = [part.bfloat16().expand(-1, model.structure.vocabulary_size) for part in slopes]
        return cls(torch.cat(inputs), torch.cat(probabilities), torch.cat(slopes))

    def column_weights(self) -> Tensor:
        """mean_t w_t x_t², w_t = Σ_v p_v (1 − p_v) slope_v²: float32 [hidden]."""
        weights = torch.stack(
            [
                (of_token.float() * (1 - of_token.float()) * slopes.float().square()).sum()
                for of_token, slopes in zip(self.probabilities, self.slopes, strict=True)
            ]
        )
        return (weights[:, None] * self.inputs.square()).mean(0)


class HeadCost:
    """½ mean_t Var_{v ~ p_t}(z_v) for the change z = E x_t of the logits, summed up over blocks of rows of E."""

    def __init__(self, sample: HeadSample):
        self._sample = sample
        tokens = len(sample.inputs)
        self._weights, self._sums, self._squares = (
            torch.zeros(tokens, dtype=torch.float64, device=sample.inputs.device) for _ in range(3)
        )

    def add(self, rows: slice, error: Tensor) -> None:
        """Count in some rows of E, float32 [rows, hidden]."""
        sample = self._sample
        slopes = sample.slopes if sample.slopes.shape[1] == 1 else sample.slopes[:, rows]
        change = (sample.inputs @ error.t()).mul_(slopes.float())
        probabilities = sample.probabilities[:, rows].float()
        weighted = probabilities * change
        self._weights += probabilities.sum(1)
        self._sums += weighted.sum(1)
        self._squares += weighted.mul_(change).sum(1)

    @property
    def value(self) -> float:
        """Nats per token."""
        variance = self._squares / self._weights - (self._sums / self._weights).square()
        return 0.5 * float(variance.clamp_min(0).mean())


class LookupChanges:
    """⟨∇_W L, E⟩ of an embedding for every draw and sequence, from the rows of E that the text looks up.

    `token_ids` [sequences, sequence_length]; `gradient` [draws · sequences, sequence_length, hidden] at the rows that
    were looked up, sequences fastest.
    """

    def __init__(self, token_ids: Tensor, gradient: Tensor):
        self._seen, self._places = token_ids.long().unique(return_inverse=True)
        self._gradient = gradient
        self._errors = torch.zeros(len(self._seen), gradient.shape[-1])

    def add(self, rows: slice, error: Tensor) -> None:
        """Count in some rows of E, float32 [rows, hidden]."""
        bounds = torch.searchsorted(self._seen, torch.tensor([rows.start, rows.stop]))
        seen = slice(int(bounds[0]), int(bounds[1]))
        self._errors[seen] = error.cpu()[self._seen[seen] - rows.start]

    @property
    def value(self) -> Tensor:
        """Float64 [draws · sequences]."""
        changes = [
            (of_sequence * self._errors[self._places[number % len(self._places)]]).sum(dtype=torch.float64)
            for number, of_sequence in enumerate(self._gradient)
        ]
        return torch.stack(changes)


def column_weights(module: ModuleInfo, sample: HeadSample, gradient: Tensor | None, *, fisher_weighted: bool) -> Tensor:
    """What grids of calibrated quantizers are fitted to, float32 [hidden].

    `gradient` [draws · sequences, sequence_length, hidden] at the rows that were looked up. Not Fisher-weighted: the
    mean square of the head's inputs, ones for an embedding.
    """
    found = []
    if module.part != "embedding":
        found.append(sample.column_weights() if fisher_weighted else sample.inputs.square().mean(0))
    if module.part != "head":
        if gradient is None or not fisher_weighted:
            found.append(torch.ones(module.in_features))
        else:
            predicting = gradient.shape[0] * (gradient.shape[1] - 1)
            found.append((gradient.square().sum((0, 1), dtype=torch.float64) / predicting).float())
    return torch.stack([part.cpu() for part in found]).sum(0)


def fit_rows(
    matrix: StoredMatrix, menu: Sequence[QuantSpec], quantizer: Quantizer | CalibratedQuantizer, weights: Tensor | None
) -> dict[QuantSpec, EncodedMatrix]:
    """The stored grid of an embedding for each configuration; `weights` [hidden] are for calibrated quantizers.

    Raises NotFiniteError for a weight with NaN or infinity, and InputError for a quantizer with groups along the
    vocabulary, a calibrated one without weights, and a configuration whose group size does not divide the matrix.
    """
    if quantizer.axis != 1:
        raise InputError("groups of embeddings run along the hidden dimension; set measure.axis to 1")
    zeros: IntegerZeros = getattr(quantizer, "integer_zeros", False)
    whole_zeros = bool(zeros)
    rows, columns = matrix.shape
    found_types = _fit_types(matrix, menu, quantizer, weights)
    own = [spec for spec in menu if spec.gguf is None]
    values = {spec: torch.empty(2, spec.groups(rows * columns)) for spec in own}
    for of_block, block in matrix.blocks(_whole_groups(own, columns)) if own else ():
        for spec, found in values.items():
            if not isinstance(quantizer, CalibratedQuantizer):
                scale, zero = quantizer.fit(block, spec)
            elif weights is None:
                raise InputError(f"quantizer {quantizer.name!r} needs column weights of embeddings; measure them")
            else:
                scale, zero = fitted_values(block, weights, spec, 1, integer_zeros=zeros)
            if not whole_zeros:
                scale, zero = reachable(to_groups(block, spec.group_size, 1), scale, zero, spec.bits)
            groups = _groups(of_block, columns, spec)
            found[0, groups], found[1, groups] = scale, zero
    found_own = {
        spec: store_grid(scale, zero, spec, matrix.shape, 1, integer_zeros=whole_zeros)
        for spec, (scale, zero) in values.items()
    }
    return {spec: found_own[spec] if spec in found_own else found_types[spec] for spec in menu}


def _fit_types(
    matrix: StoredMatrix, menu: Sequence[QuantSpec], quantizer: Quantizer | CalibratedQuantizer, weights: Tensor | None
) -> dict[QuantSpec, GgufMatrix]:
    """The embedding in the menu's types of GGUF, with the codes that are nearest on weighted grids."""
    found: dict[QuantSpec, GgufMatrix] = {}
    for kind, specs in gguf_types_of(menu, matrix.shape[1]).items():
        if weights is None or not isinstance(quantizer, CalibratedQuantizer):
            raise InputError(
                f"quantizer {quantizer.name!r} finds no codes of {kind.name}; take {', '.join(CALIBRATED)}"
            )
        blocks = torch.cat([nearest_matrix(block, weights, kind).blocks for _, block in matrix.blocks(1)])
        found |= dict.fromkeys(specs, GgufMatrix(kind, matrix.shape, blocks))
    return found


def quantize_rows(matrix: StoredMatrix, grid: EncodedMatrix) -> dict[str, Tensor]:
    """The stored tensors of an embedding on its grid, by name; its codes are held whole, a byte each."""
    if isinstance(grid, GgufMatrix):
        return {BLOCKS_TENSOR: grid.blocks}
    rows, columns = matrix.shape
    codes = torch.empty(rows * columns // grid.spec.group_size, grid.spec.group_size, dtype=torch.uint8)
    scale, zero = grid.decode()
    for of_block, block in matrix.blocks(_whole_groups([grid.spec], columns)):
        groups = _groups(of_block, columns, grid.spec)
        codes[groups] = nearest_codes(block.view(-1, grid.spec.group_size), scale[groups], zero[groups], grid.spec.bits)
    return {"codes": pack(codes, grid.spec.bits), **grid.to_tensors()}


def row_errors(matrix: StoredMatrix, grid: EncodedMatrix) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows: their numbers, their weights and their errors Ŵ − W, float32 [rows, hidden]."""
    if isinstance(grid, GgufMatrix):
        for of_block, block in matrix.blocks(1):
            yield of_block, block, grid.dequantize(of_block).sub_(block)
        return
    columns, group_size = matrix.shape[1], grid.spec.group_size
    scale, zero = grid.decode()
    for of_block, block in matrix.blocks(_whole_groups([grid.spec], columns)):
        groups = _groups(of_block, columns, grid.spec)
        codes = nearest_codes(block.view(-1, group_size), scale[groups], zero[groups], grid.spec.bits)
        rounded = codes.sub_(zero[groups, None]).mul_(scale[groups, None]).view(-1, columns)
        yield of_block, block, rounded.sub_(block)


def frobenius_row(module: ModuleInfo, matrix: StoredMatrix, spec: QuantSpec, grid: EncodedMatrix) -> Row:
    """Row of `lmq.measurement.frobenius.FROBENIUS_SCHEMA` for an embedding on a grid."""
    squares = torch.zeros(2, dtype=torch.float64)
    for _, weight, error in row_errors(matrix, grid):
        squares += torch.stack([part.square().sum(dtype=torch.float64) for part in (error, weight)])
    error_norm, norm = squares.sqrt().tolist()
    return cost_row(module, spec, frobenius_error=error_norm, frobenius_norm=norm)


def fisher_rows(
    module: ModuleInfo,
    matrix: StoredMatrix,
    grids: Mapping[QuantSpec, EncodedMatrix],
    *,
    sample: HeadSample | None,
    token_ids: Tensor,
    gradient: Tensor,
) -> Iterator[Row]:
    """Rows of `lmq.measurement.sequence_fisher.SEQUENCE_FISHER_SCHEMA` for an embedding, head or both in one.

    `loss_changes` are those of the lookups; a head's cost has none. `gradient` as `LookupChanges` takes it.
    """
    for spec, grid in grids.items():
        head = None if sample is None or module.part == "embedding" else HeadCost(sample)
        lookups = None if module.part == "head" else LookupChanges(token_ids, gradient)
        parts: list[Any] = [part for part in (head, lookups) if part is not None]
        for rows, _, error in row_errors(matrix, grid):
            for part in parts:
                part.add(rows, error)
        changes = torch.zeros(0) if lookups is None else lookups.value
        fisher = 0.0 if head is None else head.value
        if lookups is not None:
            fisher += sequence_fisher(changes, tokens_per_sequence=token_ids.shape[1] - 1)
        yield cost_row(module, spec, fisher=fisher, loss_changes=changes.tolist())


def _whole_groups(menu: Sequence[QuantSpec], columns: int) -> int:
    """Rows that are made of whole groups of every configuration."""
    return max(spec.group_size // math.gcd(spec.group_size, columns) for spec in menu)


def _groups(rows: slice, columns: int, spec: QuantSpec) -> slice:
    return slice(rows.start * columns // spec.group_size, rows.stop * columns // spec.group_size)
