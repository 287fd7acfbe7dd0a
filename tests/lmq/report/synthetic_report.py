"""A made-up run of plausible shape for the report's tests: no number here was measured."""

from __future__ import annotations

import math

import numpy as np

from lmq.allocation.error_table import ErrorTable
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model.structure import ModelStructure, ModuleId, ModuleInfo
from lmq.report.data import ModelReport, PairedDifference, ReportData, StageTiming
from lmq.report.results import VariantResult

SHAPES = {
    "self_attn.q_proj": (576, 576, "attn_in"),
    "self_attn.k_proj": (192, 576, "attn_in"),
    "self_attn.v_proj": (192, 576, "attn_in"),
    "self_attn.o_proj": (576, 576, "attn_out"),
    "mlp.gate_proj": (1536, 576, "mlp_gate"),
    "mlp.up_proj": (1536, 576, "mlp_gate"),
    "mlp.down_proj": (576, 1536, "mlp_down"),
}
MODEL = "SmallLlama-135M"
FULL_PERPLEXITY = 29.19
STRATEGIES = {"mxq": 38.21, "loss-aware": 35.82, "sensi-boost": 35.96, "kurt-boost": 37.22}


def structure(layers: int = 30) -> ModelStructure:
    modules = tuple(
        ModuleInfo(ModuleId(layer, kind), rows, columns, part)
        for layer in range(layers)
        for kind, (rows, columns, part) in SHAPES.items()
    )
    return ModelStructure(
        "LlamaForCausalLM",
        "bfloat16",
        "model.layers",
        layers,
        576,
        49152,
        True,
        modules,
        28_000_000,
        56_000_000,
        "0" * 64,
    )


