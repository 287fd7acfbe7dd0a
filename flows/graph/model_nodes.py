"""Nodes that measuring one model needs again and again: tokens, states of every layer, gradients, grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lmq.errors import InputError
from lmq.formats.spec import QuantSpec
from lmq.measurement.base import Measurement, Need
from lmq.measurement.delta_loss import DELTA_LOSS
from lmq.measurement.upper_triangle import triangle_bytes
from lmq.model.structure import ModelStructure, ModuleInfo
from lmq.quantizers import CalibratedQuantizer
from lmq.quantizers import quantizer as quantizer_named
from lmq.quantizers.calibrated import ErrorFeedback
from lmq_flows.config.sections import CalibrationConfig, EvaluationConfig, ImagesConfig, ModelConfig, TextConfig
from lmq_flows.graph.node import FileOf, Graph, Input, Node
from lmq_storage import ArtifactRef
from lmq_tasks import STAGES
from lmq_tasks.stage import Site
from lmq_tasks.states import GRADIENTS_FILE, MOMENTS_FILE, beside_gradients_file, beside_states_file

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class TextIdentity:
    """A text: what identifies its content, and where it lies on this machine."""

    identity: str
    location: str


@dataclass(frozen=True, kw_only=True)
class ImageSources:
    """The images of a run: what identifies those that are measured on and those that are judged on."""

    config: ImagesConfig
    calibration: TextIdentity
    evaluation: TextIdentity


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model that was identified: its structure, the artifact that holds it, and where its files lie.

    `images` is there for a model that sees images, `pairs` for a vision-language model that is measured on images with
    text.
    """

    config: ModelConfig
    structure: ModelStructure
    structure_ref: ArtifactRef
    site: Site
    menu: tuple[QuantSpec, ...]
    images: ImageSources | None = None
    pairs: ImageSources | None = None


