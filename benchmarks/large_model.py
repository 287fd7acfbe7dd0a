"""Measuring a model of Llama-2-7B's shape on a small machine: peak memory, and seconds per block by stage.

    python -m benchmarks.large_model [--blocks 8] [--threads 2] [--sequence-length 256] [--measured-blocks 8]

Random heavy-tailed float16 weights of that many blocks (0.4 GB each) are written to a temporary folder that is removed
afterwards. The stages of a run then measure them in a process of their own: capture, weight statistics, grids and
Frobenius errors of 12 configurations, sensitivity at one, token-wise and sequence-wise Fisher costs of all. Printed is
the peak resident memory of the whole process during each stage, against a limit of 6 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.llama_files import LLAMA_2_7B, write_llama
from benchmarks.memory import peak_bytes

LIMIT_BYTES = 6e9
BLOCK_BYTES = 0.6e9
"""Disk a block takes: weights, grids of 12 configurations, states and gradients."""

FORGET_PEAK = "5"
"""What makes Linux count a process's peak memory anew."""

SEQUENCES = 2

ONCE = ("calibration", "embed", "loss-gradient", "sampled-loss-gradient")
"""Stages that a model has once, not once per block."""


@dataclass
class StageCosts:
    """Wall seconds and peak resident bytes of every stage, told by the run."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    peak_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _started: float = 0.0

    def watch(self, node, outcome) -> None:  # type: ignore[no-untyped-def]
        if outcome is None:
            Path("/proc/self/clear_refs").write_text(FORGET_PEAK)
            self._started = time.perf_counter()
        else:
            name = node.stage.name
            self.seconds[name] += time.perf_counter() - self._started
            self.counts[name] += 1
            self.peak_bytes[name] = max(self.peak_bytes[name], peak_bytes())


def measure(path: Path, threads: int, sequence_length: int, measured_blocks: int | None) -> StageCosts:
    """Run the measuring stages; those of every configuration for the first `measured_blocks` blocks alone."""
    from lmq_flows.config.run import parse_run_config
    from lmq_flows.graph.build import build_graph
    from lmq_flows.graph.direct import execute_directly
    from lmq_flows.run.plan import ready_models

    config = parse_run_config(
        {
            "name": "large-model",
            "models": [{"name": "large", "source": str(path)}],
            "strategies": ["uniform"],
            "budgets": ["4.25"],
            "measure": {"also": ["kurtosis", "sensitivity", "fisher", "sequence_fisher"]},
            "calibration": {
                "sequences": SEQUENCES,
                "sequence_length": sequence_length,
                "validation_sequences": 1,
            },
            "evaluation": {"tokens": 512, "window": 256, "stride": 256},
            "runner": {"workers": 1, "threads_per_worker": threads, "device": "cpu"},
            "store": str(path / "store"),
            "runs_dir": str(path / "runs"),
        }
    )
    models, texts = ready_models(config)
    graph, _, measured = build_graph(config, models, texts)
    found = measured["large"]
    costs = StageCosts()
    by_configuration = [nodes for name, nodes in found.tables.items() if name != "kurtosis"]
    wanted = [*found.tables["kurtosis"], *(node for nodes in by_configuration for node in nodes[:measured_blocks])]
    execute_directly(graph, wanted, watch=costs.watch)
    return costs


def report(blocks: int, sequence_length: int, costs: StageCosts) -> None:
    tokens = SEQUENCES * sequence_length
    print(f"{blocks} blocks of {LLAMA_2_7B.name}'s shape, {tokens} calibration tokens, 12 configurations")
    print(f"{'stage':<28}{'times':>6}{'s each':>9}{'peak GB':>9}")
    whole_s = 0.0
    for name, stage_s in sorted(costs.seconds.items(), key=lambda item: -item[1] / costs.counts[item[0]]):
        count = costs.counts[name]
        whole_s += stage_s / count * (1 if name in ONCE else LLAMA_2_7B.layers)
        print(f"{name:<28}{count:>6}{stage_s / count:>9.2f}{costs.peak_bytes[name] / 1e9:>9.2f}")
    peak_gb = max(costs.peak_bytes.values()) / 1e9
    print(f"~{whole_s / 60:.0f} min for {LLAMA_2_7B.layers} blocks")
    print(f"peak {peak_gb:.2f} GB, limit {LIMIT_BYTES / 1e9:.0f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sequence-length", type=int, default=256, help="of each of the 2 sequences (default 256)")
    parser.add_argument(
        "--measured-blocks", type=int, help="how many have what takes every configuration (default all)"
    )
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        costs = measure(options.measure, options.threads, options.sequence_length, options.measured_blocks)
        print(json.dumps({"seconds": costs.seconds, "counts": costs.counts, "peak_bytes": costs.peak_bytes}))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        free, needed = shutil.disk_usage(folder).free, options.blocks * BLOCK_BYTES
        if free < needed:
            sys.exit(f"{folder} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} are needed; give another --folder")
        write_llama(Path(folder), LLAMA_2_7B, blocks=options.blocks, vocabulary=32000)
        command = [sys.executable, "-m", "benchmarks.large_model", "--measure", folder]
        command += ["--threads", str(options.threads), "--sequence-length", str(options.sequence_length)]
        if options.measured_blocks is not None:
            command += ["--measured-blocks", str(options.measured_blocks)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    costs = StageCosts(**json.loads(done.stdout.splitlines()[-1]))
    report(options.blocks, options.sequence_length, costs)
    if max(costs.peak_bytes.values()) > LIMIT_BYTES:
        sys.exit("above the limit")


if __name__ == "__main__":
    main()
