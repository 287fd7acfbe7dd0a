"""What Dask or Ray add to the work of measuring a model, and whether the simulation of benchmarks.scaling is right.

    PREFECT_LOGGING_LEVEL=ERROR python -m benchmarks.runners SMOLLM2 --kind dask --workers 1 2 --sequences 4 --blocks 15

SMOLLM2 is a directory with a model. Its blocks, or the last `--blocks` of them, are measured (capture, kurtosis, grids,
token-wise Fisher) by worker processes, with a new store each time. Of every task, the time from its submission to its
result is compared with the seconds of the stages in it: the rest is overhead (Prefect's and the cluster's, taking of
results). The simulation is then given the seconds of the stages and the overhead, and predicts how long runs took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow

CURRENT: Callable[[], Any] = lambda: None  # noqa: E731
"""What the flow does; set in the flow's own process, so that workers need not be sent it."""


SAME_TASK_S = 0.003


@flow(name="measure", persist_result=False)
def measure() -> None:
    from benchmarks import runners

    runners.CURRENT()


@dataclass
class TaskTimes:
    """When every node was handed over and when its result was there."""

    submitted: dict[Any, float] = field(default_factory=dict)
    settled: dict[Any, float] = field(default_factory=dict)
    refs: dict[Any, Any] = field(default_factory=dict)

    def watch(self, node: Any, outcome: Any) -> None:
        if outcome is None:
            self.submitted[node] = time.perf_counter()
        else:
            self.settled[node] = time.perf_counter()
            self.refs[node] = outcome.ref


@dataclass(frozen=True)
class MeasuredRun:
    """A run with the seconds of its nodes, and overhead by task."""

    wall_s: float
    seconds: dict[Any, float]
    tasks: list[list[Any]]
    overheads_s: list[float]
    graph: Any

    @property
    def figures(self) -> dict[str, Any]:
        """Mean seconds of every stage, and what a task adds."""
        by_stage: dict[str, list[float]] = {}
        for node, seconds in self.seconds.items():
            by_stage.setdefault(node.stage.name, []).append(seconds)
        means = {stage: statistics.mean(found) for stage, found in by_stage.items()}
        return {"seconds": means, "task_overhead_s": statistics.median(self.overheads_s)}


def run_once(model: Path, kind: str, workers: int, sequences: int, blocks: int | None) -> MeasuredRun:
    """Measure the model on a new cluster and a new store."""
    from benchmarks import runners
    from lmq_flows.graph.build import build_graph
    from lmq_flows.graph.node import Graph
    from lmq_flows.graph.walk import execute
    from lmq_flows.run.plan import ready_models
    from lmq_flows.run.runners import started_runner
    from lmq_storage import ArtifactStore

    with tempfile.TemporaryDirectory() as folder:
        config = measuring_config(model, folder, kind, workers, sequences)
        models, texts = ready_models(config)
        whole, _, measured = build_graph(config, models, texts)
        found = measured["m"]
        graph = Graph()
        wanted = [
            nodes[-blocks if blocks else None :]
            for nodes in (found.tables[name] for name in ("frobenius", "kurtosis", "fisher"))
        ]
        graph.nodes = whole.leading_to([node for nodes in wanted for node in nodes])
        times = TaskTimes()
        with started_runner(config.runner) as runner:
            warm_up(runner, workers)
            runners.CURRENT = lambda: execute(
                graph, in_flight=workers, watch=times.watch, chunk_seconds=20.0, elsewhere=kind != "threads"
            )
            measure.with_options(task_runner=runner)()
        store = ArtifactStore(config.store)
        seconds = {node: store.manifest(ref.stage, ref.key).seconds for node, ref in times.refs.items()}  # type: ignore[union-attr]
    tasks = tasks_of(graph, times)
    overheads = [
        max(times.settled[node] for node in task)
        - min(times.submitted[node] for node in task)
        - sum(seconds[node] for node in task)
        for task in tasks
    ]
    wall_s = max(times.settled.values()) - min(times.submitted.values())
    return MeasuredRun(wall_s, seconds, tasks, overheads, graph)