class ModelNodes:
    """Adds nodes of one model to a graph."""

    def __init__(self, graph: Graph, model: PreparedModel, texts: Mapping[str, TextIdentity]):
        self.graph = graph
        self.model = model
        self._texts = texts

    def add(self, stage: str, what: str, config: dict[str, Any], inputs: dict[str, Any], **options: Any) -> Node:
        """A node of this model about `what`; `options` are other fields of a node, its site that of the model."""
        site = options.pop("site", self.model.site)
        inputs = {"structure": self.model.structure_ref, **inputs}
        return self.graph.add(
            STAGES[stage], self.model.config.name, what, site, config=config, inputs=inputs, **options
        )

    def add_layer(self, stage: str, layer: int, config: dict[str, Any], inputs: dict[str, Any], **options: Any) -> Node:
        """A node about one layer, whose number enters its configuration; `options` may hold `what` it is about."""
        what = options.pop("what", "")
        return self.add(stage, what, {"layer": layer, **config}, inputs, layer=layer, **options)

    def per_layer(
        self, stage: str, config: dict[str, Any], expected_bytes: int | None = None, what: str = "", **inputs: Any
    ) -> list[Node]:
        """A node for every layer, labelled `what`; `inputs` are lists with one item per layer."""
        return [
            self.add_layer(
                stage,
                layer,
                config,
                {name: nodes[layer] for name, nodes in inputs.items()},
                expected_bytes=expected_bytes,
                what=what,
            )
            for layer in range(self.model.structure.layers)
        ]

    def tokens(self, stage: str, text: TextConfig, sizes: dict[str, int], what: str = "") -> Node:
        """Tokens of a text; `sizes` say how many and how they are packed."""
        identity = self._texts[text.source]
        config = {"text": identity.identity, "column": text.column, "part": text.part, "seed": text.seed, **sizes}
        site = replace(self.model.site, text=identity.location)
        return self.add(stage, what, config, {}, site=site, expected_bytes=12 * sizes["tokens"], here=True)

    def calibration_examples(
        self, calibration: CalibrationConfig, count: int, skipped: int = 0, what: str = ""
    ) -> Node:
        """What the model is measured on: sequences of the text, or images, of which the first are `skipped`; or
        sequences of images with text."""
        if self.model.pairs is not None:
            return self._pairs(self.model.pairs, calibration.sequence_length, count)
        if self.model.images is not None:
            return self._images(self.model.images.calibration, 0, count, skipped, what)
        sizes = calibration_sizes(calibration, count)
        return self.tokens("calibration", calibration, sizes | ({"skipped": skipped} if skipped else {}), what)

    def evaluation_examples(self, evaluation: EvaluationConfig) -> Node:
        """What variants of the model are judged on: tokens of the text, or images."""
        images = self.model.images
        if images is not None:
            return self._images(images.evaluation, 1, images.config.evaluation, 0, "evaluation")
        return self.tokens("evaluation-tokens", evaluation, {"tokens": evaluation.tokens})

    def probe_images(self, images: ImageSources) -> Node:
        """Images that a linear probe is fitted to: of those that are measured on, or more of them."""
        return self._images(images.calibration, 0, images.config.probe, 0, "probe")

    def _images(self, identity: TextIdentity, which: int, count: int | None, skipped: int, what: str) -> Node:
        """Images of the source that is measured on (0) or judged on (1)."""
        assert self.model.images is not None
        images = self.model.images.config
        config = {
            "images": identity.identity,
            "part": images.parts[which],
            "count": count,
            "skipped": skipped,
            **images.model_dump(include={"column", "label_column", "seed", "unreadable"}),
        }
        site = replace(self.model.site, places={"images": identity.location})
        return self.add("images", what, config, {}, site=site, here=True)

    def _pairs(self, images: ImageSources, sequence_length: int, sequences: int) -> Node:
        config = {
            "images": images.calibration.identity,
            "sequences": sequences,
            "sequence_length": sequence_length,
            **images.config.model_dump(include={"column", "text_column", "seed", "unreadable"}),
        }
        site = replace(self.model.site, places={"images": images.calibration.location})
        return self.add("pairs", "", config, {}, site=site, here=True)

    def prompts(self, which: int, count: int | None = None) -> Node:
        """Texts for the classes of the images that are measured on (0) or judged on (1), for a tower of texts."""
        assert self.model.images is not None
        images, identities = self.model.images.config, (self.model.images.calibration, self.model.images.evaluation)
        config = {
            "images": identities[which].identity,
            "count": count,
            **images.model_dump(include={"column", "label_column", "seed"}),
            "templates": list(images.templates),
        }
        site = replace(self.model.site, places={"images": identities[which].location})
        what = "evaluation" if which else ""
        return self.add("prompts", what, config, {}, site=site, here=True)

    def state_bytes(self, tokens: int) -> int | None:
        """Bytes of states for so many tokens; how many patches images have is known once they are there."""
        return None if self.model.images is not None else tokens * self.model.structure.hidden_size * FLOAT32_BYTES

    def judging(self, stage: str) -> str:
        """The stage that does for the model's kind of examples what `stage` does for texts."""
        return f"{stage}-images" if self.model.images is not None else stage

    def grids(
        self,
        specs: Sequence[QuantSpec],
        quantizer: dict[str, Any],
        captured: CapturedText | None = None,
        what: str = "",
    ) -> list[Node]:
        """Grids of every layer for these configurations, with their Frobenius errors; labelled `what`.

        Calibrated quantizers look at what was `captured`. Raises InputError where nothing is.
        """
        config = {"menu": [spec.name for spec in specs], "quantizer": quantizer}
        chosen = quantizer_named(**quantizer)
        if not isinstance(chosen, CalibratedQuantizer):
            return self.per_layer("grids", config, self._grid_bytes(specs, coded=False), what)
        if captured is None:
            raise InputError(f"quantizer {chosen.name!r} needs a calibration text here; take hqq or rtn")
        moments = captured.second_moments(fisher_weighted=chosen.fisher_weighted)
        expected = self._grid_bytes(specs, coded=isinstance(chosen, ErrorFeedback))
        return self.per_layer("grids", config, expected, what, moments=moments)

    def embedding_grids(
        self, specs: Sequence[QuantSpec], quantizer: dict[str, Any], captured: CapturedText, what: str = ""
    ) -> list[Node]:
        """Grids of input embedding and output head: one node where they are quantized, else none."""
        structure = self.model.structure
        if not structure.embeddings:
            return []
        chosen = quantizer_named(**quantizer)
        inputs: dict[str, Any] = {}
        if isinstance(chosen, CalibratedQuantizer):
            inputs["weights"] = captured.embedding_weights(fisher_weighted=chosen.fisher_weighted)
        expected = _grids_bytes(specs, structure.embeddings, coded=False)
        config = {"menu": [spec.name for spec in specs], "quantizer": quantizer}
        return [self.add("embedding-grids", what, config, inputs, expected_bytes=expected)]

    def embedding_fisher(self, menu: Sequence[str], grids: Node, captured: CapturedText, what: str = "") -> list[Node]:
        """Sequence-wise Fisher costs of input embedding and output head."""
        inputs = {
            "grids": grids,
            "last": captured.last,
            "tokens": captured.tokens,
            Need.DRAWN_GRADIENTS.value: captured.entering_gradient,
        }
        return [self.add("embedding-fisher", what, {"menu": list(menu)}, inputs)]

    def measurement(
        self,
        measurement: Measurement,
        settings: Mapping[str, Any],
        grids: list[Node],
        captured: CapturedText,
        what: str = "",
    ) -> list[Node]:
        """A measurement of every layer, labelled `what`.

        `delta_loss`, which runs through the whole model, has a node per configuration instead.
        """
        if measurement is DELTA_LOSS:
            return self.delta_loss(settings["menu"], grids, captured.tokens, what)
        config = {name: settings[name] for name in measurement.settings}
        inputs: dict[str, Any] = {
            need.value: grids if need is Need.GRIDS else captured.by_layer(need) for need in measurement.needs
        }
        return self.per_layer(measurement.stage, config, None, what, **dict(sorted(inputs.items())))

    def delta_loss(self, specs: Sequence[str], grids: list[Node], tokens: Node, what: str = "") -> list[Node]:
        """Delta loss of every module, one node per configuration, labelled `what` and the configuration."""
        inputs = {"grids": list(grids), "tokens": tokens}
        return [self.add("delta-loss", f"{what} {spec}".strip(), {"spec": spec}, inputs) for spec in specs]

    def _grid_bytes(self, specs: Sequence[QuantSpec], *, coded: bool) -> int:
        """Bytes of the grids of one layer: all that a stored matrix has, its codes only where `coded`."""
        return _grids_bytes(specs, self.model.structure.in_layer(0), coded=coded)


