"""States and loss gradients of every layer, kept as tables: what everything measured on activations replays.

A layer's capture is two tables with one row per token: the states that enter the block, and the gradient of
the summed loss with respect to the states that leave it. Both stay float32: gradients of single tokens are
far below what 16-bit types resolve.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from lmq.errors import DamagedFile, InputError, NotFiniteError
from lmq.model.block_inputs import BlockInputs
from lmq.numerics import require_finite
from lmq.tables import TableSchema, read_table


def hidden_states_schema(hidden_size: int) -> TableSchema:
    """Table of the states that enter a block."""
    return TableSchema("hidden-states", 1, _columns(hidden_size))


def gradients_schema(hidden_size: int) -> TableSchema:
    """Table of the loss gradients at the states that leave a block."""
    return TableSchema("gradients", 1, _columns(hidden_size))


@torch.no_grad()
def forward_block(block: nn.Module, inputs: BlockInputs, hidden: Tensor, *, layer: int, batch: int = 1) -> Tensor:
    """States that leave a block [sequences, sequence_length, hidden] for those that enter it.

    `batch` sequences are run at once; the result is float32 where `hidden` is. Raises NotFiniteError naming
    the layer, and the module whose outputs were the first not to be finite.
    """
    leaving = torch.empty_like(hidden, dtype=torch.float32)
    for start in range(0, len(hidden), batch):
        piece = slice(start, start + batch)
        leaving[piece] = inputs.run(block, hidden[piece])
    try:
        require_finite(leaving, f"the states that leave layer {layer}")
    except NotFiniteError as error:
        broken = leaving.flatten(1).isfinite().all(1).logical_not().nonzero()[0]
        module = _first_not_finite(block, inputs, hidden[broken])
        raise NotFiniteError(f"{error}. The outputs of its {module} are the first that are not finite") from error
    return leaving


def _first_not_finite(block: nn.Module, inputs: BlockInputs, hidden: Tensor) -> str:
    """Name of the first module in a block whose outputs are not finite; what belongs to no module is "own sums"."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and not bool(output.isfinite().all()):
            found.append(name)

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in block.named_modules()
        if name
    ]
    try:
        inputs.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "own sums"


def backward_block(
    block: nn.Module, inputs: BlockInputs, hidden: Tensor, gradient: Tensor, *, layer: int, batch: int = 1
) -> Tensor:
    """Loss gradient at the states that enter a block, from the one at those that leave it.

    The block is run again on `hidden` [sequences, sequence_length, hidden], which entered it, once for all draws;
    `gradient` and the result are [draws · sequences, sequence_length, hidden], sequences fastest. Weights get no
    gradient. Raises NotFiniteError naming the layer.
    """
    entering_gradient = torch.empty_like(gradient, dtype=torch.float32)
    draws = range(0, len(gradient), len(hidden))
    for start in range(0, len(hidden), batch):
        count = len(hidden[start : start + batch])
        entering = hidden[start : start + count].detach().requires_grad_(True)
        with torch.enable_grad():
            leaving = inputs.run(block, entering)
        for draw in draws:
            piece = slice(draw + start, draw + start + count)
            (entering_gradient[piece],) = torch.autograd.grad(
                leaving, entering, gradient[piece].to(leaving), retain_graph=draw != draws[-1]
            )
    require_finite(entering_gradient, f"the loss gradient at the states that enter layer {layer}")
    return entering_gradient


class StatesByLayer:
    """States or gradients of several layers that come image by image, kept in files of a folder.

    No more of them is in memory than is added at a time, or one layer's when it is asked for.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._shapes: dict[int, tuple[int, int]] = {}
        self._draws = 1

    def add(self, layer: int, states: Tensor) -> None:
        """Add some images' [draws, images, patches, width].

        Raises InputError for images that have not as many patches as those before.
        """
        self._draws, _, *shape = states.shape
        expected = self._shapes.setdefault(layer, (shape[0], shape[1]))
        if tuple(shape) != expected:
            raise InputError(
                f"an image enters layer {layer} as {list(shape)} (patches, width) where those before are "
                f"{list(expected)}; images of several sizes are not measured: leave the tower out of modules"
            )
        for draw, of_draw in enumerate(states.detach().to("cpu", torch.float32)):
            with self._file(layer, draw).open("ab") as file:
                file.write(of_draw.contiguous().numpy().tobytes())

    def of(self, layer: int) -> Tensor:
        """All of a layer, float32 [draws · images, patches, width], images fastest."""
        by_draw = [np.fromfile(self._file(layer, draw), np.float32) for draw in range(self._draws)]
        return torch.from_numpy(np.concatenate(by_draw)).view(-1, *self._shapes[layer])

    @property
    def layers(self) -> list[int]:
        """Layers that something was added of."""
        return list(self._shapes)

    def _file(self, layer: int, draw: int) -> Path:
        return self._folder / f"{layer}.{draw}"


def write_hidden_states(path: Path, hidden: Tensor) -> None:
    """Write states [sequences, sequence_length, hidden] as one row per token, in float32."""
    _write(path, hidden_states_schema(hidden.shape[-1]), hidden)


def read_hidden_states(path: Path) -> Tensor:
    """Inverse of `write_hidden_states`. Raises DamagedFile."""
    return _read(path, hidden_states_schema(1))


def write_gradients(path: Path, gradient: Tensor) -> None:
    """Write gradients [sequences, sequence_length, hidden] as one row per token, in float32."""
    _write(path, gradients_schema(gradient.shape[-1]), gradient)


def read_gradients(path: Path) -> Tensor:
    """Inverse of `write_gradients`. Raises DamagedFile."""
    return _read(path, gradients_schema(1))


def _columns(hidden_size: int) -> pa.Schema:
    element = pa.field("element", pa.float32(), nullable=False)
    return pa.schema(
        [
            pa.field("sequence", pa.int32(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("values", pa.list_(element, hidden_size), nullable=False),
        ]
    )


def _write(path: Path, schema: TableSchema, states: Tensor) -> None:
    sequences, sequence_length, _ = states.shape
    values = pa.array(states.detach().to("cpu", torch.float32).contiguous().view(-1).numpy())
    table = pa.table(
        [
            pa.array(np.repeat(np.arange(sequences, dtype=np.int32), sequence_length)),
            pa.array(np.tile(np.arange(sequence_length, dtype=np.int32), sequences)),
            pa.FixedSizeListArray.from_arrays(values, type=schema.columns.field("values").type),
        ],
        schema=schema.columns.with_metadata(
            {"lmq.schema": schema.label, "sequences": str(sequences), "sequence_length": str(sequence_length)}
        ),
    )
    # zstd saves 8 % of these values and takes twice as long to read
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)


def _read(path: Path, schema: TableSchema) -> Tensor:
    table = read_table(path, schema)
    sequences, sequence_length = (int(table.schema.metadata[key]) for key in (b"sequences", b"sequence_length"))
    if table.num_rows != sequences * sequence_length:
        raise DamagedFile(
            f"{path} has {table.num_rows} rows where {sequences} sequences of {sequence_length} tokens were written; "
            "remove it, it will be made again"
        )
    values = table.column("values").combine_chunks().flatten().to_numpy()
    return torch.from_numpy(values.copy()).view(sequences, sequence_length, -1)