def allocation(model: ModelStructure, strategy: str, base: QuantSpec, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    stop = STOPS.index(base)
    rows = []
    for module in model.modules:
        step, boosted = 0, False
        edge = module.id.layer in (0, 1, model.layers - 1)
        if strategy.endswith("boost"):
            boosted = bool(edge and rng.random() < 0.6)
            step = 2 * boosted
        elif strategy != "uniform":
            step = int(rng.integers(-2, 2)) + 2 * edge + (module.id.kind == "mlp.down_proj")
        spec = STOPS[min(max(stop + step, 0), len(STOPS) - 1)]
        size = spec.size_bytes(module.parameters)
        rows.append(
            {
                "layer": module.id.layer,
                "kind": module.id.kind,
                "bits": spec.bits,
                "group_size": spec.group_size,
                "size_bytes": size,
                "boosted": boosted,
            }
        )
    return rows


def error_table(model: ModelStructure, scale: float, seed: int) -> ErrorTable:
    rng = np.random.default_rng(seed)
    specs = tuple(STOPS)
    modules = tuple(sorted(module.id for module in model.modules))
    depth = np.array([1 + 3 * math.exp(-module.layer / 2) + module.layer / model.layers for module in modules])
    noise = rng.lognormal(0, 0.35, len(modules))
    cost = scale * (depth * noise)[:, None] * np.array([4.0**-spec.bits_per_weight for spec in specs])[None, :]
    sizes = {module.id: [spec.size_bytes(module.parameters) for spec in specs] for module in model.modules}
    return ErrorTable(modules, specs, cost, np.array([sizes[module] for module in modules]))


def model_report(name: str = MODEL, layers: int = 30, variants: int = 6) -> ModelReport:
    model = structure(layers)
    rng = np.random.default_rng(7)
    statistics, sensitivity, outliers = [], [], []
    for kind in SHAPES:
        spikes = {1: 9.0, layers - 1: 3.0} if kind in ("mlp.down_proj", "self_attn.o_proj") else {0: 2.0}
        for layer in range(layers):
            value = 3.1 + rng.gamma(2, 0.25) + spikes.get(layer, 0.0)
            statistics.append(
                {
                    "layer": layer,
                    "kind": kind,
                    "kurtosis": value,
                    "percentile_0": 0.0,
                    "percentile_99": 0.4,
                    "percentile_99_9": 0.6,
                    "percentile_99_99": 0.9,
                    "percentile_100": 0.4 * value,
                    "grid_bits": 4 if kind == "mlp.up_proj" else None,
                    "grid_group_size": 32 if kind == "mlp.up_proj" else None,
                }
            )
            flagged = layer in spikes and layer > 0
            z = float(rng.normal(0, 0.8)) + (6 if flagged else 0)
            outliers += [
                {"layer": layer, "kind": kind, "signal": "kurtosis", "z": z, "outlier": flagged},
                {"layer": layer, "kind": kind, "signal": "sensitivity", "z": z / 2, "outlier": layer == layers - 1},
            ]
    parts = {
        part: 1e-4 * rng.lognormal(0, 1) * np.exp(np.linspace(0, 4, layers) + rng.normal(0, 0.2, layers))
        for part in ("attn_in", "attn_out", "mlp_gate", "mlp_down")
    }
    for module in model.modules:
        spike = 6.0 if module.id.layer == layers - 1 else 1.0
        value = float(parts[module.part][module.id.layer]) * spike
        sensitivity.append({"layer": module.id.layer, "kind": module.id.kind, "sensitivity": value})
    allocations = {}
    for index, result in enumerate(results(name, variants)):
        if result.strategy != "full-precision" and result.error is None:
            base = QuantSpec.parse(str(result.budget).split()[1])
            allocations[result.label] = allocation(model, result.strategy, base, index)
    return ModelReport(
        name=name,
        structure=model,
        profiles={"kurtosis": statistics, "sensitivity": sensitivity},
        outliers=outliers,
        super_weights=[super_weight(layer) for layer in range(layers)],
        layer_activity=[layer_activity(layer, layers) for layer in range(layers)],
        costs={
            "sequence_fisher": error_table(model, 3.0, 2),
            "divergence": error_table(model, 1.5, 3),
            "frobenius": error_table(model, 60.0, 1),
        },
        allocations=allocations,
    )


def super_weight(layer: int) -> dict:
    ratio = 900.0 if layer == 2 else 14.0 + layer
    sides = {
        f"{side}_{name}": value
        for side in ("input", "output")
        for name, value in (("spike", 3 * ratio), ("channel", 7 * layer), ("token", 0), ("rms_ratio", ratio))
    }
    return {"layer": layer, "kind": "mlp.down_proj", **sides}


def layer_activity(layer: int, layers: int) -> dict:
    edge = 5.0 if layer in (0, layers - 1) else 1.0
    return {
        "layer": layer,
        "variance": edge * (1 + layer / layers),
        "pooled_variance": edge * (2 + layer / layers),
        "sparsity": 0.01 + 0.001 * layer,
        "relative_sparsity": 0.1 + 0.001 * layer,
        "elements": 1 << 20,
        "block_influence": 0.02 * edge + 0.001 * layer,
    }


def results(model: str = MODEL, count: int = 6) -> list[VariantResult]:
    """Full precision, then uniform and the strategies at one budget after another, `count` in all."""
    full = VariantResult(
        model=model,
        strategy="full-precision",
        size_bytes=212_336_640,
        checkpoint_bytes=269_060_552,
        bits_per_weight=16.0,
        perplexity=FULL_PERPLEXITY,
        perplexity_stderr=0.33,
        protocol="strided 1024/512",
        tokens=4096,
        seconds=31.2,
    )
    made = [full]
    for step, base in enumerate(
        ("b4g64", "b3g64", "b4g128", "b3g32", "b8g128", "b3g128", "b2g32", "b4g32", "b8g64", "b2g64", "b8g32", "b2g128")
    ):
        spec = QuantSpec.parse(base)
        worse = 0.26 * 4 ** (4.25 - spec.bits_per_weight)
        for index, (strategy, at_b4) in enumerate({"uniform": 38.03, **STRATEGIES}.items()):
            extra = 1.0 + (0.05 if strategy.endswith("boost") else 0.0)
            size = int(structure().parameters * spec.bits_per_weight * extra / 8)
            perplexity = FULL_PERPLEXITY * math.exp(
                worse * math.log(at_b4 / FULL_PERPLEXITY) / math.log(38.03 / FULL_PERPLEXITY)
            )
            made.append(
                VariantResult(
                    model=model,
                    strategy=strategy,
                    budget=f"uniform {base}" + (" +5%" if extra > 1 else ""),
                    budget_bytes=size,
                    size_bytes=size - 100 * index * (extra == 1),
                    checkpoint_bytes=size + 56_700_000,
                    bits_per_weight=spec.bits_per_weight * extra,
                    perplexity=perplexity,
                    perplexity_stderr=perplexity * 0.011,
                    kl_divergence=worse * at_b4 / 38.03,
                    kl_divergence_stderr=worse * 0.004,
                    kl_p99=7 * worse * at_b4 / 38.03,
                    top1_agreement=1 - worse / 2 if worse < 2 else 0.01,
                    protocol="strided 1024/512",
                    tokens=4096,
                    seconds=33.5 + index + step,
                    checkpoint=f"checkpoints/{strategy}-{base}",
                    objective=None if strategy == "uniform" else 12.5,
                    lower_bound=None if strategy == "uniform" else 12.5,
                    gap=None if strategy == "uniform" else 0.0,
                )
            )
    return made[:count]


def fisher_stage(layer: int) -> StageTiming:
    peak = 1_200_000_000 if layer == 3 else None
    label = f"layer {layer}"
    return StageTiming(stage="fisher", label=label, state="ran", seconds=7.9, size_bytes=4300, peak_memory_bytes=peak)


def stages() -> list[StageTiming]:
    made = [StageTiming(stage="import-model", label=MODEL, state="cached", seconds=None, size_bytes=269_060_552)]
    for layer in range(30):
        made.append(StageTiming(stage="kurtosis", label=f"layer {layer}", state="cached", size_bytes=2100))
        made.append(StageTiming(stage="grids", label=f"layer {layer}", state="ran", seconds=2.4, size_bytes=4300))
        made.append(fisher_stage(layer))
    for strategy in STRATEGIES:
        made.append(StageTiming(stage="allocate", label=strategy, state="ran", seconds=0.06, size_bytes=3100))
        made.append(StageTiming(stage="quantize", label=strategy, state="ran", seconds=14.2, size_bytes=113_000_000))
        made.append(StageTiming(stage="evaluate", label=strategy, state="ran", seconds=35.0, size_bytes=900))
    return made


def paired(made: list[VariantResult]) -> list[PairedDifference]:
    """Every strategy against uniform at its budget, a hundredth of a nat uncertain."""
    uniform = {result.budget: result for result in made if result.strategy == "uniform"}
    return [
        PairedDifference(
            model=result.model,
            variant=result.label,
            baseline=uniform[result.budget].label,
            difference=math.log(result.perplexity / uniform[result.budget].perplexity),
            stderr=0.01,
        )
        for result in made
        if result.strategy != "uniform" and result.budget in uniform
    ]


def report_data(variants: int = 6) -> ReportData:
    failed = VariantResult(
        model=MODEL,
        strategy="gptq",
        budget="uniform b4g64",
        error="InfeasibleBudget: the budget of 10 bytes is below <the smallest>",
    )
    made = results(count=variants)
    return ReportData(
        run="demo",
        results=[*made, failed],
        paired=paired(made),
        models=[model_report(variants=variants)],
        stages=stages(),
        config="models:\n  - {name: SmallLlama-135M, source: maker/small-llama@main}\n"
        "strategies: [uniform, mxq, loss-aware]\nbudgets:\n  - uniform b4g64\n",
        versions={"lmq": "0.1.0", "torch": "2.9.0", "transformers": "5.23.0"},
        digests={MODEL: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    )
