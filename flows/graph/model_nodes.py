"""Nodes that measuring one model needs again and again: tokens, states of every layer, gradients, grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModelStructure
from lmq_flows.config.sections import CalibrationConfig, ModelConfig, TextConfig
from lmq_flows.graph.node import Graph, Node
from lmq_storage import ArtifactRef
from lmq_tasks import STAGES
from lmq_tasks.stage import Site

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class TextIdentity:
    """A text: what identifies its content, and where it lies on this machine."""

    identity: str
    location: str


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model that was identified: its structure, the artifact that holds it, and where its files lie."""

    config: ModelConfig
    structure: ModelStructure
    structure_ref: ArtifactRef
    site: Site
    menu: tuple[QuantSpec, ...]


class ModelNodes:
    """Adds nodes of one model to a graph."""

    def __init__(self, graph: Graph, model: PreparedModel, texts: Mapping[str, TextIdentity]):
        self.graph = graph
        self.model = model
        self._texts = texts

    def add(self, stage: str, what: str, config: dict[str, Any], inputs: dict[str, Any], **options: Any) -> Node:
        """A node of this model, labelled `what`; `options` are those of `Graph.add`, and a site of its own."""
        label = f"{self.model.config.name} {what}".strip()
        site = options.pop("site", self.model.site)
        inputs = {"structure": self.model.structure_ref, **inputs}
        return self.graph.add(STAGES[stage], label, site, config=config, inputs=inputs, **options)

    def per_layer(
        self, stage: str, config: dict[str, Any], expected_bytes: int | None = None, **inputs: Any
    ) -> list[Node]:
        """A node for every layer; `inputs` are lists with one item per layer."""
        return [
            self.add(
                stage,
                f"layer {layer}",
                {"layer": layer, **config},
                {name: nodes[layer] for name, nodes in inputs.items()},
                expected_bytes=expected_bytes,
            )
            for layer in range(self.model.structure.layers)
        ]

    def tokens(self, stage: str, text: TextConfig, sizes: dict[str, int], what: str = "") -> Node:
        """Tokens of a text; `sizes` say how many and how they are packed."""
        identity = self._texts[text.source]
        config = {"text": identity.identity, "column": text.column, "part": text.part, "seed": text.seed, **sizes}
        site = replace(self.model.site, text=identity.location)
        return self.add(stage, what, config, {}, site=site, expected_bytes=12 * sizes["tokens"], here=True)

    def frobenius(self, specs: Sequence[QuantSpec], quantizer: dict[str, Any]) -> list[Node]:
        """Grids of every layer for these configurations, with their errors."""
        menu = [spec.name for spec in specs]
        return self.per_layer("frobenius", {"menu": menu, "quantizer": quantizer}, self._grid_bytes(specs))

    def capture_forward(self, calibration: CalibrationConfig) -> tuple[list[Node], Node, Node]:
        """States entering every block, states leaving the last one, and the calibration tokens."""
        sizes = calibration_sizes(calibration, calibration.sequences)
        tokens = self.tokens("calibration", calibration, sizes)
        keep = sizes["tokens"] * self.model.structure.hidden_size * FLOAT32_BYTES
        hidden = [self.add("embed", "", {}, {"tokens": tokens}, expected_bytes=keep)]
        for layer in range(self.model.structure.layers):
            inputs = {"hidden": hidden[-1]}
            node = self.add("forward", f"layer {layer}", {"layer": layer}, inputs, expected_bytes=keep)
            hidden.append(node)
        return hidden[:-1], hidden[-1], tokens

    def capture_draws(self, hidden: list[Node], last: Node, draws: int, seed: int) -> list[Node]:
        """Gradients at every block's output for labels that the model draws."""
        config = {"draws": draws, "seed": seed}
        keep = draws * (last.expected_bytes or 0)
        gradient = self.add("sampled-loss-gradient", "", config, {"hidden": last}, expected_bytes=keep)
        return self.capture_backward(hidden, gradient, "sampled-backward")

    def capture_text_gradient(self, hidden: list[Node], last: Node, tokens: Node) -> list[Node]:
        """Gradients at every block's output of the loss of the calibration text."""
        inputs = {"hidden": last, "tokens": tokens}
        gradient = self.add("loss-gradient", "", {}, inputs, expected_bytes=last.expected_bytes)
        return self.capture_backward(hidden, gradient)

    def capture_backward(self, hidden: list[Node], gradient: Node, stage: str = "backward") -> list[Node]:
        """Gradient at every block's output, from the one at the last block's."""
        gradients = [gradient]
        for layer in range(self.model.structure.layers - 1, 0, -1):
            inputs = {"hidden": hidden[layer], "gradient": gradients[-1]}
            config = {"layer": layer}
            node = self.add(stage, f"layer {layer}", config, inputs, expected_bytes=gradient.expected_bytes)
            gradients.append(node)
        return gradients[::-1]

    def delta_loss(self, specs: Sequence[QuantSpec], frobenius: list[Node], tokens: Node) -> list[Node]:
        """Delta loss of every module, one node per configuration."""
        inputs = {"frobenius": list(frobenius), "tokens": tokens}
        return [self.add("delta-loss", spec.name, {"spec": spec.name}, inputs) for spec in specs]

    def layer_activity(self, hidden: list[Node], last: Node) -> list[Node]:
        """What the states around every layer say of its importance."""
        return self.per_layer("layer-activity", {}, hidden=hidden, leaving=[*hidden[1:], last])

    def _grid_bytes(self, specs: Sequence[QuantSpec]) -> int:
        """Bytes of the grids of one layer: all that a stored matrix has but its codes."""
        modules = self.model.structure.in_layer(0)
        sizes = [spec.size_bytes(m.parameters) - m.parameters * spec.bits // 8 for spec in specs for m in modules]
        return sum(sizes)


def calibration_sizes(calibration: CalibrationConfig, sequences: int) -> dict[str, int]:
    """How many calibration tokens to draw, and how to pack them."""
    return {
        "tokens": sequences * calibration.sequence_length,
        "sequences": sequences,
        "sequence_length": calibration.sequence_length,
    }
