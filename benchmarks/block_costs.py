"""What a block costs to measure, stage by stage, and how that grows with the sizes of its matrices and with tokens.

    python -m benchmarks.block_costs [--output COSTS.json]

Random models of two blocks are measured by the stages of a run, one after the other, in CPU seconds of one thread: one
1024 wide on two numbers of tokens, and one of SmolLM2-135M's shape. Counting operations, a stage's seconds are

    per weight · weights + per weight and token · weights · tokens

(weights of a block's matrices; of the head for the stages that end in logits). The wide model's two runs give both
figures; SmolLM2's shape is predicted from them and compared, and so is a block of Llama-2-7B's shape with the wall
seconds that `benchmarks.large_model` printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.llama_files import LLAMA_2_7B, SMOLLM2_135M, LlamaShape, write_llama

NOT_BY_WEIGHT = ("embed", "calibration")
"""Stages of seconds, whose work goes with the text."""

WIDE = LlamaShape(name="1024 wide", hidden=1024, intermediate=2752, heads=16, key_value_heads=16, layers=2)
BLOCKS = 2
SEQUENCE_LENGTH = 128
VOCABULARY = 8192
OF_THE_HEAD = ("loss-gradient", "sampled-loss-gradient")
LARGE_MODEL_S = {"sequence-fisher": 43.34, "grids": 36.75, "fisher": 32.21, "sensitivity": 11.02, "forward": 3.98}
"""Seconds per block of Llama-2-7B's shape, as in docs/benchmarks.md."""

LARGE_MODEL_TOKENS = 512


@dataclass(frozen=True)
class StageCost:
    """Seconds of a stage for one layer: so much by weight, and by weight and token."""

    per_weight_s: float
    per_weight_token_s: float

    def seconds(self, weights: int, tokens: int) -> float:
        return self.per_weight_s * weights + self.per_weight_token_s * weights * tokens


def block_weights(shape: LlamaShape) -> int:
    """Weights of the matrices of one block."""
    attention = 2 * shape.hidden * shape.hidden * (1 + shape.key_value_heads / shape.heads)
    return int(attention) + 3 * shape.hidden * shape.intermediate


def weights_of(stage: str, shape: LlamaShape, vocabulary: int) -> int:
    """Weights that a stage's work goes with."""
    return shape.hidden * vocabulary if stage in OF_THE_HEAD else block_weights(shape)


def measured_seconds(folder: Path, tokens: int) -> dict[str, float]:
    """CPU seconds of every stage for one layer of the model in a folder."""
    from lmq_flows.graph.build import build_graph
    from lmq_flows.graph.direct import execute_directly
    from lmq_flows.run.plan import ready_models

    seconds: dict[str, list[float]] = defaultdict(list)
    started = 0.0

    def watch(node: Any, outcome: Any) -> None:
        nonlocal started
        if outcome is None:
            started = time.process_time()
        else:
            seconds[node.stage.name].append(time.process_time() - started)

    config = measuring_config(folder, tokens)
    models, texts = ready_models(config)
    graph, _, measured = build_graph(config, models, texts)
    found = measured["m"]
    wanted = [node for nodes in found.tables.values() for node in nodes]
    execute_directly(graph, wanted, watch=watch)
    return {stage: min(of_layers) for stage, of_layers in seconds.items()}


def measuring_config(folder: Path, tokens: int) -> Any:
    from lmq_flows.config.run import parse_run_config

    return parse_run_config(
        {
            "name": "costs",
            "models": [{"name": "m", "source": str(folder)}],
            "strategies": ["uniform"],
            "budgets": ["4.25"],
            "measure": {"also": ["kurtosis", "sensitivity", "fisher", "sequence_fisher"]},
            "calibration": {"sequences": tokens // SEQUENCE_LENGTH, "sequence_length": SEQUENCE_LENGTH},
            "evaluation": {"tokens": 512, "window": 256, "stride": 256},
            "runner": {"workers": 1, "device": "cpu"},
            "store": f"{folder}/store-{tokens}",
            "runs_dir": f"{folder}/runs",
        }
    )


def fit(few: dict[str, float], few_tokens: int, many: dict[str, float], many_tokens: int) -> dict[str, StageCost]:
    """Both figures of every stage from its seconds at two numbers of tokens."""
    costs = {}
    for stage in few.keys() - set(NOT_BY_WEIGHT):
        weights = weights_of(stage, WIDE, VOCABULARY)
        slope = max(0.0, (many[stage] - few[stage]) / (many_tokens - few_tokens))
        fixed = max(0.0, few[stage] - slope * few_tokens)
        costs[stage] = StageCost(per_weight_s=fixed / weights, per_weight_token_s=slope / weights)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=256, help="tokens of the first run (default 256)")
    parser.add_argument("--many", type=int, default=1024, help="tokens of the others (default 1024)")
    parser.add_argument("--output", type=Path, help="where the figures go as JSON, for benchmarks.scaling")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        wide, narrow = Path(folder) / "wide", Path(folder) / "narrow"
        write_llama(wide, WIDE, blocks=BLOCKS, vocabulary=VOCABULARY)
        write_llama(narrow, SMOLLM2_135M, blocks=BLOCKS, vocabulary=VOCABULARY)
        few, many = measured_seconds(wide, options.few), measured_seconds(wide, options.many)
        small = measured_seconds(narrow, options.many)
    costs = fit(few, options.few, many, options.many)
    print(f"CPU seconds per layer, 12 configurations; {WIDE.name} block: {block_weights(WIDE):,} weights")
    head = (
        f"{options.few} tokens",
        f"{options.many} tokens",
        "ns/weight",
        "ps/weight/token",
        "SmolLM2 s",
        "predicted s",
    )
    print(f"{'stage':<24}" + "".join(f"{text:>17}" for text in (*head, "7B wall s", "predicted s")))
    for stage, cost in sorted(costs.items(), key=lambda item: -many[item[0]]):
        predicted = cost.seconds(weights_of(stage, SMOLLM2_135M, VOCABULARY), options.many)
        row = [
            few[stage],
            many[stage],
            1e9 * cost.per_weight_s,
            1e12 * cost.per_weight_token_s,
            small[stage],
            predicted,
        ]
        text = "".join(f"{value:>17.3f}" for value in row)
        if stage in LARGE_MODEL_S:
            of_7b = cost.seconds(block_weights(LLAMA_2_7B), LARGE_MODEL_TOKENS)
            text += f"{LARGE_MODEL_S[stage]:>17.2f}{of_7b:>17.2f}"
        print(f"{stage:<24}{text}", flush=True)
    if options.output:
        figures = {stage: [cost.per_weight_s, cost.per_weight_token_s] for stage, cost in costs.items()}
        options.output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
