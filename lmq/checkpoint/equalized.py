"""A copy of a model that computes the same and is easier to quantize: channels rescaled between its matrices.

A group of weights has one scale, so its steps are as coarse for a channel that matters much as for one that matters
little. Where a norm or a matrix gives channels to other matrices (`lmq.model.channels`), channel j may be divided by
s_j and the weights that take it multiplied: its rounding errors then count s_j⁻². Let d_j be what an error at input j
costs once error feedback has done its part (1 over the diagonal of the inverse of the inputs' damped second moments),
and c_j² = Σ_o w_oj². What a group of columns costs goes with Σ c_j² s_j² · Σ d_j / s_j², which is least where s_j⁴ is
proportional to d_j / c_j²; matrices that share their inputs are added up. (AWQ, Lin et al. 2023, arXiv 2306.00978,
searches a power of the inputs' magnitudes in the place of that.) Channels stay as they are where that sum would fall by
little, which whole models did not gain by (decision 19).

Every tensor keeps its type. A norm's new weight is rounded to it first and s follows from what it became, so that norms
are exact; matrices are rounded once more, far below the steps of 8 bits.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lmq.checkpoint.reopen import check_opens, sample_logits
from lmq.errors import LmqError, UnsupportedModel
from lmq.model.block_inputs import BlockInputs
from lmq.model.channels import TRIED_TOKENS, SharedChannels, relative_difference, shared_channels
from lmq.model.directory import complete_directory, copy_companions, write_shards
from lmq.model.stored import StoredModel, read_stored_model
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure
from lmq.model.tensors import FLOAT_TYPES, StoredTensor, headers_of

_log = logging.getLogger(__name__)

_GROUP_SIZE = 64
"""Of columns whose factors are relative to each other; those of other sizes differ little."""
_DAMPING = 0.2
"""Of second moments, as `fisher-gptq` has it."""
_COLUMNS_AT_ONCE = 4096
"""Second moments of more inputs are taken in blocks on the diagonal."""
_ROUNDS = 30
_TOLERANCES = {"F32": 1e-4, "F16": 4e-3, "BF16": 3e-2}
"""Of what a block adds to its states, relative, for types that the rescaled weights are rounded to."""
_SHARD_BYTES = 5 * 10**9


@torch.no_grad()
def write_equalized(
    model_dir: Path,
    structure: ModelStructure,
    tokens: Tensor,
    target: Path,
    *,
    least_fall: float = 1 / 7,
    device: torch.device | str = "cpu",
    advance: Callable[[float], None] = lambda _: None,
) -> int:
    """Write the model of `model_dir` with channels rescaled as the directory `target`; how many groups of them are.

    `tokens` int64 [sequences, sequence_length] are what inputs are measured on, block by block. Channels are rescaled
    where what their groups cost falls by the share `least_fall`. The directory appears when it is complete, and opens
    as the model's own class. `advance` is told how far this is, from 0 to 1.

    Raises:
        UnsupportedModel: the model sees images.
        LmqError: a block computes something else after all.
        InputError: `target` exists.
    """
    if structure.sees_images or structure.layers_beside:
        raise UnsupportedModel(
            f"{structure.architecture} sees images, and channels are rescaled in blocks of text alone; set equalize to "
            "false for it"
        )
    stored = read_stored_model(model_dir)
    model = StreamedModel.open(model_dir, structure, device=device)
    inputs, tried = model.block_inputs(tokens.shape[1]), model.block_inputs(TRIED_TOKENS)
    hidden = model.embed(tokens)
    groups = possible = 0
    with complete_directory(target) as directory, tempfile.TemporaryDirectory(dir=directory.parent) as changed_dir:
        files = []
        for layer in range(structure.layers):
            prefix = f"{structure.block_path(layer)}."
            kinds = [module.id.kind for module in structure.in_layer(layer)]
            with model.block(layer) as block:
                direct = _stored_alone(stored, prefix, block)
                shared = shared_channels(block, tried[layer], structure.hidden_size, kinds, direct)
                hidden, moments = _moments(block, inputs[layer], hidden, shared)
                factors = _worthwhile(block, shared, moments, least_fall)
                changed = _equalized(block, tried[layer], factors, direct, structure, layer)
            file = Path(changed_dir) / f"{layer}.safetensors"
            save_file({direct[name].name: value for name, value in changed.items()}, file)
            files.append(file)
            groups += len(factors)
            possible += len(shared)
            advance((layer + 1) / structure.layers)
        _log.info("%d of %d groups of channels of %s rescaled", groups, possible, structure.architecture)
        if not groups:
            _log.warning("no channels of %s gain enough by it; the copy is the model itself", structure.architecture)
        write_shards(directory, {**stored.headers, **headers_of(files)}, _SHARD_BYTES)
        copy_companions(model_dir, directory)
        check_opens(directory, sample_logits(StreamedModel.open(directory, structure)), structure)
    return groups


def _stored_alone(stored: StoredModel, prefix: str, block: nn.Module) -> dict[str, StoredTensor]:
    """A block's tensors that are stored as they are used, and not used elsewhere, by their names in the block."""
    names = {name: f"{prefix}{name}" for name, _ in block.named_parameters()}
    found = {name: stored.tensors[whole] for name, whole in names.items() if whole in stored.tensors}
    uses: dict[StoredTensor, int] = {}
    for tensor in stored.tensors.values():
        uses[tensor] = uses.get(tensor, 0) + 1
    return {name: tensor for name, tensor in found.items() if uses[tensor] == 1 and tensor.dtype in _TOLERANCES}


