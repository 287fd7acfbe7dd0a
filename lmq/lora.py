"""LoRA adapters of PEFT on a quantized model: the adapters train, the codes stay as they are.

    config = lmq.lora.with_packed_layers(LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model = get_peft_model(lmq.load(path), config)

PEFT knows the layers of other libraries by name and takes ours through its mapping of custom layers, which a saved
adapter does not hold: open one with `PeftModel.from_pretrained(model, path, config=with_packed_layers(
PeftConfig.from_pretrained(path)))`.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from lmq.errors import InputError
from lmq.formats.packed_layer import QuantizedLinear

Config = TypeVar("Config", bound=LoraConfig)


def with_packed_layers(config: Config) -> Config:
    """Have PEFT put LoRA on quantized layers too; returns `config` itself. Raises InputError for DoRA, which reads
    the dense weight in every step.
    """
    if config.use_dora:
        raise InputError("use_dora = True needs dense weights; open the checkpoint with lmq.load(path, dense=True)")
    config._register_custom_module({QuantizedLinear: PackedLoraLinear})
    return config


class PackedLoraLinear(Linear):
    """PEFT's LoRA layer around a QuantizedLinear: `base(x) + B(A(x)) · scaling`."""

    def __init__(self, base_layer: QuantizedLinear, adapter_name: str, **options: Any):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            super().__init__(base_layer, adapter_name, **options)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the sum of the weights and an adapter does not lie on the grid of the codes."""
        raise InputError(
            "adapters cannot be merged into packed codes; keep them apart, or merge them into "
            "lmq.load(path, dense=True)"
        )
