"""How long runs of very large models would take on many workers: the real graph and the real scheduling, simulated.

    python -m benchmarks.scaling COSTS.json [--speed 1] [--store-gigabytes 10] [--worker-gigabytes 1]

COSTS.json comes from `benchmarks.block_costs`: seconds of one thread of the machine that measured them, for every
stage by weight and by weight and token. Where `benchmarks.large_model` measured a stage on a block of Llama-2-7B's
shape, the figures are scaled to meet that. The graph is that of `lmq run` for a structure of Llama-3.1's shapes, walked
by the program's own chunk scheduler in simulated time. Each worker first fetches the model from the store, then reads
and writes artifacts at its share of the store's bandwidth. `--speed` says how many times faster a worker is than that
one thread.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.block_costs import LARGE_MODEL_S, LARGE_MODEL_TOKENS, OF_THE_HEAD, StageCost, block_weights
from benchmarks.llama_files import LLAMA_2_7B, LlamaShape
from lmq.formats.spec import STOPS
from lmq.model.structure import ModelStructure, ModuleId, ModuleInfo
from lmq_flows.config.run import RunConfig, parse_run_config
from lmq_flows.graph.build import MeasuredModel, build_graph
from lmq_flows.graph.direct import Outcome
from lmq_flows.graph.model_nodes import PreparedModel, TextIdentity
from lmq_flows.graph.node import Graph, Node
from lmq_flows.graph.walk import Walk
from lmq_storage import ArtifactRef
from lmq_tasks.stage import ModelLocation, Site

LLAMA_70B = LlamaShape(name="Llama-3.1-70B", hidden=8192, intermediate=28672, heads=64, key_value_heads=8, layers=80)
LLAMA_405B = LlamaShape(
    name="Llama-3.1-405B", hidden=16384, intermediate=53248, heads=128, key_value_heads=8, layers=126
)
VOCABULARY = 128256
BYTES_PER_WEIGHT = 2
TASK_OVERHEAD_S = 0.3
"""What a task of Dask adds, by `benchmarks.runners` with one worker."""
_DONE = ArtifactRef("simulated/0", "0", "0/0")


def anchored(costs: dict[str, StageCost]) -> dict[str, StageCost]:
    """The costs, scaled to what a block of Llama-2-7B's shape took where that was measured."""
    found = dict(costs)
    for stage, measured_s in LARGE_MODEL_S.items():
        ratio = measured_s / costs[stage].seconds(block_weights(LLAMA_2_7B), LARGE_MODEL_TOKENS)
        found[stage] = StageCost(ratio * costs[stage].per_weight_s, ratio * costs[stage].per_weight_token_s)
    return found


class Simulation:
    """A walk in simulated time: a task takes its overhead and the seconds of its nodes."""

    def __init__(
        self,
        graph: Graph,
        seconds: Callable[[Node], float],
        workers: int,
        *,
        task_overhead_s: float = TASK_OVERHEAD_S,
        start_s: float = 0.0,
        chunk_seconds: float = 20.0,
    ):
        self._seconds = seconds
        self._task_overhead_s = task_overhead_s
        self._workers = workers
        self._ends: list[tuple[float, int, list[Node]]] = []
        self._order_of_ends = itertools.count()
        self.now_s = start_s
        self.tasks = 0
        self.work_s: dict[str, float] = defaultdict(float)
        self.last_s: dict[str, float] = {}
        self._walk = Walk(
            graph, lambda *_: None, in_flight=workers, chunk_seconds=chunk_seconds, elsewhere=True, find=lambda *_: None
        )

    def run(self) -> float:
        """Seconds from the start to the last result."""
        while self._walk.unfinished:
            while self._walk.ready and len(self._ends) < self._workers:
                self._submit_next()
            if self._ends:
                self._take_one_result()
        return self.now_s

    def _submit_next(self) -> None:
        chunk = self._walk.next_chunk()
        seconds = sum(map(self._seconds, chunk))
        self.work_s[chunk[0].stage.name] += seconds
        self.tasks += 1
        if chunk[0].here:  # the flow's own process does nothing else meanwhile
            self.now_s += seconds
            self._settle(chunk)
            return
        heapq.heappush(self._ends, (self.now_s + self._task_overhead_s + seconds, next(self._order_of_ends), chunk))

    def _take_one_result(self) -> None:
        end_s, _, chunk = heapq.heappop(self._ends)
        self.now_s = max(self.now_s, end_s)
        self._settle(chunk)

    def _settle(self, chunk: list[Node]) -> None:
        for node in chunk:
            self.last_s[node.stage.name] = self.now_s
            self._walk.settle(node, Outcome("ran", _DONE), self._seconds(node))