class CapturedText:
    """Nodes of what is captured from the calibration text; each is added to the graph when it is first asked for.

    `draws` are those of labels per sequence, for gradients of labels that the model draws. With `every_token` the
    second moments of every expert are over all tokens.
    """

    def __init__(self, nodes: ModelNodes, calibration: CalibrationConfig, draws: int = 1, *, every_token: bool = False):
        self._nodes = nodes
        self._calibration = calibration
        self._draws = draws
        self._structure = nodes.model.structure
        self._layers = self._structure.layers
        self._moments_of = {"expert_tokens": "all"} if every_token and self._structure.has_experts else {}
        self._embedding_weights: dict[str, Node] = {}

    def by_layer(self, need: Need) -> Sequence[Input]:
        """What a measurement needs of every layer."""
        by_need: dict[Need, Callable[[], Sequence[Input]]] = {
            Need.STATES: lambda: self.entering,
            Need.LEAVING_STATES: lambda: self.leaving,
            Need.LAST_STATES: lambda: [self.last] * self._layers,
            Need.TOKENS: lambda: [self.tokens] * self._layers,
            Need.TEXT_GRADIENTS: lambda: self.text_gradients,
            Need.DRAWN_GRADIENTS: lambda: self.drawn_gradients,
            Need.MOMENTS: lambda: self.second_moments(fisher_weighted=True),
        }
        return by_need[need]()

    @cached_property
    def tokens(self) -> Node:
        """The calibration tokens, images, or images with text."""
        images = self._nodes.model.images
        count = self._calibration.sequences if images is None else images.config.calibration
        return self._nodes.calibration_examples(self._calibration, count)

    @property
    def _examples(self) -> str:
        """What stages call that."""
        return "tokens" if self._nodes.model.pairs is None else "pairs"

    @cached_property
    def _prompts(self) -> Node:
        """Texts that a second tower is measured on."""
        images = self._nodes.model.images
        assert images is not None
        return self._nodes.prompts(0, images.config.calibration)

    @cached_property
    def _states(self) -> list[list[Node]]:
        """Of every tower to its end the states that enter every block, then those that leave the last."""
        calibration = self._calibration
        keep = self._nodes.state_bytes(calibration.sequences * calibration.sequence_length)
        towers = []
        for tower in self._structure.judged_towers:
            config, what = ({"tower": tower}, f"tower {tower + 1}") if tower else ({}, "")
            given = {"tokens": self._prompts} if tower else {self._examples: self.tokens}
            states = [self._nodes.add("embed", what, config, given, expected_bytes=keep)]
            for layer in self._structure.layers_of(tower):
                inputs = {"hidden": states[-1]}
                states.append(self._nodes.add_layer("forward", layer, {}, inputs, expected_bytes=keep))
            towers.append(states)
        return towers

    @property
    def entering(self) -> list[Node | FileOf]:
        """States that enter every block."""
        return [*(node for states in self._states for node in states[:-1]), *self._entering_beside]

    @property
    def leaving(self) -> list[Node]:
        """States that leave every block."""
        return [node for states in self._states for node in states[1:]]

    @cached_property
    def _entering_beside(self) -> list[FileOf]:
        """States that enter every block beside a language model."""
        if not (layers := self._structure.layers_beside):
            return []
        node = self._nodes.add("beside-states", "", {}, {"pairs": self.tokens})
        return [FileOf(node, beside_states_file(layer)) for layer in layers]

    @cached_property
    def _drawn_beside(self) -> list[tuple[FileOf, FileOf]]:
        """Of every block beside a language model gradients at its output, and the second moments of its modules."""
        if not self._entering_beside:
            return []
        states = self._entering_beside[0].node
        inputs: dict[str, Input] = {"pairs": self.tokens, "states": states, "gradient": self.entering_gradient}
        gradients = self._nodes.add("beside-gradients", "", {}, inputs)
        found = []
        for layer, entering in zip(self._structure.layers_beside, self._entering_beside, strict=True):
            gradient = FileOf(gradients, beside_gradients_file(layer))
            inputs = {"hidden": entering, "gradient": gradient}
            moments = self._nodes.add_layer("sampled-backward", layer, self._moments_of, inputs)
            found.append((gradient, FileOf(moments, MOMENTS_FILE)))
        return found

    @property
    def last(self) -> Node:
        """States that leave the last block, of the first tower where there are several."""
        return self._states[0][-1]

    @cached_property
    def text_gradients(self) -> list[Node]:
        """Gradients at every block's output of the loss of the calibration text."""
        keep = self.last.expected_bytes
        inputs: dict[str, Input] = {"hidden": self.last, "tokens": self.tokens}
        found = [self._nodes.add("loss-gradient", "", {}, inputs, expected_bytes=keep)]
        for layer in range(self._layers - 1, 0, -1):
            inputs = {"hidden": self.entering[layer], "gradient": found[-1]}
            found.append(self._nodes.add_layer("backward", layer, {}, inputs, expected_bytes=keep))
        return found[::-1]

    @cached_property
    def _drawn(self) -> list[list[Node]]:
        """Of every tower gradients at every block's input and at the last one's output, for labels the model draws.

        Beside those at its input a block has the second moments of its modules.
        """
        towers = []
        keep = self._draws * (self.last.expected_bytes or 0)
        for tower, states in enumerate(self._states):
            config: dict[str, Any] = {"draws": self._draws, "seed": self._calibration.seed}
            inputs: dict[str, Input] = {"hidden": states[-1]}
            what = ""
            if tower:
                config, what = config | {"tower": tower}, f"tower {tower + 1}"
                inputs["tokens"] = self._prompts
            elif self._examples == "pairs":
                inputs["pairs"] = self.tokens
            found = [self._nodes.add("sampled-loss-gradient", what, config, inputs, expected_bytes=keep)]
            for layer in reversed(self._structure.layers_of(tower)):
                inputs = {"hidden": self.entering[layer], "gradient": FileOf(found[-1], GRADIENTS_FILE)}
                both = keep + self._moment_bytes
                of_layer = self._nodes.add_layer(
                    "sampled-backward", layer, self._moments_of, inputs, expected_bytes=both
                )
                found.append(of_layer)
            towers.append(found[::-1])
        return towers

    @property
    def drawn_gradients(self) -> list[FileOf]:
        """Gradients at every block's output for labels that the model draws."""
        own = [FileOf(node, GRADIENTS_FILE) for nodes in self._drawn for node in nodes[1:]]
        return own + [gradient for gradient, _ in self._drawn_beside]

    @property
    def entering_gradient(self) -> FileOf:
        """Gradients at the states that enter the first block, for labels that the model draws."""
        return FileOf(self._drawn[0][0], GRADIENTS_FILE)

    @property
    def _moment_bytes(self) -> int:
        """Bytes of the second moments of a block."""
        return sum(triangle_bytes(module.in_features) for module in self._nodes.model.structure.in_layer(0))

    def embedding_weights(self, *, fisher_weighted: bool) -> Node:
        """Column weights for the grids of embedding and head; quantizers that look at the same ones share them."""
        what = "Fisher-weighted" if fisher_weighted else "plain"
        if what not in self._embedding_weights:
            inputs: dict[str, Any] = {"last": self.last}
            if fisher_weighted:
                inputs |= {"tokens": self.tokens, Need.DRAWN_GRADIENTS.value: self.entering_gradient}
            self._embedding_weights[what] = self._nodes.add("embedding-weights", what, {}, inputs)
        return self._embedding_weights[what]

    def second_moments(self, *, fisher_weighted: bool) -> Sequence[Input]:
        """Second moments of every module's inputs, weighted by the gradients of drawn labels or plain.

        Quantizers that look at the same ones share them.
        """
        if fisher_weighted:
            own = [FileOf(node, MOMENTS_FILE) for nodes in self._drawn for node in nodes[:-1]]
            return own + [moments for _, moments in self._drawn_beside]
        return self._plain_moments

    @cached_property
    def _plain_moments(self) -> list[Node]:
        return self._nodes.per_layer("second-moments", self._moments_of, self._moment_bytes, hidden=self.entering)


def _grids_bytes(specs: Sequence[QuantSpec], modules: Sequence[ModuleInfo], *, coded: bool) -> int:
    """Bytes of matrices in all of these configurations, their codes only where `coded`; types of GGUF are always."""
    return sum(
        spec.size_bytes(module.parameters, module.in_features)
        - (0 if coded or spec.gguf else module.parameters * spec.bits // 8)
        for spec in specs
        for module in modules
    )


def calibration_sizes(calibration: CalibrationConfig, sequences: int) -> dict[str, int]:
    """How many calibration tokens to draw, and how to pack them."""
    return {
        "tokens": sequences * calibration.sequence_length,
        "sequences": sequences,
        "sequence_length": calibration.sequence_length,
    }
