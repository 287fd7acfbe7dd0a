"""What a model is made of: its decoder layers and the weight matrices that can be quantized."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Types that matrices to quantize are stored in, and the bytes of a weight."""

PARTS = ("attn_in", "attn_out", "mlp_gate", "mlp_down")

EMBEDDINGS = -1
"""Layer of what lies around the decoder blocks and can be quantized too: the input embedding and the output head."""

NEXT_TOKEN = "next-token"
"""Name of the loss of causal language models (`lmq.model.losses`)."""


@dataclass(frozen=True, order=True)
class ModuleId:
    """One weight matrix: its 0-based decoder layer and its name inside the block, such as `self_attn.q_proj`.

    Input embedding and output head have the layer `EMBEDDINGS` and their whole path, such as `model.embed_tokens`.
    """

    layer: int
    kind: str

    def __str__(self) -> str:
        return self.kind if self.layer == EMBEDDINGS else f"layer {self.layer} {self.kind}"


@dataclass(frozen=True)
class ModuleInfo:
    """A module with its weight's shape `[out_features, in_features]` and the part it is measured with.

    The rows of an input embedding are its outputs here, as they are those of a head: [vocabulary, hidden]. Its part is
    `embedding`, that of a head `head`, and `tied` that of one matrix which is both.
    """

    id: ModuleId
    out_features: int
    in_features: int
    part: str

    @property
    def parameters(self) -> int:
        """Weights in the matrix; a bias is not counted and not quantized."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class KeptTensor:
    """A tensor of a block that stays as it is: a convolution, a state matrix, an nn.Linear that is never called.

    `name` is inside the block, as `conv.conv.weight`. Vectors (norms, biases) are never quantized and not listed.
    """

    layer: int
    name: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class KeptPart:
    """A part of a model beside its language model, a tower for images or a projector: what of it stays as it is.

    `size_bytes` is what these tensors are stored in.
    """

    path: str
    parameters: int
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.path} ({self.parameters:,} weights, {self.size_bytes / 1e6:,.1f} MB)"


@dataclass(frozen=True)
class Tower:
    """A sequence of blocks, one of several that a model has: its list of blocks, how many they are, and their width.

    `features` is the model's method that embeds what the tower is given, `input_name` what it calls that; None where
    the tower is the whole model. A tower beside a language model, which the image goes through, lies in a `part` of the
    model, such as `model.vision_tower`; a part without a list of blocks, as a projector, is one block.
    """

    layers_path: str
    layers: int
    hidden_size: int
    features: str | None = None
    input_name: str | None = None
    part: str | None = None

    def block_path(self, number: int) -> str:
        """Path of one of its blocks."""
        return self.layers_path if self.part == self.layers_path else f"{self.layers_path}.{number}"


@dataclass(frozen=True)
class ModelStructure:
    """The structure of one model, discovered from the model itself.

    A model of several `towers` (CLIP: images, then texts; a language model, then what is quantized beside it) numbers
    their layers one after the other; then `layers_path` and `hidden_size` are those of the first.
    `layers_path` is the path of the list of decoder blocks, as `model.layers`: module (3, `mlp.up_proj`)
    is the submodule `model.layers.3.mlp.up_proj`. `modules` are those of the blocks; `embeddings` are the input
    embedding and the output head (tied: one) where they are to be quantized too. `other_bytes` counts every stored
    tensor that is not quantized (norms, biases, embeddings and head unless they are) at `dtype`. `weights_sha256`
    identifies the content. `kept` are the tensors of blocks that are among them though they are no vectors, as a hybrid
    has. `dtype` is the type that most modules are stored in; `stored_bytes` is what all of them take where some are
    stored in another one, else None. `loss` names what the model is judged by (`lmq.model.losses`); `vocabulary_size`
    are the outputs of its head, whatever they are. `kept_parts` are what a vision-language model has beside its
    language model and what of them is kept; their bytes are among the others.
    """

    architecture: str
    dtype: str
    layers_path: str
    layers: int
    hidden_size: int
    vocabulary_size: int
    tied_embeddings: bool
    modules: tuple[ModuleInfo, ...]
    other_parameters: int
    other_bytes: int
    weights_sha256: str
    kept: tuple[KeptTensor, ...] = ()
    stored_bytes: int | None = None
    embeddings: tuple[ModuleInfo, ...] = ()
    loss: str = NEXT_TOKEN
    several_towers: tuple[Tower, ...] = ()
    kept_parts: tuple[KeptPart, ...] = ()

    @property
    def quantized(self) -> tuple[ModuleInfo, ...]:
        """Every module that gets a configuration: those of the blocks, then the embeddings."""
        return self.modules + self.embeddings

    @property
    def source_bytes(self) -> int:
        """Bytes of all quantizable modules in the source model, as stored."""
        return self.parameters * DTYPE_BYTES[self.dtype] if self.stored_bytes is None else self.stored_bytes

    @property
    def parameters(self) -> int:
        """Weights in all quantizable modules."""
        return sum(module.parameters for module in self.quantized)

    @property
    def sees_images(self) -> bool:
        """Whether it is an encoder of images, and no language model."""
        return self.loss != NEXT_TOKEN

    @property
    def experts(self) -> dict[int, int]:
        """How many routed experts each layer has that has some."""
        numbers = ((module.id.layer, expert_number(module.id.kind)) for module in self.modules)
        return dict(sorted((layer, number + 1) for layer, number in numbers if number is not None))

    @property
    def has_experts(self) -> bool:
        """Whether some modules see the tokens alone that are routed to them."""
        return bool(self.experts)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Module kinds in the order of the first block that has them."""
        return tuple(dict.fromkeys(module.id.kind for module in self.modules))

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The towers: one, but for models that say otherwise."""
        return self.several_towers or (Tower(self.layers_path, self.layers, self.hidden_size),)

    def layers_of(self, tower: int) -> range:
        """Layers of a tower, by its number."""
        first = sum(each.layers for each in self.towers[:tower])
        return range(first, first + self.towers[tower].layers)

    def tower_of(self, layer: int) -> int:
        """Number of the tower that a layer belongs to."""
        return next(number for number in range(len(self.towers)) if layer in self.layers_of(number))

    @property
    def judged_towers(self) -> range:
        """Numbers of the towers that predictions are made of; what those beside a language model make enters it."""
        return range(sum(tower.part is None for tower in self.towers))

    @property
    def parts_beside(self) -> tuple[str, ...]:
        """Paths of all parts beside a language model, kept or quantized."""
        quantized = [tower.part for tower in self.towers if tower.part is not None]
        return tuple(dict.fromkeys([*(part.path for part in self.kept_parts), *quantized]))

    @property
    def layers_beside(self) -> range:
        """Layers of all towers beside a language model, which come last."""
        return range(sum(self.towers[number].layers for number in self.judged_towers), self.layers)

    def block_path(self, layer: int) -> str:
        """Dotted path of a block inside the model."""
        tower = self.tower_of(layer)
        return self.towers[tower].block_path(layer - self.layers_of(tower).start)

    def in_layer(self, layer: int) -> tuple[ModuleInfo, ...]:
        """Modules of one layer, in model order; those of the layer `EMBEDDINGS` are the embeddings."""
        return tuple(module for module in self.quantized if module.id.layer == layer)

    def path(self, module: ModuleId) -> str:
        """Dotted path of the module inside the model."""
        return module.kind if module.layer == EMBEDDINGS else f"{self.block_path(module.layer)}.{module.kind}"

    @property
    def kept_notes(self) -> list[str]:
        """What of the blocks is kept as it is, a line for each tensor that several layers have; routers are said to be.

        A router of a layer with experts has an output for each of them, or one, the gate of shared experts.
        """
        experts = self.experts
        layers: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for tensor in self.kept:
            is_router = tensor.layer in experts and tensor.shape[0] in (1, experts[tensor.layer])
            name = f"router {tensor.name}" if is_router else tensor.name
            layers.setdefault((name, tensor.shape), []).append(tensor.layer)
        return [f"{name} {list(shape)} of {layer_ranges(found)}" for (name, shape), found in layers.items()]

    @property
    def kept_beside(self) -> list[str]:
        """What of the parts beside a language model is kept as it is; of a quantized one it is said to be the rest."""
        quantized = {tower.part for tower in self.towers}
        return [f"the rest of {part}" if part.path in quantized else str(part) for part in self.kept_parts]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form; what most models do without is there for those that need it."""
        data = asdict(self)
        needed = {
            "kept": bool(self.kept),
            "stored_bytes": self.stored_bytes is not None,
            "embeddings": bool(self.embeddings),
            "loss": self.loss != NEXT_TOKEN,
            "several_towers": bool(self.several_towers),
            "kept_parts": bool(self.kept_parts),
        }
        for tower in data["several_towers"]:
            if tower["part"] is None:
                del tower["part"]
        return {name: value for name, value in data.items() if needed.get(name, True)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelStructure:
        """Inverse of `to_json`."""
        modules, embeddings = (
            tuple(
                ModuleInfo(ModuleId(**item["id"]), item["out_features"], item["in_features"], item["part"])
                for item in data.get(name, ())
            )
            for name in ("modules", "embeddings")
        )
        kept = tuple(KeptTensor(item["layer"], item["name"], tuple(item["shape"])) for item in data.get("kept", ()))
        parts = tuple(KeptPart(**item) for item in data.get("kept_parts", ()))
        towers = tuple(Tower(**item) for item in data.get("several_towers", ()))
        read = {"modules": modules, "embeddings": embeddings, "kept": kept, "kept_parts": parts}
        return cls(**{**data, **read, "several_towers": towers})


def layer_ranges(layers: Sequence[int]) -> str:
    """Ascending numbers of layers as `layer 3` or `layers 0-2, 5`."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    return f"layer{'s' * (len(layers) != 1)} {', '.join(words)}"


_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.|$)")


def without_number(kind: str) -> str:
    """A kind with `*` in the place of the expert's number: `mlp.experts.*.down_proj`; others as they are."""
    return _NUMBER.sub("*", kind)


def expert_number(kind: str) -> int | None:
    """The expert that a module belongs to, by its kind; None for one that every token goes through."""
    match = _NUMBER.search(kind)
    return int(match[0]) if match else None
