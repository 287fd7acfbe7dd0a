"""Baselines that need no allocation: every matrix rounded alike, to nearest or in a format of `lmq.formats`.

What other programs quantized (GPTQ, AWQ, ...) is evaluated from its files: see `lmq.evaluation.whole_model`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmq.errors import InputError
from lmq.formats import FORMATS, Format, rounding_format
from lmq.formats.spec import ALLOWED_GROUP_SIZES, QuantSpec
from lmq.measurement.grids import fit_grids
from lmq.model.structure import ModelStructure
from lmq.quantizers import quantizer

_DEFAULT_SPEC = QuantSpec(4, 64)


@dataclass(frozen=True)
class RoundedBaseline:
    """A rounding of every matrix: `rtn` in a configuration, or a format such as `nf4`, with its own formula of size."""

    rounding: QuantSpec | Format

    @classmethod
    def parse(cls, text: str) -> RoundedBaseline:
        """Read `rtn` (b4g64), `rtn b3g128`, `nf4` (groups of 64) or `nf4 g128`. Raises InputError."""
        name, _, setting = " ".join(text.split()).partition(" ")
        if name == "rtn" and re.fullmatch(r"(b\d+g\d+)?", setting):
            return cls(QuantSpec.parse(setting) if setting else _DEFAULT_SPEC)
        if name in FORMATS and re.fullmatch(r"(g\d+)?", setting):
            return cls(rounding_format(name, group_size=int(setting[1:] or 64)))
        formats = " or ".join(f"'{known}' or '{known} g128'" for known in FORMATS)
        raise InputError(
            f"{text!r} is not a baseline; write 'rtn b4g64', {formats}, "
            "or give a checkpoint of another program as {name: ..., path: ...}"
        )

    @property
    def label(self) -> str:
        """`rtn b4g64`, `nf4 g64`."""
        if isinstance(self.rounding, QuantSpec):
            return f"rtn {self.rounding.name}"
        return f"{self.rounding.name} g{self.rounding.group_size}"

    def round_trip(self, weight: Tensor, name: str = "the weight") -> Tensor:
        """The rounded weight, float32 [out_features, in_features]. Raises InputError where it does not fit."""
        if not isinstance(self.rounding, QuantSpec):
            return self.rounding.round_trip(weight)
        grid = fit_grids(weight, [self.rounding], quantizer("rtn"), name)[self.rounding]
        return grid.round_trip(weight)

    def size_bytes(self, structure: ModelStructure) -> int:
        """Bytes of all matrices, as our checkpoint or the format stores them."""
        return sum(self.rounding.size_bytes(module.parameters) for module in structure.modules)

    def check_fits(self, structure: ModelStructure) -> None:
        """Raise InputError naming the first matrix that the groups do not divide."""
        size = self.rounding.group_size
        allowed = ALLOWED_GROUP_SIZES if isinstance(self.rounding, QuantSpec) else self.rounding.group_sizes
        for module in structure.modules:
            if module.parameters % size:
                raise InputError(
                    f"{self.label} does not fit {module.id}, {module.parameters:,} weights that groups of {size} do "
                    f"not divide; choose another group size: {', '.join(map(str, allowed))}"
                )

    def preparation(self, structure: ModelStructure) -> Callable[[nn.Module, int], None]:
        """Rounds the matrices of a block in place of its weights; for `lmq.evaluation.windows.last_states`."""

        def put_in(block: nn.Module, layer: int) -> None:
            for module in structure.in_layer(layer):
                self._round(block.get_submodule(module.id.kind), str(module.id))

        return put_in

    def round_model(self, model: Any, structure: ModelStructure) -> None:
        """Round the matrices of a whole model that the caller owns."""
        for module in structure.modules:
            self._round(model.get_submodule(structure.path(module.id)), str(module.id))

    @torch.no_grad()
    def _round(self, linear: nn.Module, name: str) -> None:
        weight = linear.get_parameter("weight")
        linear.weight = nn.Parameter(self.round_trip(weight, name).to(weight), requires_grad=False)