def critical_path_s(graph: Graph, seconds: Callable[[Node], float]) -> float:
    """Seconds of the longest chain: what no number of workers goes below."""
    ends: dict[Node, float] = {}
    for node in graph:
        ends[node] = seconds(node) + max((ends[parent] for parent in node.parents), default=0.0)
    return max(ends.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run of one model reads, holds and computes."""

    shape: LlamaShape
    costs: dict[str, StageCost]
    config: RunConfig
    graph: Graph
    measured: MeasuredModel
    speed: float

    @classmethod
    def of(cls, shape: LlamaShape, costs: dict[str, StageCost], speed: float) -> Plan:
        config = parse_run_config(
            {
                "name": "plan",
                "models": [{"name": "m", "source": "made-up"}],
                "strategies": ["uniform", "loss-aware"],
                "budgets": ["4.25"],
                "measure": {"also": ["kurtosis", "sensitivity"]},
            }
        )
        site = Site(store_url="made-up", model=ModelLocation(kind="hub", place="made-up"))
        structure_ref = ArtifactRef("discover/0", "0", "structure/1")
        model = PreparedModel(
            config=config.models[0],
            structure=structure_of(shape),
            structure_ref=structure_ref,
            site=site,
            menu=tuple(STOPS),
        )
        texts = {config.calibration.source: TextIdentity(identity="made-up", location="made-up")}
        graph, _, measured = build_graph(config, [model], texts)
        return cls(shape=shape, costs=costs, config=config, graph=graph, measured=measured["m"], speed=speed)

    @property
    def model_bytes(self) -> int:
        matrices = self.shape.layers * block_weights(self.shape)
        return BYTES_PER_WEIGHT * (matrices + 2 * VOCABULARY * self.shape.hidden)

    def compute_s(self, node: Node) -> float:
        """Seconds of the stage on one worker, without what is read and written."""
        calibration, evaluation = self.config.calibration, self.config.evaluation
        tokens = calibration.sequences * calibration.sequence_length
        weights, head = block_weights(self.shape), self.shape.hidden * VOCABULARY
        stage = node.stage.name
        if stage in self.costs:
            return self.costs[stage].seconds(head if stage in OF_THE_HEAD else weights, tokens) / self.speed
        if stage == "quantize":  # a grid of one configuration is applied: a twelfth of fitting twelve
            return self.costs["grids"].seconds(weights, tokens) / len(STOPS) / self.speed
        if stage in ("reference", "evaluate"):
            windows = 1 + max(0, evaluation.tokens - evaluation.window) // evaluation.stride
            seen = windows * evaluation.window
            forward = self.costs["forward"].seconds(weights, seen) * self.shape.layers
            return (forward + self.costs["forward"].per_weight_token_s * head * seen) / self.speed
        return 1.0

    def moved_bytes(self, node: Node) -> int:
        """Bytes of inputs and outputs, without the model."""
        calibration = self.config.calibration
        states = calibration.sequences * calibration.sequence_length * self.shape.hidden * 4
        if node.stage.name == "checkpoint":
            return 2 * int(4.25 / 8 * self.shape.layers * block_weights(self.shape))
        return (node.expected_bytes or 0) + sum(parent.expected_bytes or states for parent in node.parents[:4])


def structure_of(shape: LlamaShape) -> ModelStructure:
    key_value = shape.hidden * shape.key_value_heads // shape.heads
    sizes = {
        "self_attn.q_proj": (shape.hidden, shape.hidden, "attn_in"),
        "self_attn.k_proj": (key_value, shape.hidden, "attn_in"),
        "self_attn.v_proj": (key_value, shape.hidden, "attn_in"),
        "self_attn.o_proj": (shape.hidden, shape.hidden, "attn_out"),
        "mlp.gate_proj": (shape.intermediate, shape.hidden, "mlp_gate"),
        "mlp.up_proj": (shape.intermediate, shape.hidden, "mlp_gate"),
        "mlp.down_proj": (shape.hidden, shape.intermediate, "mlp_down"),
    }
    modules = tuple(
        ModuleInfo(ModuleId(layer, kind), rows, columns, part)
        for layer in range(shape.layers)
        for kind, (rows, columns, part) in sizes.items()
    )
    others = 2 * VOCABULARY * shape.hidden
    return ModelStructure(
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        layers_path="model.layers",
        layers=shape.layers,
        hidden_size=shape.hidden,
        vocabulary_size=VOCABULARY,
        tied_embeddings=False,
        modules=modules,
        other_parameters=others,
        other_bytes=BYTES_PER_WEIGHT * others,
        weights_sha256="0",
    )


def simulate(plan: Plan, workers: int, store_bytes_s: float, worker_bytes_s: float) -> Simulation:
    """A whole run on so many workers, each with its share of the store's bandwidth."""
    bytes_s = min(worker_bytes_s, store_bytes_s / workers)

    def seconds(node: Node) -> float:
        return plan.compute_s(node) + plan.moved_bytes(node) / bytes_s

    simulation = Simulation(plan.graph, seconds, workers, start_s=plan.model_bytes / bytes_s)
    simulation.run()
    return simulation


def report(plan: Plan, counts: list[int], store_bytes_s: float, worker_bytes_s: float) -> None:
    shape = plan.shape
    states = plan.config.calibration.sequences * plan.config.calibration.sequence_length * shape.hidden * 4
    print(
        f"\n{shape.name}: {shape.layers} blocks of {block_weights(shape) / 1e9:.2f} G weights, {len(plan.graph)} nodes"
    )
    print(f"  model files (read, and kept on every worker)     {plan.model_bytes / 1e9:10.1f} GB")
    print(f"  states or gradients of one layer                 {states / 1e9:10.2f} GB")
    kept = sum(node.expected_bytes or 0 for node in plan.graph)
    print(f"  artifacts that a run keeps                       {kept / 1e9:10.1f} GB")
    block_gb = 4 * block_weights(shape) / 1e9
    print(f"  a block in float32                               {block_gb:10.1f} GB")
    runs = {workers: simulate(plan, workers, store_bytes_s, worker_bytes_s) for workers in counts}
    print(f"  {'hours of work, and at what hour it ended':<34}" + "".join(f"{f'{n} workers':>20}" for n in counts))
    stages = sorted(runs[counts[0]].work_s, key=lambda stage: -runs[counts[0]].work_s[stage])
    for stage in stages[:12]:
        cells = (f"{run.work_s[stage] / 3600:.2f}, {run.last_s[stage] / 3600:.2f}" for run in runs.values())
        print(f"  {stage:<34}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"  {'whole run, hours':<34}" + "".join(f"{run.now_s / 3600:>20.2f}" for run in runs.values()))
    first = runs[counts[0]].now_s
    print(f"  {'times faster than 1 worker':<34}" + "".join(f"{first / run.now_s:>20.1f}" for run in runs.values()))
    print(f"  {'tasks':<34}" + "".join(f"{run.tasks:>20}" for run in runs.values()))
    chain = critical_path_s(plan.graph, plan.compute_s)
    print(f"  longest chain of stages, computing alone: {chain / 3600:.2f} hours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("costs", type=Path, metavar="COSTS.json")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--speed", type=float, default=1.0, help="of a worker, in threads of the measured machine")
    parser.add_argument("--store-gigabytes", type=float, default=10.0, help="per second, all workers together")
    parser.add_argument("--worker-gigabytes", type=float, default=1.0, help="per second, one worker")
    options = parser.parse_args()
    costs = anchored({name: StageCost(*pair) for name, pair in json.loads(options.costs.read_text()).items()})
    print(
        f"a worker is {options.speed:g} times the measured thread and reads {options.worker_gigabytes:g} GB/s, "
        f"the store gives {options.store_gigabytes:g} GB/s in all; {TASK_OVERHEAD_S} s per task"
    )
    for shape in (LLAMA_70B, LLAMA_405B):
        plan = Plan.of(shape, costs, options.speed)
        report(plan, options.workers, 1e9 * options.store_gigabytes, 1e9 * options.worker_gigabytes)


if __name__ == "__main__":
    main()
