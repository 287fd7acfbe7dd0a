"""The `quantization_config` of a checkpoint's config.json: which matrix has which configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from lmq.errors import DamagedFile, InputError
from lmq.formats.spec import QuantSpec

QUANT_METHOD = "lmq"
FORMAT_VERSION = 2


class LmqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint's config.json.

    `modules` maps the dotted path of each quantized matrix to its `shape` [out_features, in_features] and the fields
    of its QuantSpec; `axis` is that of the groups, `quantizer` describes how the grids were fitted. Raises InputError
    for a format this version cannot read.
    """

    def __init__(
        self,
        *,
        modules: Mapping[str, Mapping[str, Any]],
        axis: int,
        quantizer: Mapping[str, Any],
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
    ):
        if format_version != FORMAT_VERSION:
            raise InputError(
                f"the checkpoint has lmq format version {format_version}, this lmq reads version {FORMAT_VERSION}; "
                "install the version of lmq that wrote it"
            )
        if axis not in (0, 1) or not isinstance(modules, Mapping) or not isinstance(quantizer, Mapping):
            raise DamagedFile(f"the quantization_config needs axis 0 or 1, modules and a quantizer, not axis {axis!r}")
        for path, fields in modules.items():
            _check_module(path, fields)
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.axis = axis
        self.quantizer = dict(quantizer)
        self.modules = {path: dict(fields) for path, fields in modules.items()}

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """Configuration of each quantized matrix, by dotted path."""
        return {
            path: QuantSpec(**{name: value for name, value in fields.items() if name != "shape"})
            for path, fields in self.modules.items()
        }

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """out_features and in_features of each quantized matrix, by dotted path."""
        return {path: (fields["shape"][0], fields["shape"][1]) for path, fields in self.modules.items()}


def _check_module(path: str, fields: Any) -> None:
    """Raise DamagedFile for a module's entry that does not hold a shape and a configuration that fits it."""
    shape = fields.get("shape") if isinstance(fields, Mapping) else None
    if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(_is_positive(size) for size in shape):
        raise DamagedFile(f"the quantization_config of {path} needs a shape of two positive sizes: {fields!r}")
    options = {name: value for name, value in fields.items() if name != "shape"}
    if not {"bits", "group_size"} <= options.keys() <= {field.name for field in dataclass_fields(QuantSpec)}:
        raise DamagedFile(f"the quantization_config of {path} needs bits and group_size, and not {sorted(options)}")
    if not all(type(value) is int for value in options.values()):
        raise DamagedFile(f"the quantization_config of {path} needs whole numbers: {fields!r}")
    try:
        QuantSpec(**options).size_bytes(shape[0] * shape[1], shape[1])
    except InputError as error:
        raise DamagedFile(f"the quantization_config of {path} is not one that lmq writes: {error}") from error


def _is_positive(value: Any) -> bool:
    return type(value) is int and value > 0
