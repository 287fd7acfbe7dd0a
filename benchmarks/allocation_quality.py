"""Perplexity of every strategy at equal bytes: a table of strategy × size for small models.

Run `python -m benchmarks.allocation_quality MODEL … --calibration TEXT --evaluation TEXT`. Sizes are those of
uniform b4g64, b4g128 and b3g32; every plan but those of the published boosts has that size or less. `closed` is the
share of the gap between uniform and full precision, in log-perplexity, with its standard error over evaluation
windows. `b4g32` and `b8g32` stay out of the menu, because a source stored on a 4-bit grid of 32 is reproduced by them.

Everything up to the allocations is made by the stages of a run and kept in the store, so that a second call goes on
where the first ended. Evaluation text is only evaluated on; `auto` compares plans on calibration text. Plans are
evaluated without writing checkpoints, with bfloat16 products where the processor is fast at them, all rows alike.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmq.allocation.strategies import STRATEGIES
from lmq.evaluation.perplexity import full_windows
from lmq.evaluation.windows import window_tokens
from lmq.formats.spec import STOPS
from lmq.measurement.grids import Allocation, load_grids
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.model.streaming import StreamedModel
from lmq.text.calibration import read_tokens
from lmq_flows.config.run import RunConfig, parse_run_config
from lmq_flows.graph.build import PreparedModel, Variant, build_graph
from lmq_flows.graph.direct import execute_directly
from lmq_flows.run.plan import ready_models
from lmq_storage import ArtifactRef, ArtifactStore
from lmq_tasks.allocate import ALLOCATION_FILE, read_configurations
from lmq_tasks.inputs import located_dir
from lmq_tasks.sources import PREFIX_FILE, TOKENS_FILE
from lmq_tasks.stage import open_store

MENU = [spec.name for spec in STOPS if spec.name not in ("b4g32", "b8g32")]
SIZES = ("b4g64", "b4g128", "b3g32")
WINDOW = 1024
ALL_STRATEGIES: list[str | dict[str, Any]] = [
    "uniform",
    "structural",
    "sensi-boost",
    "kurt-boost",
    {"name": "sensi-boost", "options": {"paid": True}},
    {"name": "kurt-boost", "options": {"paid": True}},
    {"name": "random-boost", "options": {"like": "sensi-boost"}},
    *(
        name
        for name in STRATEGIES
        if name not in ("uniform", "structural", "sensi-boost", "kurt-boost", "random-boost", "loss-aware", "auto")
    ),
    {"name": "loss-aware", "options": {"fisher": "token"}},
    {"name": "loss-aware", "options": {"fisher": "sequence"}},
    "auto",
]


def main() -> None:
    options = _arguments()
    print("| model | size of | strategy | bits per weight | perplexity | closed |")
    print("|---|---|---|---:|---:|---:|")
    for source in options.model:
        for row in _model_rows(_config(source, options)):
            print(row, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", help="directories, .gguf files or package:NAME/FILE")
    parser.add_argument("--calibration", required=True, help="text to measure on")
    parser.add_argument("--evaluation", required=True, help="text to evaluate on")
    parser.add_argument("--sequences", type=int, default=16, help="calibration sequences of 512 tokens (default 16)")
    parser.add_argument("--validation-sequences", type=int, default=8, help="more of them for auto (default 8)")
    parser.add_argument("--draws", type=int, default=4, help="draws of labels per sequence (default 4)")
    parser.add_argument("--windows", type=int, default=12, help="evaluation windows of 1024 tokens (default 12)")
    parser.add_argument("--without", nargs="*", default=[], metavar="STRATEGY", help="strategies to leave out")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="uniform configurations (default all three)")
    parser.add_argument("--store", default="store", help="where measurements are kept (default: store)")
    return parser.parse_args()


def _config(source: str, options: argparse.Namespace) -> RunConfig:
    names = [item if isinstance(item, str) else item["name"] for item in ALL_STRATEGIES]
    kept = [item for item, name in zip(ALL_STRATEGIES, names, strict=True) if name not in options.without]
    return parse_run_config(
        {
            "name": "allocation-quality",
            "models": [{"name": Path(source).stem, "source": source, "dtype": "float16"}],
            "strategies": kept,
            "budgets": [f"uniform {size}" for size in options.sizes],
            "measure": {"menu": MENU, "label_draws": options.draws},
            "calibration": {
                "source": options.calibration,
                "part": "all",
                "sequences": options.sequences,
                "validation_sequences": options.validation_sequences,
            },
            "evaluation": {
                "source": options.evaluation,
                "part": "all",
                "tokens": options.windows * WINDOW,
                "window": WINDOW,
                "stride": WINDOW,
            },
            "runner": {"workers": 1, "threads_per_worker": torch.get_num_threads()},
            "store": options.store,
        }
    )


def _model_rows(config: RunConfig) -> Iterator[str]:
    """Table rows of one model."""
    models, texts = ready_models(config)
    graph, variants, measured = build_graph(config, models, texts)
    name = config.models[0].name
    plans = [variant.allocation for variant in variants if variant.allocation is not None]
    tokens = next(node for node in graph if node.stage.name == "evaluation-tokens")
    started_s = time.perf_counter()
    refs = execute_directly(graph, wanted=[*plans, *measured[name].grids, tokens])
    print(f"<!-- {name}: measured and allocated in {time.perf_counter() - started_s:.0f} s -->", flush=True)
    judge = _Judge(models[0], [refs[node] for node in measured[name].grids], refs[tokens])
    full = judge.losses(None)
    yield f"| {name} | – | full precision | 16 | {math.exp(full.mean()):.2f} | 100 % |"
    uniform = full
    for variant in variants:
        if variant.allocation is None:
            continue
        allocation = read_configurations(judge.store.path(refs[variant.allocation], ALLOCATION_FILE))
        losses = judge.losses(allocation)
        if variant.strategy is not None and variant.strategy.name == "uniform":
            uniform = losses
        yield _row(variant, models[0], allocation, losses, uniform, full)


def _row(
    variant: Variant,
    model: PreparedModel,
    allocation: Allocation,
    losses: np.ndarray,
    uniform: np.ndarray,
    full: np.ndarray,
) -> str:
    """One row; `losses`, `uniform` and `full` are nats per token of every evaluation window."""
    structure = model.structure
    assert variant.strategy is not None
    size_bytes = sum(allocation[module.id].size_bytes(module.parameters) for module in structure.modules)
    gap, gain = float((uniform - full).mean()), uniform - losses
    closed, error = 100 * gain.mean() / gap, 100 * gain.std(ddof=1) / len(gain) ** 0.5 / gap
    size = (variant.budget or "").removeprefix("uniform ")
    bits_per_weight = 8 * size_bytes / structure.parameters
    return (
        f"| {model.config.name} | {size} | {variant.strategy.label} | {bits_per_weight:.3f} "
        f"| {math.exp(losses.mean()):.2f} | {closed:.1f} ± {error:.1f} % |"
    )


class _Judge:
    """Evaluates choices with the grids of a model, without writing checkpoints; equal choices only once."""

    def __init__(self, model: PreparedModel, frobenius: Sequence[ArtifactRef], tokens: ArtifactRef):
        self.store: ArtifactStore = open_store(model.site.store_url)
        assert model.site.model is not None
        directory = located_dir(self.store, model.site.model)
        streamed = StreamedModel.open(directory, model.structure)
        files = [self.store.path(ref, "grids.safetensors") for ref in frobenius]
        self._point = QuantizedPoint(streamed, functools.lru_cache(1)(lambda layer: load_grids(files[layer])))
        stream = read_tokens(self.store.path(tokens, TOKENS_FILE))[0]
        prefix = json.loads(self.store.path(tokens, PREFIX_FILE).read_text())
        self._tokens = window_tokens(stream, full_windows(stream.numel(), WINDOW, WINDOW), prefix)
        self._known: dict[Any, np.ndarray] = {}

    def losses(self, allocation: Allocation | None) -> np.ndarray:
        """Mean loss of every window in nats per token."""
        key = None if allocation is None else tuple(sorted(allocation.items()))
        if key not in self._known:
            self._known[key] = self._point.losses(self._tokens, allocation).numpy()
        return self._known[key]


if __name__ == "__main__":
    main()
