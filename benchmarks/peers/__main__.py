"""Divergence of what other programs make of a model, against ours, at the bytes that each of them stores.

    python -m benchmarks.peers MODEL --calibration TEXT --evaluation TEXT --work DIR [--for ENGINE] [--figure FILE.svg]

One text for calibration, one judge, one text for evaluation; every block matrix is quantized, embedding, head and norms
stay. What a program's checkpoint stands for is judged in float32, so that programs and not kernels are compared. Each
runs in a virtual environment that is made in `--work`: its own packages, and under them those of this environment. One
that can't be installed or fails is named, with the end of its log. What is done is kept and not done again.

Ours are plans of `loss-aware` with the codes of `fisher-gptq`, from the grids and costs that `benchmarks.quantizers`
keeps in the same folder; with `--for ENGINE` those that its files hold, and bits are those of its files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.judge import Judge, Scores, bits_per_weight, print_header, print_row, read_tokens
from benchmarks.peers.job import Job, read
from benchmarks.quantizers import COSTS_FILE, SEQUENCE_LENGTH, WINDOW, grids_in, measure, plan_within
from lmq.allocation.targets import TARGETS, Target, target_named
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModuleId

OURS = "fisher-gptq"
_LOG_LINES = 3
_MENU = "b2g128,b2g64,b2g32,b3g128,b3g64,b3g32,b4g128,b4g64,b4g32,b5g64,b6g64,b8g64"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A program: its module here, what pip installs for it, and its configurations by name."""

    name: str
    module: str
    packages: tuple[str, ...]
    configurations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _groups(*widths: int, **more: Any) -> dict[str, dict[str, Any]]:
    return {f"{bits} bits, groups of 64": {"bits": bits, "group_size": 64, **more} for bits in widths}


