"""How long a run will take and how much memory it will need, said before it starts.

The seconds of a stage follow from the sizes of the model and its texts by the rates of docs/benchmarks.md ("What a
block costs"), which were measured on one machine, and by how fast this machine multiplies matrices, compared with that
one. What is there already takes nothing. These are rough figures: how far they are off was not measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from lmq.measurement.upper_triangle import triangle_bytes
from lmq.model.streaming import tokens_at_once
from lmq.model.structure import ModelStructure, ModuleInfo, without_number
from lmq.quantizers import CalibratedQuantizer, quantizer
from lmq.quantizers.error_feedback import feedback_bytes
from lmq_flows.config.run import RunConfig
from lmq_flows.graph.build import POLISH_STEPS_PER_NODE
from lmq_flows.graph.explain import PlannedNode
from lmq_flows.graph.node import Node
from lmq_flows.run.plan import plan_run

_FLOAT32_BYTES = 4
_PROCESS_BYTES = 900_000_000
"""What Python holds with torch, transformers and Prefect imported."""

_REFERENCE_SPEED = 1.0e11
"""Operations per second of the machine that the rates were measured on, in products of matrices by one thread."""

_BLOCK_RATES = {
    "second-moments": (10.0, 100.0),
    "forward": (3.8, 20.3),
    "backward": (3.1, 63.9),
    "sampled-backward": (0.7, 200.7),
    "sensitivity": (6.6, 48.9),
    "fisher": (63.1, 232.3),
    "sequence-fisher": (87.3, 378.3),
    "kurtosis": (42.2, 0.0),
    "grids": (373.8, 0.0),
    "quantize": (20.0, 0.0),
}
"""Nanoseconds per weight of a block, picoseconds per weight and calibration token: with 12 configurations, 4 draws."""

_EQUALIZE_RATES = (100.0, 45.0)
"""Of all blocks; from how many operations it takes beside those of `forward`, not measured."""

_EMBEDDING_RATES = {"embedding-grids": 630.0, "embedding-fisher": 600.0, "embedding-weights": 80.0}
"""Nanoseconds per weight of embedding and head, with 12 configurations: timed once on SmolLM2-135M on a busy machine,
less what the grids of its blocks took longer there than their rate says."""

_CALIBRATED = 5.7
"""How much longer `grids` take where their quantizer looks at the calibration text: 7.5 seconds of processor time for
`fisher-gptq` on the seven matrices of a layer of SmolLM2-135M with 12 configurations, on one machine."""

_DRAWN = ("sampled-backward", "sequence-fisher", "sampled-loss-gradient")
_FOR_EVERY_CONFIGURATION = ("grids", "fisher", "sequence-fisher")
_HEAD_RATE = 24.0
"""Picoseconds per weight of the head and token of the gradient of a loss."""
_MODEL_RATE = 25.0
"""Picoseconds per weight of the model and token of a window that is judged."""
_HEAD_SAMPLE_BYTES = 600_000_000
"""What the model predicts at the positions that the head is judged at, soft-capped."""
_LOGITS_COPIES = 8
"""Of the logits that a stage holds at a time, while two models' predictions are compared or labels drawn from them."""
_WEIGHT_COPIES = 5
"""Of a matrix in float32 while its codes are found: weights, errors, what is left to round, and the like."""
_LEARNED_RATE = 84.0
"""Picoseconds per weight of a block and token of a step of learned rounding: the rates of `forward` and `backward`
together; not measured by itself, and too low by what the gradients of the weights take."""
_TRIALS = 60
"""Plans that `refine` tries, about."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a run will take; `cached` of its `nodes` layers and variants are there already."""

    seconds: float
    memory_bytes: int
    nodes: int
    cached: int


def expect(config: RunConfig, structure: ModelStructure, planned: Iterable[PlannedNode]) -> Expectation:
    """What is left to do of the run of one model, on this machine."""
    nodes = list(planned)
    seconds = sum(_reference_seconds(item.node, config, structure) for item in nodes if not item.cached)
    slower = _REFERENCE_SPEED / _operations_per_second(config.runner.threads_per_worker)
    return Expectation(
        seconds=seconds * slower / config.runner.workers,
        memory_bytes=_memory_bytes(config, structure),
        nodes=len(nodes),
        cached=sum(item.cached for item in nodes),
    )


def planned_nodes(config: RunConfig) -> list[PlannedNode]:
    """The nodes of the run of one model, also while the directory it works on is still to be made.

    Of a model that is equalized first, they are then as many as the source's own, none of them cached.
    """
    plan = plan_run(config)
    if not plan.to_convert:
        return plan.nodes
    sources = tuple(model.model_copy(update={"equalize": False}) for model in config.models)
    later = plan_run(config.model_copy(update={"models": sources})).nodes
    return plan.nodes + [replace(item, cached=False) for item in later]