def _moments(
    block: nn.Module, inputs: BlockInputs, hidden: Tensor, shared: Sequence[SharedChannels]
) -> tuple[Tensor, list[list[Tensor]]]:
    """States that leave the block, and for each of `shared` Σ x xᵀ of what enters its takers, in blocks of columns."""
    moments: list[list[Tensor]] = [[] for _ in shared]
    handles = []
    for found, channels in zip(moments, shared, strict=True):

        def add(_: nn.Module, args: tuple[Tensor, ...], found: list[Tensor] = found) -> None:
            pieces = args[0].flatten(0, -2).float().split(_COLUMNS_AT_ONCE, dim=1)
            if not found:
                found += [torch.zeros(piece.shape[1], piece.shape[1], device=piece.device) for piece in pieces]
            for total, piece in zip(found, pieces, strict=True):
                total.addmm_(piece.t(), piece)

        handles.append(block.get_submodule(channels.takers[0]).register_forward_pre_hook(add))
    try:
        return torch.cat([inputs.run(block, sequence) for sequence in hidden.split(1)]), moments
    finally:
        for handle in handles:
            handle.remove()


def _equalized(
    block: nn.Module,
    inputs: BlockInputs,
    factors: Mapping[SharedChannels, Tensor],
    direct: Mapping[str, StoredTensor],
    structure: ModelStructure,
    layer: int,
) -> dict[str, Tensor]:
    """The tensors of a block that rescaling changes, as they are stored, by their names in the block."""
    names = list(dict.fromkeys(name for channels in factors for name in channels.tensors(block)))
    if not names:
        return {}
    hidden = torch.randn(1, TRIED_TOKENS, structure.hidden_size, generator=torch.Generator().manual_seed(1))
    hidden = hidden.to(inputs.device, inputs.dtype)
    before = inputs.run(block, hidden) - hidden
    for channels, wanted in factors.items():
        exact = wanted
        if channels.offset is not None:
            stored_as = FLOAT_TYPES[direct[f"{channels.source}.weight"].dtype]
            exact = _exact_for_norm(block, channels, wanted, stored_as)
        channels.rescale(block, exact)
    changed = {}
    for name in names:
        value = block.get_parameter(name)
        rounded = value.to(FLOAT_TYPES[direct[name].dtype])
        value.copy_(rounded)
        changed[name] = rounded.cpu().contiguous()
    difference = relative_difference(inputs.run(block, hidden) - hidden, before)
    if difference > max(_TOLERANCES[direct[name].dtype] for name in names):
        raise LmqError(
            f"block {layer} of {structure.architecture} computes something else with its channels rescaled (relative "
            f"difference {difference:.2g}); set equalize to false"
        )
    return changed


def _cost_of_errors(moments: Tensor) -> Tensor:
    """1 over the diagonal of the inverse of damped second moments, float32 [inputs]; ones where nothing comes in."""
    mean = float(moments.diagonal().double().mean())
    if not mean > 0:
        return torch.ones(len(moments), device=moments.device)
    damped = moments.double() / mean
    damped.diagonal().add_(_DAMPING)
    return (1 / torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()).float()


def _worthwhile(
    block: nn.Module, shared: Sequence[SharedChannels], moments: Sequence[Sequence[Tensor]], least_fall: float
) -> dict[SharedChannels, Tensor]:
    """s of those channels whose groups cost less by `least_fall` with it, each looked at by itself."""
    found = {}
    for channels, of_inputs in zip(shared, moments, strict=True):
        costs = torch.cat([_cost_of_errors(each) for each in of_inputs])
        sizes = [block.get_submodule(taker).get_parameter("weight").square().sum(0) for taker in channels.takers]
        factors = channels.pooled(_log_factors(sizes, costs)).exp()
        squares = channels.repeated(factors).square()
        before = sum((_sum_by_group(size) * costs).sum() for size in sizes)
        after = sum((_sum_by_group(size * squares) * costs / squares).sum() for size in sizes)
        if after <= (1 - least_fall) * before:
            found[channels] = factors
    return found


def _sum_by_group(values: Tensor) -> Tensor:
    """The sum of each group, in the place of every value in it."""
    width = math.gcd(len(values), _GROUP_SIZE)
    return values.view(-1, width).sum(1).repeat_interleave(width)


def _log_factors(sizes: Sequence[Tensor], costs: Tensor) -> Tensor:
    """Logarithms of s by input, of mean 0 in every group, for c² of each matrix and d."""
    width = math.gcd(len(costs), _GROUP_SIZE)
    squares = torch.ones_like(costs)
    for _ in range(_ROUNDS if len(sizes) > 1 else 1):
        spread = _sum_by_group(costs / squares)
        wanted = costs * sum(_sum_by_group(size * squares) for size in sizes)
        paid = spread * sum(sizes)
        squares = torch.where((wanted > 0) & (paid > 0), wanted / paid, 1).sqrt()
        squares = squares / _sum_by_group(squares.log() / width).exp()
    return squares.log() / 2


def _exact_for_norm(block: nn.Module, channels: SharedChannels, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """The factors that a norm's weight has once it is rounded to its type; 1 for a weight of 0."""
    weight = block.get_submodule(channels.source).get_parameter("weight") + (channels.offset or 0)
    rounded = (weight / factors - (channels.offset or 0)).to(dtype).float() + (channels.offset or 0)
    return torch.where((weight != 0) & (rounded != 0), weight / rounded, 1)