_ROUNDED = {"iterations": 50, "group_size": 64}
_MIXED = (2, 3, 4, 8)
PEERS = (
    Peer(name="hqq", module="hqq", packages=(), configurations=_groups(3, 4)),
    Peer(
        name="mlx-lm",
        module="mlx_lm",
        packages=("mlx[cpu]==0.32.2", "mlx-lm==0.32.2"),
        configurations=_groups(3, 4, 5),
    ),
    Peer(
        name="llm-compressor GPTQ",
        module="llm_compressor",
        packages=("llmcompressor==0.14.0.1",),
        configurations=_groups(3, 4),
    ),
    Peer(
        name="GPTQModel",
        module="gptqmodel",
        packages=("gptqmodel==7.7.0",),
        configurations={f"{bits} bits, symmetric groups of 64": {"bits": bits, "group_size": 64} for bits in (3, 4)},
    ),
    Peer(
        name="Model Optimizer AWQ",
        module="modelopt",
        packages=("nvidia-modelopt==0.47.0",),
        configurations=_groups(4),
    ),
    Peer(
        name="llama.cpp",
        module="llama_cpp",
        packages=("llama-cpp-python==0.3.36",),
        configurations={mix: {"mix": mix} for mix in ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M")},
    ),
    Peer(
        name="AutoRound",
        module="auto_round",
        packages=("auto-round==0.16.1",),
        configurations={
            "4 bits, symmetric groups of 64, 50 steps": {**_ROUNDED, "bits": 4, "symmetric": True},
            "3 bits, groups of 64, 50 steps": {**_ROUNDED, "bits": 3, "symmetric": False},
            "2 bits, groups of 64, 50 steps": {**_ROUNDED, "bits": 2, "symmetric": False},
            **{
                f"AutoScheme within {bits} bits": {**_ROUNDED, "average_bits": bits, "menu": _MIXED, "symmetric": False}
                for bits in (3.3, 4.3)
            },
        },
    ),
)


def main() -> None:
    """Print the table, and draw the figure."""
    options = _arguments()
    directory: Path = options.model
    model = StreamedModel.open(directory, discover(directory))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = read_tokens(tokenizer, options.calibration, options.sequences, SEQUENCE_LENGTH, None)
    judge = Judge.of(model, read_tokens(tokenizer, options.evaluation, options.windows, WINDOW, None))
    chosen = options.only.split(",") if options.only else [peer.name for peer in PEERS]
    print_header("program")
    print_row(directory.name, "full precision", "", 16, judge.scores(None))
    points: list[tuple[str, float, Scores]] = []
    absent = []
    for peer in PEERS:
        if peer.name not in chosen:
            continue
        work = options.work / directory.name / "peers" / peer.module
        try:
            for label, settings in peer.configurations.items():
                bits, scores = _of_peer(peer, label, settings, work, options.work, model, directory, tokens, judge)
                print_row(directory.name, peer.name, label, bits, scores)
                points.append((peer.name, bits, scores))
        except subprocess.CalledProcessError as error:
            absent.append(f"{peer.name}: {_end_of(error.stdout)}")
    line = _ours(model, directory, tokens, judge, options)
    for line_bits, scores in line:
        print_row(directory.name, "lmq", "loss-aware, fisher-gptq", line_bits, scores)
    for text in absent:
        print(f"\nAbsent: {text}")
    if options.figure:
        _draw(options.figure, points, line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of an unquantized model")
    parser.add_argument("--calibration", required=True, type=Path, help="text that every program sees")
    parser.add_argument("--evaluation", required=True, type=Path, help="text to evaluate on")
    parser.add_argument("--work", required=True, type=Path, help="folder for environments, grids and results")
    parser.add_argument("--sequences", type=int, default=32, help="calibration sequences of 512 tokens (default 32)")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 1,024 tokens (default 8)")
    parser.add_argument("--only", default="", help=f"programs, of {', '.join(peer.name for peer in PEERS)}")
    parser.add_argument("--for", dest="target", type=target_named, help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--menu", default="", help="configurations of our plans (default: 12 of 2 to 8 bits)")
    parser.add_argument("--budgets", default="2.6,3.254,3.437,4.254,4.437,5.277", help="bits per weight of our plans")
    parser.add_argument("--figure", type=Path, help="where to draw divergence against bits")
    return parser.parse_args()


def _of_peer(
    peer: Peer,
    label: str,
    settings: Mapping[str, Any],
    work: Path,
    environments: Path,
    model: StreamedModel,
    directory: Path,
    tokens: Tensor,
    judge: Judge,
) -> tuple[float, Scores]:
    """Stored bits per weight and scores of one configuration. Raises CalledProcessError with what was printed."""
    name = label.replace(" ", "-").replace(",", "")
    kept = work / f"{name}.json"
    if not kept.exists():
        work.mkdir(parents=True, exist_ok=True)
        python = _environment(peer, environments)
        save_file({"tokens": tokens}, work / "tokens.safetensors")
        paths = {module.id: model.structure.path(module.id) for module in model.structure.modules}
        out = work / f"{name}.safetensors"
        job = Job(
            model=str(directory.resolve()),
            tokens=str((work / "tokens.safetensors").resolve()),
            matrices=list(paths.values()),
            out=str(out.resolve()),
            options=dict(settings),
        )
        job.write(work / f"{name}.job.json")
        _run([python, "-m", f"benchmarks.peers.{peer.module}", str(work / f"{name}.job.json")])
        quantized = read(out)
        by_layer: dict[int, dict[ModuleId, dict[QuantSpec, _Given]]] = {}
        for module, path in paths.items():
            by_layer.setdefault(module.layer, {})[module] = {_ANY: _Given(quantized.weights[path])}
        scores = judge.scores(by_layer.__getitem__, dict.fromkeys(paths, _ANY))
        out.unlink()
        kept.write_text(json.dumps({"bits": quantized.bits_per_weight, "scores": scores}))
    row = json.loads(kept.read_text())
    return row["bits"], row["scores"]


_ANY = QuantSpec(4, 64)
"""Under which the judge finds the weights of a peer."""


@dataclass(frozen=True, eq=False)
class _Given:
    """Stands where the judge takes a grid: the weight is what the peer made of it."""

    weight: Tensor

    def to(self, device: torch.device) -> _Given:
        return _Given(self.weight.to(device))

    def round_trip(self, weight: Tensor) -> Tensor:
        return self.weight


def _environment(peer: Peer, environments: Path) -> str:
    """The Python of a peer's environment, made where it is not there."""
    if not peer.packages:
        return sys.executable
    folder = environments / "environments" / peer.module
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        under = Path(sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"])
        (under / "under.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.packages])
        ready.touch()
    return str(python)


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _end_of(log: str) -> str:
    return " / ".join(log.strip().splitlines()[-_LOG_LINES:])


def _ours(
    model: StreamedModel, directory: Path, tokens: Tensor, judge: Judge, options: argparse.Namespace
) -> list[tuple[float, Scores]]:
    """Bits per weight and scores of our plans."""
    target: Target | None = options.target
    if target is not None and not options.menu:
        menu = list(target.usual_menu(model.structure.modules))
    else:
        menu = [QuantSpec.parse(name) for name in (options.menu or _MENU).split(",")]
    folder = options.work / directory.name / (OURS if target is None else f"{OURS}-for-{target.name}")
    if not (folder / COSTS_FILE).exists():
        measure(directory, model, tokens, 2, sorted(menu), {OURS: folder}, target)
    rows = []
    for bits in map(float, options.budgets.split(",")):
        given = plan_within(model, folder, menu, bits, target)
        rows.append((bits_per_weight(model, given, target), judge.scores(grids_in(folder), given)))
    return rows


def _draw(path: Path, points: Sequence[tuple[str, float, Scores]], line: Sequence[tuple[float, Scores]]) -> None:
    """Divergence against bits per weight: a point for every configuration of a peer, a line for ours."""
    figure, axes = plt.subplots(figsize=(6.4, 4))
    axes.plot([bits for bits, _ in line], [scores[1] for _, scores in line], "o-", color="black", label="lmq")
    for number, name in enumerate(dict.fromkeys(name for name, _, _ in points)):
        mine = [(bits, scores[1]) for peer, bits, scores in points if peer == name]
        axes.scatter(*zip(*mine, strict=True), marker="sD^vPX*<>"[number % 9], s=36, label=name)
    axes.set(xlabel="stored bits per weight", ylabel="KL to full precision, nats per token", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    with plt.rc_context({"svg.hashsalt": "lmq"}):  # the same figure is the same file
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