def tasks_of(graph: Any, times: TaskTimes) -> list[list[Any]]:
    """Nodes by the task that carried them: those are told of within a millisecond, tasks need longer to hand over."""
    tasks: list[list[Any]] = []
    for node in sorted(graph, key=times.submitted.__getitem__):
        last = tasks[-1][-1] if tasks else None
        together = last is not None and times.submitted[node] - times.submitted[last] < SAME_TASK_S
        if last is not None and together and last.stage is node.stage:
            tasks[-1].append(node)
        else:
            tasks.append([node])
    return tasks


def warm_up(runner: Any, workers: int) -> None:
    """Have every worker import what the stages need, which a run spends once."""
    from benchmarks import runners
    from lmq_tasks.engine import stage_task

    idle = stage_task("forward")

    def idle_tasks() -> None:
        from prefect.context import FlowRunContext

        context = FlowRunContext.get()
        assert context is not None
        for _ in range(3):
            futures = [
                context.task_runner.submit(idle, {"label": "idle", "items": [], "total": 2}) for _ in range(workers)
            ]
            for future in futures:
                future.wait()

    runners.CURRENT = idle_tasks
    measure.with_options(task_runner=runner)()


def measuring_config(model: Path, folder: str, kind: str, workers: int, sequences: int) -> Any:
    from lmq_flows.config.run import parse_run_config

    return parse_run_config(
        {
            "name": "runners",
            "models": [{"name": "m", "source": str(model.absolute())}],
            "strategies": ["uniform"],
            "budgets": ["4.25"],
            "measure": {"also": ["kurtosis", "fisher"]},
            "calibration": {"sequences": sequences, "sequence_length": 512},
            "runner": {"kind": kind, "workers": workers, "device": "cpu"},
            "store": f"{folder}/store",
            "runs_dir": f"{folder}/runs",
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kind", choices=("dask", "ray"), default="dask")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--blocks", type=int, help="measure the last blocks only")
    parser.add_argument("--figures", type=Path, help="JSON that keeps figures of earlier calls for the simulation")
    options = parser.parse_args()
    from benchmarks.scaling import Simulation

    blocks = f"last {options.blocks} blocks" if options.blocks else "all blocks"
    print(f"{options.kind}, {options.sequences} × 512 tokens, {blocks}", flush=True)
    names = ("workers", "tasks", "nodes", "work s", "overhead s", "share", "median s", "wall s")
    print("".join(f"{name:>11}" for name in names))
    known = json.loads(options.figures.read_text()) if options.figures and options.figures.exists() else {}
    for workers in options.workers:
        run = run_once(options.model, options.kind, workers, options.sequences, options.blocks)
        known[str(workers)] = run.figures
        work_s, overhead_s = sum(run.seconds.values()), sum(run.overheads_s)
        row = [f"{workers}", f"{len(run.tasks)}", f"{len(run.graph)}", f"{work_s:.1f}", f"{overhead_s:.1f}"]
        row += [f"{overhead_s / work_s:.1%}", f"{statistics.median(run.overheads_s):.2f}", f"{run.wall_s:.1f}"]
        print("".join(f"{cell:>11}" for cell in row), flush=True)
        for source, figures in known.items():
            of_stage, overhead_s = figures["seconds"], figures["task_overhead_s"]
            simulated = Simulation(
                run.graph, lambda node, of=of_stage: of[node.stage.name], workers, task_overhead_s=overhead_s
            )
            predicted_s = simulated.run()
            error = predicted_s / run.wall_s - 1
            print(f"    simulated with the figures of {source} workers: {predicted_s:.1f} s, {error:+.1%}", flush=True)
    if options.figures:
        options.figures.write_text(json.dumps(known, indent=1))


if __name__ == "__main__":
    from benchmarks import runners

    runners.main()