def _reference_seconds(node: Node, config: RunConfig, structure: ModelStructure) -> float:
    """Seconds of one node on one thread of the machine that the rates are from."""
    stage = node.stage.name
    tokens = config.calibration.sequences * config.calibration.sequence_length
    head = structure.hidden_size * structure.vocabulary_size
    draws = config.measure.label_draws / 4 if stage in _DRAWN else 1.0
    if stage in _BLOCK_RATES:
        per_weight, per_token = _BLOCK_RATES[stage]
        configurations = len(config.measure.menu) / 12 if stage in _FOR_EVERY_CONFIGURATION else 1.0
        if stage == "grids" and isinstance(quantizer(**node.config["quantizer"]), CalibratedQuantizer):
            per_weight *= _CALIBRATED
        block = _block_weights(structure) / structure.layers
        return block * (1e-9 * per_weight * configurations + 1e-12 * per_token * tokens * draws)
    if stage == "equalize":
        per_weight, per_token = _EQUALIZE_RATES
        return _block_weights(structure) * (1e-9 * per_weight + 1e-12 * per_token * tokens)
    if stage in _EMBEDDING_RATES:
        weights = sum(module.parameters for module in structure.embeddings)
        return 1e-9 * _EMBEDDING_RATES[stage] * weights * len(config.measure.menu) / 12
    if stage in ("loss-gradient", "sampled-loss-gradient"):
        return 1e-12 * _HEAD_RATE * head * tokens * draws
    if stage in ("reference", "evaluate"):
        windows = 1 + max(0, config.evaluation.tokens - config.evaluation.window) // config.evaluation.stride
        return 1e-12 * _MODEL_RATE * (_block_weights(structure) + 2 * head) * windows * config.evaluation.window
    if stage == "learned-rounding" and config.learned_rounding is not None:
        seen = config.learned_rounding.sequences_per_step * config.calibration.sequence_length
        per_step = 1e-9 * _BLOCK_RATES["quantize"][0] + 1e-12 * _LEARNED_RATE * seen
        return config.learned_rounding.steps * _block_weights(structure) / structure.layers * per_step
    if stage == "polish" and config.polish is not None:
        seen = config.polish.sequences_per_step * config.calibration.sequence_length
        there_and_back = 1e-12 * (2 * _BLOCK_RATES["forward"][1] + _BLOCK_RATES["backward"][1])
        rounding = 2e-9 * _BLOCK_RATES["quantize"][0]
        return POLISH_STEPS_PER_NODE * _block_weights(structure) * (there_and_back * seen + rounding)
    if stage == "refine":
        validation = config.calibration.validation_sequences * config.calibration.sequence_length
        return _TRIALS * 1e-12 * _MODEL_RATE * (_block_weights(structure) + head) * validation
    return 0.0


def _block_weights(structure: ModelStructure) -> int:
    return sum(module.parameters for module in structure.modules)


def _operations_per_second(threads: int) -> float:
    """Of products of matrices in float32 with so many threads, at the fastest of a few moments."""
    size, before = 768, torch.get_num_threads()
    matrix = torch.ones(size, size)
    torch.set_num_threads(threads)
    try:
        matrix @ matrix
        seconds = []
        for _ in range(10):
            started = time.perf_counter()
            matrix @ matrix
            seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return 2.0 * size**3 / min(seconds)


def _memory_bytes(config: RunConfig, structure: ModelStructure) -> int:
    """The most that the process holds: embedding, head, and for every worker a block, gradients, states and logits."""
    block = _FLOAT32_BYTES * _block_weights(structure) // structure.layers
    tokens = config.calibration.sequences * config.calibration.sequence_length
    states = _FLOAT32_BYTES * tokens * structure.hidden_size
    tables = 1 if structure.tied_embeddings else 2
    embeddings = tables * _FLOAT32_BYTES * structure.hidden_size * structure.vocabulary_size
    if structure.embeddings:
        # those of the variant beside the model's own while it is judged, or what the head predicts
        embeddings += _FLOAT32_BYTES * sum(module.parameters for module in structure.embeddings) + _HEAD_SAMPLE_BYTES
    logits = _FLOAT32_BYTES * structure.vocabulary_size * tokens_at_once(structure.vocabulary_size)
    of_worker = max(
        4 * block + 3 * states + _LOGITS_COPIES * logits, 3 * block + 3 * states + _trace_bytes(config, structure)
    )
    if _is_calibrated(config):
        of_worker = max(of_worker, block + max(_codes_bytes(module) for module in structure.modules))
    return _PROCESS_BYTES + config.runner.workers * of_worker + embeddings


def _trace_bytes(config: RunConfig, structure: ModelStructure) -> int:
    """What goes through the modules of a block, in bfloat16, as sequence-wise costs take it; of its experts one."""
    modules = list({without_number(module.id.kind): module for module in structure.in_layer(0)}.values())
    inputs = {module.part: module.in_features for module in modules}
    widths = sum(inputs.values()) + config.measure.label_draws * sum(module.out_features for module in modules)
    return 2 * config.calibration.sequences * config.calibration.sequence_length * widths


def _codes_bytes(module: ModuleInfo) -> int:
    """What codes with error feedback take for a module: H as stored, as it is, damped, its factor U; its weights."""
    while_swept = 3 * _FLOAT32_BYTES * module.in_features**2
    moments = max(feedback_bytes(module.in_features), while_swept)
    return triangle_bytes(module.in_features) + moments + _WEIGHT_COPIES * _FLOAT32_BYTES * module.parameters


def _is_calibrated(config: RunConfig) -> bool:
    return any(isinstance(quantizer(**each), CalibratedQuantizer) for each in config.used_quantizers)
